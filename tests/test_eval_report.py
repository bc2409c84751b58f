"""What `leank eval` says: means and limits, tables, pictures, and the command line."""

import json
import re
import sys
from statistics import NormalDist

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from leank.cli import app  # noqa: E402
from leank.evaluation.report import draw_pictures, print_report  # noqa: E402
from leank.evaluation.summary import summarise  # noqa: E402

from .eval_tools import text  # noqa: E402
from .learn_run_tools import write_model  # noqa: E402
from .tiny_models import pruned  # noqa: E402


def record(task, length, index, scores, depth=None):
    methods = {
        name: {"score": score, "kl": kl, "nll": nll, "share": share, "said": None}
        for name, (score, kl, nll, share) in scores.items()
    }
    return {"task": task, "length": length, "index": index, "depth": depth, "methods": methods}


def test_summary():
    rng, records, drawn = np.random.default_rng(0), [], {}
    for task, n in (("a", 40), ("b", 90)):
        drawn[task] = (rng.random((2, n)) < [[0.8], [0.5]]).astype(float)
        records += [
            record(
                task, 100 + 100 * (i % 2), i, {"dense": (d, 0, 1, 1), "m": (s, 1, 2, 0.5)}, i / n
            )
            for i, (d, s) in enumerate(drawn[task].T.tolist())
        ]
    records += [
        record("text", 100, i, {"dense": (None, 0, i, 1), "m": (None, 0.5, i + 1, 0.5)})
        for i in range(2)
    ]
    dense, mask = summarise(records, {"dense": None, "m": {"kept_k": 0.3}})
    assert dense["mean"]["loss_points"] == 0 == dense["mean"]["high_points"]
    z, variance, losses = NormalDist().inv_cdf(0.975), 0.0, []
    for task in mask["tasks"]:
        points = 100 * (drawn[task["task"]][0] - drawn[task["task"]][1])
        error = points.std(ddof=1) / len(points) ** 0.5
        assert task["n"] == len(points) and task["loss_points"] == pytest.approx(points.mean())
        assert task["low_points"] == pytest.approx(points.mean() - z * error)
        assert task["high_points"] == pytest.approx(points.mean() + z * error)
        variance, losses = variance + error**2 / 4, [*losses, points.mean()]
    assert mask["mean"]["loss_points"] == pytest.approx(np.mean(losses))
    assert mask["mean"]["high_points"] == pytest.approx(np.mean(losses) + z * variance**0.5)
    assert (mask["mean"]["n"], mask["kept"]) == (130, {"kept_k": 0.3})
    assert [cell["n"] for cell in mask["cells"]] == [20, 20, 45, 45]
    assert [length["length"] for length in mask["lengths"]] == [100, 200]
    assert mask["text"] == {"n": 2, "perplexity": pytest.approx(np.exp(1.5)), "kl": 0.5}
    assert mask["bytes_share"] == pytest.approx(0.5)
    needle = mask["needle"]
    low = [m for t, n in (("a", 40), ("b", 90)) for m in drawn[t][1][: n // 10 : 2]]
    assert needle["lengths"] == [100, 200]
    assert needle["score"][0][0] == pytest.approx(np.mean(low))
    one = summarise(records[:1], {"dense": None, "m": None})[1]
    assert one["tasks"][0]["low_points"] is one["mean"]["low_points"] is one["text"] is None


# ------------------------------------------------------------------------------------ report


@pytest.fixture(scope="module")
def summary():
    scores = {"dense": (1, 0, 1, 1), "a mask": (0.5, 1, 2, 0.5)}
    records = [
        record(task, n, i, scores, depth=0.35)
        for task in ("niah_single_1", "vt")
        for n in (4096, 131072)
        for i in range(2)
    ]
    text = {"dense": (None, 0, 1, 1), "a mask": (None, 0.25, 2, 0.5)}
    records += [record("continuation", 4096, i, text) for i in range(2)]
    return summarise(records, {"dense": None, "a mask": {"kept_k": 0.3}})


def test_the_report_fits_into_80_columns(summary):
    console = Console(width=80, record=True, file=open("/dev/null", "w"), force_terminal=False)
    with console.file:
        print_report(summary, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    whole = "\n".join(lines)
    for row in (
        r"│ niah_single_1 *│ +4│ +100.0%│ +50.0%│ +\+50.00│ +\+50.00 .. \+50.00│",
        r"│ mean of 2 +│ +8│ +100.0%│ +50.0%│",
        r"│ 131,072 tokens *│ +4│",
        r"│ a mask *│ +50.0%│ +50.0%│ +\+50.00│ +\+50.00 .. \+50.00│ +7.389│ +0.2500│",
    ):
        assert re.search(row, whole), f"{row}\n{whole}"


def test_pictures(summary, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "needle-old.png").touch()
    drawn = draw_pictures(tmp_path, summary, "tiny")
    names = ["needle-dense.png", "needle-a_mask.png", "bytes.png"]
    assert [path.name for path in drawn] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert drawn[0].read_bytes() != drawn[1].read_bytes()


def test_pictures_can_be_read_at_the_ends(tmp_path, monkeypatch):
    picture = pytest.importorskip("leank.evaluation.picture")
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, *rest: figures.append(figure))
    scores = {name: (0, 0, 1, share) for name, share in (("dense", 1), ("m", 0.5))}
    summary = summarise([record("vt", 99, i, scores, 0.5) for i in range(2)], dict.fromkeys(scores))
    picture.draw_bytes(tmp_path / "x", summary)
    low, high = figures[0].axes[0].get_ylim()
    assert high - low >= 10, "equal scores are not to look apart"
    needle = {"lengths": [1, 2, 3], "score": [[0, 0.5, 1], *[[None] * 3] * 9]}
    picture.draw_needle(tmp_path / "x", needle)
    inks = {text.get_text(): text.get_color() for text in figures[1].axes[0].texts}
    assert inks["0%"] == inks["100%"] == "white" != inks["50%"]


def test_without_matplotlib_there_are_no_pictures(summary, tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("matplotlib.") or name.endswith(".picture"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "bytes.png").touch()
    assert draw_pictures(tmp_path, summary, "tiny") == [] and not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------ command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    write_model(folder / "model")
    (folder / "text.txt").write_text(text())
    pruned().save(folder / "mask.safetensors")
    return folder


def leank_eval(folder, **options):
    words = {"mask": folder / "mask.safetensors", "text": folder / "text.txt", "lengths": 700}
    words |= {"tasks": "single,continuation", "items": 1, "output": folder / "out"} | options
    command = ["eval", str(folder / "model")]
    for name, value in words.items():
        flag = f"--{name.replace('_', '-')}"
        command += [] if value is None else [flag] if value is True else [flag, str(value)]
    env = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, command, env=env)


def test_command(folder):
    result = leank_eval(folder, baseline="random, think", fast=True)
    assert result.exit_code == 0, result.output
    assert "mask, against dense" in result.stdout and "Results:" in result.stdout
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [m["name"] for m in results["methods"]] == ["dense", "mask", "random", "think"]
    assert results["settings"]["fast"] is True and results["settings"]["dtype"] == "float32"
    again = leank_eval(folder, baseline="random, think", fast=True, resume=True)
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output": None}, "output: expected a folder, got none; give -o FOLDER"),
        ({"mask": None}, "mask: expected at least one, got none"),
        ({"mask": "nowhere"}, "mask: nowhere: no such file, and as a"),
        ({"lengths": "1k"}, "lengths: expected whole numbers with commas between, got '1k'"),
        ({"lengths": "2000"}, "lengths: expected at most 1,024 tokens, the model's context"),
        ({"tasks": "x"}, "tasks: expected some of niah_single_1"),
        ({"baseline": "fp8", "fast": True}, "baseline: expected no quantized cache with --fast"),
        ({"text": "nowhere"}, "text: expected a UTF-8 text file, got nowhere"),
        ({"qa": "a", "qa_text": "nowhere"}, "text: expected a UTF-8 text file, got nowhere"),
    ],
)
def test_mistakes_are_one_line(folder, options, message):
    result = leank_eval(folder, **options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"leank eval: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
