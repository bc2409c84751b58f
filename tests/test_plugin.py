"""The pytest plugin: experiments on a tiny model, their records, and runs without any."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import leank

# Imported here: pytester forgets what a run in this process imports, and torch comes only once.
from leank.evaluation import picture, report  # noqa: F401
from leank.masks import ChannelMask
from leank.pytest_plugin import PLOT, RESULTS, pytest_configure

from .cuda_tools import on_gpu
from .learn_run_tools import write_model
from .tiny_models import HKV, D, N

pytest_plugins = "pytester"

ROOT = Path(__file__).resolve().parents[1]
# Of this copy of the package, ahead of where others are.
PATH = [str(Path(leank.__file__).parents[1]), os.environ.get("PYTHONPATH")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, PATH))}
EXAMPLES = ROOT / "examples" / "experiments"
PLUGIN = ("-p", "leank.pytest_plugin", "-p", "no:cacheprovider")


@pytest.fixture
def here(pytester):
    """Run pytest in this process; the returned function takes a test's text and options."""

    def run(text, *options):
        pytester.makepyfile(text)
        return pytester.runpytest_inprocess(*PLUGIN, *options)

    return run


def records(folder, name="leank-results"):
    return [json.loads(line) for line in Path(folder, name, RESULTS).read_text().splitlines()]


# ------------------------------------------------------------------- a run without experiments


