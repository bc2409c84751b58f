"""``leank bench generate`` on the CPU, on a model as small as can be."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import leank  # noqa: E402
from leank.bench import clock, generate, random_models  # noqa: E402
from leank.bench.lines import Case  # noqa: E402
from leank.bench.profiles import needed_bytes  # noqa: E402
from leank.bench.work import generate_options  # noqa: E402

from .bench_tools import bench, found, one_line  # noqa: E402

WINDOW = {"sink": 2, "recent": 6}
WORDS = "--sink", 2, "--recent", 6, "--rounds", 1
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = random_models.SHAPES["small"] | SIZES | {"num_attention_heads": 8, "head_dim": 16}
    monkeypatch.setitem(random_models.SHAPES, "small", sizes)
    monkeypatch.setattr(clock, "last_level_cache_bytes", lambda: 1 << 18)


def model_and_bytes():
    """Return the tiny model, and the bytes of its weights but the embedding."""
    at = torch.device("cpu"), torch.float32
    model = random_models.draw_model("small", 100, 0, *at)
    n = sum(x.nbytes for x in model.parameters()) - model.model.embed_tokens.weight.nbytes
    return model, n


def test_filled_caches(tmp_path):
    tables, text = found("generate", tmp_path, *WORDS, "--cases", "1x70x4,3x40x2")
    assert [table["name"] for table in tables] == ["1x70x4", "3x40x2"]
    model, n_weights = model_and_bytes()
    keep = generate.keep_for(model.config, 0)
    assert keep.shape == (2, 8, 16) and 0 < keep.mean() < 1
    for table, (n_rows, length) in zip(tables, ((1, 72), (3, 41)), strict=True):
        assert 0 <= table["error"] <= table["bound"]
        (line,) = table["lines"]
        assert line["dense_us"].keys() == {"dynamic", "static"}
        assert line["own_us"].keys() == line["own_bytes"].keys() == {"pages"}
        needed = [needed_bytes(x, n_rows, length, **WINDOW, elem_bytes=4) for x in keep]
        assert line["needed_bytes"] == n_weights + sum(needed)
        all_kept = n_weights + 4 * 2 * n_rows * length * keep.size
        assert line["dense_bytes"] == line["own_bytes"]["pages"] == all_kept
        assert line["first_s"] == {} and line["peak_memory"] == {}
        assert line["cache_bytes"]["static"] == line["dense_cache_bytes"]
        assert line["cache_share"] == line["cache_bytes"]["leank"] / line["dense_cache_bytes"]
        us = line["us"]["median"]
        assert line["pages_gain"] == line["own_us"]["pages"]["median"] / us
        assert line["gain"] == line["dense_us"][line["best"]]["median"] / us
    assert "against pages" in text and "first token" not in text


@pytest.mark.parametrize("chunk", [(), ("--chunk", 16)], ids=["at once", "in chunks"])
def test_prompts_that_are_read(chunk, tmp_path):
    words = *WORDS, "--cases", "1x30x2", "--prompt", "--contenders", "leank,eager,static", *chunk
    (table,), text = found("generate", tmp_path, *words)
    (line,) = table["lines"]
    assert line["first_s"].keys() == {"static", "leank", "eager"}
    assert all(seconds > 0 for seconds in line["first_s"].values())
    assert 0 <= table["error"] <= table["bound"]  # of leank and eager
    assert ("Prompts were read 16 columns at a time." in " ".join(text.split())) == bool(chunk)
    assert "first token s" in text and "against static" in text and "against pages" not in text


def test_without_a_dense_contender_it_says_that_nothing_was_checked(tmp_path):
    words = *WORDS, "--cases", "1x30x2", "--contenders", "leank"
    (table,), text = found("generate", tmp_path, *words)
    assert table["error"] is None and "not checked: there was nothing to compare with" in text
    assert table["lines"][0]["gain"] is None and "against" not in text.split("KV")[0]


def test_pages_that_do_not_keep_everything_end_it(monkeypatch):
    masks = generate._masks

    def pruned(model, options):
        found = masks(model, options)
        return found | {"pages": found["leank"]}

    monkeypatch.setattr(generate, "_masks", pruned)
    line = one_line_of_error(bench("generate", *WORDS, "--cases", "1x70x2"))
    assert line.startswith(
        "leank bench generate: WRONG RESULT: 1x70x2 pages: expected first logits"
    )


def one_line_of_error(result):
    """Return the last line, after those of contenders that were measured."""
    assert result.exit_code == 1 and result.stdout == "", result.output
    return result.stderr.splitlines()[-1]


def test_a_contender_without_room_is_reported(monkeypatch):
    class Contender(generate._Contender):
        def _ready(self):
            if self._name == "pages":
                raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
            return super()._ready()

    monkeypatch.setattr(generate, "_Contender", Contender)
    result = bench("generate", *WORDS, "--cases", "1x30x2")
    assert result.exit_code == 0, result.output
    assert "no pages at 1x30x2: CUDA out of memory.\n" in result.stdout.replace(" \n", "\n")
    assert "leank " in result.stdout and "│ pages" not in result.stdout


def test_the_model_is_patched_only_while_ours_run():
    options = options_of("cpu", cases=("1x30x2",))
    model, _ = model_and_bytes()
    case = generate._Case(Case(1, 30, 2), model, generate._masks(model, options), options, print)
    for name in ("leank", "dynamic"):
        measured, logits = case._measure(name)
        assert (measured.cache_bytes is None) == (name == "dynamic")
        assert logits.shape == (1, 50)
    with leank.patch(model, case._masks["pages"]):  # raises where one is there already
        pass


@pytest.mark.parametrize("length", [1, 5, 1030])
def test_caches_are_filled(length):
    model, _ = model_and_bytes()
    mask = leank.ChannelMask(np.ones((2, 8, 16), bool), **WINDOW)
    dense = transformers.DynamicCache(config=model.config)
    generate.fill(dense, model, 2, length)
    with leank.patch(model, mask):
        pages = leank.make_cache(model, max_cache_len=length + 3)
        generate.fill(pages, model, 2, length)
        assert pages.get_seq_length() == dense.get_seq_length() == length
        stored = pages.memory()["total_bytes"]
    assert stored >= 2 * 2 * 2 * 8 * 16 * 4 * length


# --------------------------------------------------------------------------------- what it is asked


def options_of(device, **fields):
    nothing = dict.fromkeys(("shape", "dtype", "threads", "chunk"))
    given = {"cases": (), "contenders": (), "prompt": False, "rounds": 1, "seed": 0, **WINDOW}
    return generate_options(device, **nothing | given | fields)


def test_defaults_are_those_of_the_device():
    on_cpu, on_gpu = options_of("cpu"), options_of("cuda")
    assert (on_cpu.shape, on_cpu.dtype, on_cpu.cases) == ("small", "float32", (Case(1, 8192, 8),))
    assert (on_gpu.shape, on_gpu.dtype) == ("8b", "bfloat16")
    assert " ".join(map(str, on_gpu.cases)) == "16x32768x128 52x4096x128 1x4096x256 1x32768x256"
    assert on_gpu.contenders == ("dynamic", "eager", "static", "pages", "leank")
    assert options_of("cpu", contenders=("leank", "static")).contenders == ("static", "leank")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--cases", "1x2"], "cases: expected BxLxNEW as 16x32768x128, got '1x2'"),
        (["--cases", "1x2x1"], "cases: expected at least 2 new tokens, got 1x2x1"),
        (
            ["--contenders", "leank,flash"],
            "contenders: expected some of dynamic, eager, static, pages, leank, got 'flash'",
        ),
        (["--contenders", "static"], "contenders: expected leank among them, got static"),
        (["--chunk", "16"], "chunk: expected none without --prompt, got 16"),
        (["--chunk", "0", "--prompt"], "chunk: expected at least 1, got 0"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
        (
            ["--device", "cuda", "--dtype", "float32"],
            "dtype: expected one of bfloat16, float16 on a GPU, got float32",
        ),
    ],
)
def test_mistakes_are_one_line(words, message):
    assert one_line(bench("generate", *words)) == f"leank bench generate: {message}"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = one_line(bench("generate", "--device", "cuda"))
    assert line.startswith("leank bench generate: needs an NVIDIA GPU; torch ")
