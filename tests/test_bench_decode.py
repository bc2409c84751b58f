"""``leank bench decode``: what it is asked, what it prints, and where it cannot run."""

import dataclasses
import doctest
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from leank import ChannelMask
from leank.bench import profiles, work
from leank.bench.lines import (
    LayerLine,
    Line,
    MixedLine,
    Refusal,
    Result,
    Shape,
    Table,
    Timing,
    as_json,
)
from leank.bench.work import BenchError, Options, parse_shape, plan

from .conftest import random_keep
from .reference import attend

pytest.importorskip("typer")

from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from leank.bench.report import print_report  # noqa: E402
from leank.cli import app  # noqa: E402


def bench(*words):
    """Run the command."""
    env = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["bench", "decode", *map(str, words)], env=env)


@pytest.fixture
def mask_file(tmp_path):
    keep = random_keep(np.random.default_rng(0), 64, (8, 16, 0, 64))[None]
    ChannelMask(np.repeat(keep, 5, axis=0)).save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


# --------------------------------------------------------------------------------- what it is asked


def test_the_default_is_the_whole_table():
    llama, qwen = plan(Options(device="cuda"))
    assert (llama.name, llama.n_q_heads, llama.keep.shape) == ("llama-3.1-8b", 32, (32, 8, 128))
    assert (qwen.name, qwen.n_q_heads, qwen.keep.shape) == ("qwen-2.5-7b", 28, (28, 4, 128))
    assert " ".join(map(str, llama.shapes)) == (
        "64x32768 16x32768 1x131072 64x4096 8x8192 1x1024 1x4096"
    )
    assert qwen.shapes == (Shape(16, 32768),)


def test_the_default_of_a_cpu_is_small():
    (llama,) = plan(Options())
    assert (llama.name, len(llama.keep)) == ("llama-3.1-8b", 4)
    assert " ".join(map(str, llama.shapes)) == "1x4096 1x32768"


def test_profiles_and_shapes_can_be_chosen():
    help = " ".join(bench("--help").stdout.replace("│", " ").split())
    assert f"{', '.join(profiles.load_profiles())}, all" in help
    (work,) = plan(Options(profile="qwen-2.5-7b", shapes=("2x70", "1x9")))
    assert (work.name, work.shapes) == ("qwen-2.5-7b", (Shape(2, 70), Shape(1, 9)))
    assert len(plan(Options(profile="all"))) == 2


@pytest.mark.parametrize("n, chosen", [(8, range(0, 32, 4)), (3, (0, 10, 21)), (32, range(32))])
def test_layers_are_evenly_spaced(n, chosen):
    whole, some = (plan(Options("cuda", "llama-3.1-8b", layers=x))[0].keep for x in (None, n))
    np.testing.assert_array_equal(some, whole[list(chosen)])


def test_a_mask_file_instead_of_a_profile(mask_file):
    (work,) = plan(Options(mask=mask_file, q_heads=12, layers=2))
    assert (work.name, work.n_q_heads, work.n_heads, work.head_dim) == (mask_file.name, 12, 4, 64)
    assert len(work.keep) == 2 and len(work.shapes) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shapes", "8y8192"], "shapes: expected BxL as 8x8192, got '8y8192'"),
        (["--shapes", "8x8192,"], "shapes: expected BxL as 8x8192, got ''"),
        (["--shapes", "0x8192"], "shapes: expected BxL as 8x8192, got '0x8192'"),
        (["--layers", "0"], "layers: expected at least 1, got 0"),
        (["--q-heads", "0"], "q-heads: expected at least 1, got 0"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--per-layer"], "per-layer: expected --device cuda, got cpu"),
        (["--mixed"], "mixed: expected --device cuda, got cpu"),
        (["--mixed", "--png", "x.png"], "png: expected none with --per-layer or --mixed"),
        (
            ["--device", "cuda", "--dtype", "float32"],
            "dtype: expected one of bfloat16, float16 on a GPU, got float32",
        ),
        (["--sink", "-1"], "sink: expected at least 0, got -1"),
        (["--recent", "0"], "recent: expected at least 1, got 0"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--layers", "33"], "layers: expected at most the mask's 32, got 33"),
        (["--q-heads", "32"], "q-heads: expected none without --mask, got 32"),
        (["--mask", "FILE"], "q-heads: expected a multiple of the mask's 4 KV heads, got none"),
        (
            ["--mask", "FILE", "--q-heads", "6"],
            "q-heads: expected a multiple of the mask's 4 KV heads, got 6",
        ),
        (
            ["--mask", "FILE", "--profile", "all", "--q-heads", "4"],
            "profile: expected none with --mask, got all",
        ),
        (["--mask", "none.pth"], "mask: none.pth: No such file or directory"),
        (["--mask", "none"], "mask: none: no such file, and as a name: expected one of "),
        (["--mask", "SPOILT"], r"mask: .*spoilt: expected a safetensors file, got 50 bytes"),
    ],
)
def test_mistakes_are_one_line(words, message, mask_file):
    spoilt = mask_file.with_name("spoilt")
    spoilt.write_bytes(mask_file.read_bytes()[:50])
    result = bench(*({"FILE": mask_file, "SPOILT": spoilt}.get(word, word) for word in words))
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.match(f"leank bench decode: {message}", line), line


