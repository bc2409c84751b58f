"""``leank bench learn`` on the CPU, on shapes as small as can be."""

import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from leank.bench import clock, learn  # noqa: E402
from leank.bench.lines import Shape  # noqa: E402
from leank.bench.work import learn_options  # noqa: E402

from .bench_tools import bench, found, one_line  # noqa: E402

WORDS = "--span", 8, "--q-heads", 4, "--heads", 2, "--head-dim", 16, "--recent", 9, "--sink", 3
FIELDS = {"span": 8, "q_heads": 4, "heads": 2, "head_dim": 16, "recent": 9, "sink": 3}
FIELDS |= {"dtype": "float32", "rounds": 1, "threads": None, "seed": 0}


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    monkeypatch.setattr(clock, "last_level_cache_bytes", lambda: 1 << 18)
    monkeypatch.setattr(learn, "product_tflop_s", lambda *args: 0.5)


def test_end_to_end(tmp_path, monkeypatch):
    extra = {"leank": 1 << 20, "eager": 3 << 20}
    monkeypatch.setattr(learn, "_extra_bytes", lambda name, *rest: extra[name])
    (table,), text = found("learn", tmp_path, *WORDS, "--shapes", "2x64", "--rounds", 2)
    assert 0 < table["error"] <= table["bound"] == 1e-5
    assert table["about"] == "T 8, Hq/Hkv 4/2, D 16"
    (line,) = table["lines"]
    assert line["shape"] == {"B": 2, "L": 64} and line["best"] == "eager"
    assert line["n_flop"] == 10 * 16 * 2 * 4 * 8 * (64 - 4)
    assert line["tflop_s"] == line["n_flop"] / line["us"]["median"] / 1e6
    assert line["of_product"] == line["tflop_s"] / 0.5
    assert line["extra_bytes"] == extra
    assert "checked: largest error" in text and "of matmul" in text and "extra MiB" in text


def test_needed_bytes_are_those_of_the_tensors(monkeypatch):
    """The forward reads the inputs and writes o; the backward reads them, o and its gradient."""
    options = learn_options("cpu", (), **FIELDS)
    inputs = learn._inputs(shape := Shape(3, 50), options)
    *tensors, _ = inputs  # alpha is the same for all tokens
    read = sum(x.nbytes for x in tensors)
    o, *gradients = learn._make_steps(shape, options)["leank"]()
    written = sum(x.nbytes for x in gradients[:-1])
    assert learn._needed_bytes(shape, options) == 2 * read + 3 * o.nbytes + written


@pytest.mark.skipif(not learn._STATUS.exists(), reason="needs Linux")
def test_extra_memory_is_measured_in_a_process_of_its_own():
    """Eager keeps its logits, more than one array of B x Hq x T x L float32 at once."""
    options = learn_options("cpu", (), **FIELDS | {"span": 64})
    n_bytes = learn._extra_bytes("eager", Shape(1, 16384), options, None)
    assert n_bytes > 2 * 4 * 4 * 64 * 16384


def test_without_the_systems_word_there_is_no_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(learn, "_STATUS", tmp_path / "none")
    (table,), text = found("learn", tmp_path, *WORDS, "--shapes", "1x30,1x8", "--rounds", 1)
    assert [line["extra_bytes"] for line in table["lines"]] == [{"leank": None, "eager": None}] * 2


def test_where_eager_has_no_room_leank_is_timed_alone(monkeypatch, tmp_path):
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(learn, "_eager", no_room)
    monkeypatch.setattr(learn, "_STATUS", tmp_path / "none")
    (table,), text = found("learn", tmp_path, *WORDS, "--shapes", "1x30", "--rounds", 1)
    (line,) = table["lines"]
    assert line["dense_us"] == {} and line["gain"] is None and table["error"] is None
    assert "not checked" in text
    assert "no eager at 1x30: CUDA out of memory. leank was not checked there." in text


@pytest.mark.parametrize("spoilt", [1.001, float("nan")])
def test_a_wrong_gradient_ends_it(spoilt, monkeypatch):
    grad = torch.autograd.grad
    calls = []

    def spoil(*args):
        *others, alpha = grad(*args)
        calls.append(0)
        return *others, alpha * (spoilt if len(calls) == 1 else 1)

    monkeypatch.setattr(torch.autograd, "grad", spoil)
    line = one_line(bench("learn", *WORDS, "--shapes", "1x64"), code=1)
    assert re.match(r"leank bench learn: WRONG RESULT: 1x64: expected an error of at most", line)


def test_defaults_are_those_of_the_device():
    nothing = dict.fromkeys(FIELDS) | {"span": 256, "sink": 64, "recent": 512}
    on_cpu = learn_options("cpu", (), **nothing | {"rounds": 7, "seed": 0})
    assert (on_cpu.q_heads, on_cpu.heads, on_cpu.head_dim, on_cpu.dtype) == (9, 3, 64, "float32")
    assert on_cpu.shapes == (Shape(1, 8192),)
    on_gpu = learn_options("cuda", (), **nothing | {"rounds": 7, "seed": 0, "heads": 4})
    assert (on_gpu.q_heads, on_gpu.heads, on_gpu.head_dim) == (32, 4, 128)
    assert on_gpu.shapes == (Shape(1, 65536), Shape(1, 131072)) and on_gpu.dtype == "bfloat16"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shapes", "1x100"], "shapes: expected at least the span's 256 tokens, got 1x100"),
        (["--shapes", "100"], "shapes: expected BxL as 8x8192, got '100'"),
        (["--q-heads", "8"], "q-heads: expected a multiple of 3, got 8"),
        (["--heads", "0"], "heads: expected at least 1, got 0"),
        (["--span", "0"], "span: expected at least 1, got 0"),
        (
            ["--device", "cuda", "--dtype", "float32"],
            "dtype: expected one of bfloat16, float16 on a GPU, got float32",
        ),
    ],
)
def test_mistakes_are_one_line(words, message):
    assert one_line(bench("learn", *words)) == f"leank bench learn: {message}"


def test_without_a_gpu_it_says_so(monkeypatch):
    pytest.importorskip("leank.cuda", reason="leank was built without CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = one_line(bench("learn", "--device", "cuda"))
    assert line == f"leank bench learn: needs an NVIDIA GPU; torch {torch.__version__} finds none"