def test_others_do_not_notice_it(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_nothing_was_imported():
            heavy = {"torch", "transformers", "rich", "matplotlib", "safetensors"}
            assert heavy & sys.modules.keys() == set()
        """
    )
    said = []
    for options in (PLUGIN, ()):
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
        environment = ENVIRONMENT | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout
        said.append(done.stdout.rsplit(" in ", 1)[0] + done.stderr)
    assert said[0] == said[1]
    assert [path.name for path in pytester.path.glob("leank*")] == []


def test_options_and_fixtures_have_its_prefix(here):
    said = here("", "--help").stdout.str()
    options = [line.split("=")[0].strip() for line in said.splitlines() if "--leank" in line]
    assert options == ["--leank-model", "--leank-mask", "--leank-device", "--leank-results"]
    said = here("", "--fixtures").stdout.str()
    [_, mine] = said.split("fixtures defined from leank.pytest_plugin")
    names = [line.split()[0] for line in mine.splitlines() if "leank/pytest_plugin.py:" in line]
    assert len(names) == 8 and all(name.startswith("leank_") for name in names)


def test_entry_point_and_option_p_together_load_it_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # pytest takes both for one plugin only where they have the same name.
    assert project["entry-points"]["pytest11"] == {"leank.pytest_plugin": "leank.pytest_plugin"}


def test_workers_of_xdist_leave_writing_to_the_process_that_reports():
    names = []
    manager = SimpleNamespace(register=lambda plugin, name: names.append(name))
    dir_ = SimpleNamespace(dir=".")
    config = SimpleNamespace(
        pluginmanager=manager, invocation_params=dir_, getoption=lambda name: "folder"
    )
    pytest_configure(config)
    assert names == ["leank-results"]
    config.workerinput = {}
    pytest_configure(config)
    assert names == ["leank-results"]


# ---------------------------------------------------------------------------------- recording


def test_results_are_written_shown_and_drawn(here, pytester):
    text = """
        import pytest

        @pytest.mark.parametrize("length", [100, 200])
        @pytest.mark.parametrize("ratio", [0.5, 0.25])
        def test_sweep(leank_record, ratio, length):
            leank_record(score=ratio, bytes_share=1 - ratio, bytes=1000 * length)

        def test_failing(leank_record):
            leank_record(note="[bold]as it is")
            assert False
        """
    done = here(text, "--leank-model", "some/model", "--leank-mask", "mask")
    done.assert_outcomes(passed=4, failed=1)
    found = records(pytester.path)
    assert [r["parameters"] for r in found[:2]] == [
        {"ratio": 0.5, "length": 100},
        {"ratio": 0.5, "length": 200},
    ]
    assert found[1]["values"] == {"score": 0.5, "bytes_share": 0.5, "bytes": 200000}
    assert found[1]["test"].endswith("::test_sweep[0.5-200]")
    settings = {"model": "some/model", "mask": "mask", "device": "auto", "outcome": "passed"}
    assert settings.items() <= found[0].items()
    assert found[4]["outcome"] == "failed" and found[4]["parameters"] == {}
    done.stdout.re_match_lines_random(
        [
            r"-+ leank: \S+py::test_sweep -+",
            r"│ outcome│ ratio│ length│ score│ bytes_share│ +bytes│",
            r"│ passed │ +0.5│ +200│ +0.5│ +0.5│ 200,000│",
            r"│ failed │ \[bold\]as it is│",
        ]
    )
    assert (pytester.path / "leank-results" / PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_adds_to_the_results(here, pytester):
    for i in range(2):
        here(f"def test_one(leank_record): leank_record(i={i})", "--leank-results", "mine")
    found = records(pytester.path, "mine")
    assert [r["values"] for r in found] == [{"i": 0}, {"i": 1}]
    assert not (pytester.path / "mine" / PLOT).exists()  # no scores


def test_lines_join_what_differs_in_the_first_parameter(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, path, title="": figures.append(figure))
    values = [(a, b, {"score": a, "bytes_share": a / b}) for b in (1, 2) for a in (1.0, 0.5)]
    report.draw_results(
        tmp_path / "plot.png",
        [
            {"name": "test_file.py::test_x", "parameters": {"a": a, "b": b}, "values": v}
            for a, b, v in values
        ],
    )
    [axes] = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "x by a, b 1": [[50, 50], [100, 100]],
        "x by a, b 2": [[25, 50], [50, 100]],
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("", "values: expected at least one, got none"),
        ("score=float('nan')", "values: expected what JSON has, got {'score': nan}"),
        ("model=object()", "values: expected what JSON has, got {'model': <object"),
    ],
)
def test_what_cannot_be_recorded_is_refused(here, pytester, values, said):
    done = here(f"def test_one(leank_record): leank_record({values})")
    done.assert_outcomes(failed=1)
    assert f"ValueError: {said}" in done.stdout.str()
    assert not (pytester.path / "leank-results").exists()


def test_a_folder_that_cannot_be_made_ends_the_run(here, pytester):
    (pytester.path / "file").write_text("")
    text = "def test_one(leank_record): leank_record(i=1)"
    done = here(text, "--leank-results", "file/folder")
    assert done.ret == 4
    done.stdout.fnmatch_lines(["*--leank-results: *file/folder: Not a directory*"])


# --------------------------------------------------------------------------- models and masks


@pytest.mark.parametrize(
    ("fixture", "options", "said"),
    [
        ("leank_model", (), "model: expected --leank-model, got none"),
        ("leank_tokenizer", ("--leank-model", "."), "model: .: "),
        ("leank_mask", (), "mask: expected --leank-mask, got none"),
        ("leank_mask", ("--leank-mask", "no-such"), "mask: no-such: no such file"),
        ("leank_mask", ("--leank-mask", "no.pth"), "mask: no.pth: No such file"),
        (
            "leank_mask",
            ("--leank-mask", "m-{ratio}"),
            "mask: expected fields among the test's parameters (none), got m-{ratio}",
        ),
        (
            "leank_mask",
            ("--leank-mask", "m-{"),
            "mask: expected fields among the test's parameters (none), got m-{",
        ),
    ],
)
def test_what_is_missing_is_said_in_a_line(here, fixture, options, said):
    done = here(f"def test_one({fixture}): pass", *options)
    done.assert_outcomes(errors=1)
    out = done.stdout.str()
    assert f"leank: {said}" in out
    assert "Traceback" not in out and "pytest_plugin.py" not in out


def test_the_device_is_checked(here, tmp_path):
    write_model(tmp_path / "model")
    options = ("--leank-model", str(tmp_path / "model"), "--leank-device", "abacus")
    done = here("def test_one(leank_model): pass", *options)
    assert "leank: device: expected auto, cpu, cuda or cuda:N, got abacus" in done.stdout.str()


CHECKS = """
import pytest
import torch


@pytest.mark.parametrize("align", [8, 16])
@pytest.mark.parametrize("ratio", [0.5])
def test_both(leank_model, leank_patched, leank_mask, leank_needles, leank_memory, ratio, align):
    assert leank_mask.align == align and leank_mask.ratio == pytest.approx(ratio, abs=0.02)
    assert leank_model.lm_head.weight is leank_patched.lm_head.weight
    [item] = leank_needles(1024, 1)
    ids = torch.from_numpy(item.prompt)[None]
    caches = {}
    for model in (leank_model, leank_patched, leank_model):
        out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
        caches[type(out.past_key_values).__name__] = out.past_key_values
    assert caches.keys() == {"DynamicCache", "LeanKCache"}
    n = caches["LeanKCache"].get_seq_length()
    used = leank_memory(caches["LeanKCache"])
    assert used["bytes"] == leank_mask.predict_memory([n], "float32")["total_bytes"]
    dense = leank_memory(caches["DynamicCache"])
    assert dense["bytes"] == dense["dense_bytes"] == used["dense_bytes"]
    assert used["bytes_share"] == pytest.approx(used["bytes"] / used["dense_bytes"])


def test_needles(leank_needles, leank_tokenizer):
    items = leank_needles(4000, 3, task="niah_single_2", seed=5)
    assert items is leank_needles(4000, 3, task="niah_single_2", seed=5)  # not made again
    assert len({item.sample.expected for item in items}) == 3
    for item in items:
        assert item.task == "niah_single_2" and 0 <= item.depth < 1
        assert len(item.prompt) + item.max_new_tokens <= 4000
        assert item.sample.expected[0] in leank_tokenizer.decode(item.prompt).replace(" ", "")


def test_ask(leank_model, leank_needles, leank_ask, leank_tokenizer, monkeypatch):
    [item] = leank_needles(1024, 1)
    reply = leank_ask(leank_model, item)
    assert reply.score == 0 and reply.said
    assert reply.cache.get_seq_length() == len(item.prompt) + item.max_new_tokens - 1
    [value] = item.sample.expected
    monkeypatch.setattr(leank_tokenizer, "decode", lambda *a, **b: f"it is {value}")
    assert leank_ask(leank_model, item).score == 1
"""


def write_experiments(folder, head_dim):
    """Write a tiny model, masks for it, and both examples; return the model's folder."""
    for ratio in (0.5, 0.7):
        for align in (8, 16):
            scores = np.random.default_rng(0).random((N, HKV, head_dim))
            mask = ChannelMask.from_scores(scores, ratio, align, sink=8, recent=32)
            mask.save(folder / f"mask-{ratio}-a{align}.safetensors")
    shutil.copytree(EXAMPLES, folder / "experiments")
    return write_model(folder / "model", max_position_embeddings=4096, head_dim=head_dim)


def run_experiments(model, device, mask, *names):
    words = [sys.executable, "-m", "pytest", *PLUGIN, "-q", "--leank-model", str(model)]
    words += ["--leank-device", device, "--leank-mask", mask, *names]
    # Models this small only wait for their threads.
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_experiments_on_a_tiny_model(pytester):
    """The fixtures, and both examples: in one process of their own, since loading takes longest."""
    model = write_experiments(pytester.path, D)
    pytester.makepyfile(test_checks=CHECKS)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [experiment] = re.findall(r"^```\n(@pytest.*?)^```$", text, re.M | re.S)
    pytester.makepyfile(test_readme=f"import pytest\n\n{experiment}")
    sweep = "experiments/test_ratio_sweep.py"
    run_experiments(model, "cpu", "mask-{ratio}-a{align}.safetensors", "test_checks.py", sweep)
    window = "experiments/test_window.py"
    run_experiments(model, "cpu", "mask-0.5-a8.safetensors", window, "test_readme.py")
    found = records(pytester.path)
    assert len([r for r in found if r["name"] == "test_readme.py::test_needles"]) == 2 * 3
    found = [r for r in found if r["name"].startswith("experiments")]
    shares = {
        (r["name"].rpartition("::")[2], *r["parameters"].values()): r["values"]["bytes_share"]
        for r in found
    }
    assert len(shares) == len(found) == 2 + 8 + 9
    assert shares["test_dense", 1024] == shares["test_dense", 2048] == 1
    assert shares["test_pruned", 0.7, 8, 2048] < shares["test_pruned", 0.5, 8, 2048]
    assert shares["test_window", 32, 0] < shares["test_window", 512, 0]
    assert {r["values"]["score"] for r in found} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert (pytester.path / "leank-results" / PLOT).is_file()


@on_gpu
def test_experiments_on_a_gpu(pytester):
    model = write_experiments(pytester.path, 64)
    mask = "mask-0.7-a16.safetensors"
    run_experiments(model, "cuda", mask, "experiments/test_window.py")
    shares = {}
    for record in records(pytester.path):
        values = record["values"]
        assert values["peak_bytes"] > values["bytes"] > 0
        shares[*record["parameters"].values()] = values["bytes_share"]
    assert len(shares) == 9 and shares[32, 0] < shares[512, 0] < 1