@pytest.mark.parametrize("option, value", [("profile", "llama"), ("dtype", "int8")])
def test_names_that_there_are_not(option, value):
    result = bench(f"--{option}", value)
    assert result.exit_code == 2 and result.stdout == ""
    assert f"'--{option}': Value error, '{value}' is not one of" in result.stderr


# ------------------------------------------------------------------------------ where it cannot run


def run_without(module, *words):
    code = f"import sys; sys.modules[{module!r}] = None; from leank.__main__ import main; main()"
    command = [sys.executable, "-c", code, "bench", "decode", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_torch_it_says_so():
    done = run_without("torch")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "leank bench decode: needs torch: pip install 'leank[hf]'\n"
    assert "--per-layer" in run_without("torch", "--help").stdout


def test_without_huggingface_hub_it_says_so():
    """Printed a traceback."""
    done = run_without("huggingface_hub", "--mask", "org/name", "--q-heads", "4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "leank bench decode: mask: a mask from the Hugging Face Hub needs huggingface_hub: "
        "pip install 'leank[hub]'\n"
    )


def test_built_without_cuda_it_says_so():
    pytest.importorskip("torch")
    done = run_without("leank._cuda", "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("leank bench decode: leank was built without CUDA: install it where")


def test_without_a_gpu_it_says_so(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("leank.cuda", reason="leank was built without CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench("--device", "cuda")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == (
        f"leank bench decode: needs an NVIDIA GPU; torch {torch.__version__} finds none\n"
    )


def work_of(keep, n_q_heads, *shapes):
    return work.Work("mask", keep, n_q_heads, shapes)


@pytest.mark.parametrize(
    "head_dim, n_q_heads, n_rows, message",
    [
        (40, 2, 1, r"mask: expected a head dim of \(64, .*256\), got 40"),
        (64, 34, 1, "q-heads: expected at most 16 per KV head, got 17 in mask"),
        (64, 2, 70_000, "shapes: expected at most 65535 rows, got 70000x9"),
    ],
)
def test_what_the_kernels_do_not_take(head_dim, n_q_heads, n_rows, message):
    pytest.importorskip("torch")
    pytest.importorskip("leank.cuda", reason="leank was built without CUDA")
    from leank.bench.decode_cuda import check_limits

    work = work_of(np.ones((1, 2, head_dim), bool), n_q_heads, Shape(n_rows, 9))
    with pytest.raises(BenchError, match=message):
        check_limits(work, Options())
    check_limits(work_of(np.ones((1, 2, 64), bool), 32, Shape(65_535, 9)), Options(mixed=True))


# ----------------------------------------------------------------------------------- what it prints


def line_of(shape, us, needed, dense, **dense_us):
    return Line(
        shape=shape,
        us=Timing(us, us * 0.9, us * 1.25),
        needed_bytes=needed,
        dense_us={name: Timing(x, x, x) for name, x in dense_us.items()},
        dense_bytes=dense,
        peak_gb_s=4400.0,
    )


def fake_result():
    big, small = Shape(64, 32768), Shape(1, 1024)
    lines = [
        line_of(big, 1128.04, 4.84e9, 8.59e9, cudnn=1910.0, flash=2000.0),
        line_of(small, 15.2, 4.19e6, 4.19e6),
        LayerLine(small, 3, 14.0, 4_194_304, 0.5),
        MixedLine(big, (8, 24, 40, 56), 102.0, 100.0),
    ]
    about = "32 layers, Hq/Hkv 32/8, D 128"
    table = Table("llama-3.1-8b", about, 1.6e-2, "of its head's largest output", 3.2e-3, lines)
    for shape in (big, small):
        table.refusals.append(Refusal("flashinfer", shape, "not installed"))
    table.refusals.append(Refusal("cudnn", small, "No available kernel."))
    facts = {"GPU": "a GPU", "driver": "1.2.3", "dtype": "bfloat16"}
    return Result(facts, "Times are medians of 15 replays.", [table])


def printed(result, width=80, peers=True):
    console = Console(width=width, record=True, color_system=None, file=open("/dev/null", "w"))
    with console.file:
        print_report(result, console, peers=peers)
        return console.export_text()


def cells(text, first):
    """Return the cells of the table rows that begin with a word."""
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() == first]


def test_the_printed_tables():
    text = printed(fake_result())
    rate, gain, peers, mixed = cells(text, "64x32768")
    assert rate[1:] == ["1,128.0", "-10% +25%", "4,840.00", "4,290.6", "98%", "1,100.0"]
    assert gain[1:] == ["1.77", "1.69x", "cudnn", "1,910.0", "+0% +0%", "4,497.4"]
    assert peers[1:] == ["1,910.0", "2,000.0"]
    assert mixed[1:] == ["8 to 56", "102.0", "100.0", "1.020"]
    rate, gain, peers, layer = cells(text, "1x1024")
    assert rate[1:] == ["15.2", "-10% +25%", "4.19", "275.7", "6%", "1.0"]
    assert gain[1:] == ["1.00", "-", "-", "-", "-", "-"]
    assert peers[1:] == ["-", "-"]
    assert layer[1:] == ["3", "4.19", "14.0", "0.30", "0.50", "60%"]
    words = " ".join(text.split())
    for said in (
        "GPU a GPU",
        "llama-3.1-8b: 32 layers, Hq/Hkv 32/8, D 128",
        "checked: largest error 3.2e-03 of its head's largest output, bound 1.6e-02",
        "no flashinfer at 64x32768, 1x1024: not installed",
        "no cudnn at 1x1024: No available kernel.",
        "medians of 15 replays",
    ):
        assert said in words, said


def test_only_the_best_peer_is_printed_beside_a_json_file():
    assert len(cells(printed(fake_result(), peers=False), "64x32768")) == 3


@pytest.mark.parametrize("width", [80, 200])
def test_fits_the_terminal(width):
    text = printed(fake_result(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_json_holds_all_numbers():
    (table,) = json.loads(json.dumps(as_json(fake_result())))["tables"]
    first = table["lines"][0]
    assert first["kind"] == "Line" and first["shape"] == {"B": 64, "L": 32768}
    assert first["us"] == {"median": 1128.04, "low": 1128.04 * 0.9, "high": 1128.04 * 1.25}
    assert first["dense_us"]["flash"]["median"] == 2000.0 and first["best"] == "cudnn"
    assert first["gain"] == pytest.approx(1910 / 1128.04)
    assert first["bound_us"] == pytest.approx(1100)
    assert table["lines"][1]["best"] is None and table["lines"][1]["gain"] is None
    assert table["lines"][3]["ratio"] == pytest.approx(1.02)
    assert len(table["refusals"]) == 3
    assert (table["error"], table["bound"]) == (3.2e-3, 1.6e-2)


def fake_run(monkeypatch, *results, error=None):
    """Let the command find what a GPU would; needs neither torch nor CUDA."""

    def run(options, works, progress):
        yield from results
        if error is not None:
            raise error

    module = types.ModuleType("leank.bench.decode")
    module.run = run
    monkeypatch.setitem(sys.modules, "leank.bench.decode", module)


def test_the_command_prints_and_saves(monkeypatch, tmp_path):
    fake_run(monkeypatch, Result({}, ""), fake_result())
    result = bench()
    assert result.exit_code == 0 and len(cells(result.stdout, "64x32768")) == 4
    result = bench("--json", tmp_path / "out.json")
    assert result.exit_code == 0 and len(cells(result.stdout, "64x32768")) == 3
    assert (tmp_path / "out.json").read_text() == json.dumps(
        as_json(fake_result()), indent=1
    ) + "\n"
    result = bench("--json", tmp_path)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == f"leank bench decode: json: {tmp_path}: Is a directory\n"


def test_what_was_found_is_saved_when_the_rest_fails(monkeypatch, tmp_path):
    wrong = work.WrongResultError("qwen-2.5-7b, layer 0, row 0: expected 1, got 2")
    fake_run(monkeypatch, fake_result(), error=wrong)
    result = bench("--json", tmp_path / "out.json")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"leank bench decode: WRONG RESULT: {wrong}\n"
    assert (tmp_path / "out.json").read_text() == json.dumps(
        as_json(fake_result()), indent=1
    ) + "\n"


def test_every_number_of_a_line_is_in_the_json():
    for line, told in zip(
        fake_result().tables[0].lines, as_json(fake_result())["tables"][0]["lines"], strict=True
    ):
        assert {field.name for field in dataclasses.fields(line)} <= set(told)


# ----------------------------------------------------------------------------------- its own truth


@pytest.mark.parametrize("length", [3, 20, 60])
def test_its_truth_is_the_rule(length, rng):
    torch = pytest.importorskip("torch")
    from leank.bench.truth import attend64

    keep, dim = random_keep(rng, 16, (0, 8, 16)), 16
    q, k, v = (rng.standard_normal((3 * r, n, dim)) for r, n in ((2, 1), (1, length), (1, length)))
    window = {"sink": 4, "recent": 6}
    got = attend64(*(torch.from_numpy(x) for x in (q[:, 0], k, v)), keep, **window)
    rule = {**window, "lo": 4, "n0": 0, "scale": dim**-0.5}
    truth, _ = attend(q, k, v, [length - 1], keep, **rule)
    np.testing.assert_allclose(got.numpy(), truth[:, 0], rtol=1e-12, atol=1e-13)
    dense = attend64(*(torch.from_numpy(x) for x in (q[:, 0], k, v)))
    truth, _ = attend(q, k, v, [length - 1], np.ones_like(keep), **rule)
    np.testing.assert_allclose(dense.numpy(), truth[:, 0], rtol=1e-12, atol=1e-13)


def test_its_bound_passes_roundings_and_finds_what_is_left_out():
    """The plain computation in the type stays inside; 300 of 40,000 tokens left out do not."""
    torch = pytest.importorskip("torch")
    from leank.bench.truth import attend64, error_bound, relative_error

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((4, 64), (1, 40_000, 64), (1, 40_000, 64))
    )
    truth, bound = attend64(q, k, v), error_bound(torch.bfloat16)
    logits = q.float() @ k[0].float().T / 8
    p = (logits - logits.amax(1, keepdim=True)).exp()
    plain = (p.bfloat16().float() @ v[0].float() / p.sum(1, keepdim=True)).bfloat16()
    assert relative_error(plain, truth) < bound / 2
    left_out = attend64(q, k[:, 300:], v[:, 300:])
    assert relative_error(left_out, truth) > 2 * bound
    assert np.isnan(relative_error(plain * torch.nan, truth))


# ----------------------------------------------------------------------------------------- mixed


def test_mixed_widths_need_the_bytes_of_equal_ones():
    pytest.importorskip("torch")
    pytest.importorskip("leank.cuda", reason="leank was built without CUDA")
    from leank.bench import details

    assert doctest.testmod(details).failed == 0
    for n_heads, head_dim in ((8, 128), (4, 128), (4, 64), (2, 96)):
        widths = details.mixed_widths(n_heads, head_dim)
        assert len(set(widths)) == n_heads and not any(n % 8 for n in widths)
        n_bytes = [
            profiles.needed_bytes(keep[0], 1, 5000, sink=128, recent=896)
            for keep in (
                profiles.random_keep([each], head_dim, seed=0)
                for each in (widths, [head_dim // 2] * n_heads)
            )
        ]
        assert n_bytes[0] == n_bytes[1]
    with pytest.raises(BenchError, match="mixed: expected a head dim .* got 128 and 16"):
        details.mixed_widths(16, 128)


def test_words_of_a_shape_are_those_of_its_option():
    assert parse_shape(str(Shape(8, 8192))) == Shape(8, 8192)
