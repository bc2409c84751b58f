"""``leank bench`` decode and append on the CPU, on masks as small as can be."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402

import leank  # noqa: E402
from leank import ChannelMask  # noqa: E402
from leank.bench import clock, decode_cpu, machine  # noqa: E402
from leank.bench.lines import Shape, Timing  # noqa: E402
from leank.bench.profiles import dense_bytes, needed_bytes  # noqa: E402
from leank.bench.work import Options, Work  # noqa: E402

from .bench_tools import bench, found, one_line  # noqa: E402
from .conftest import random_keep  # noqa: E402

WINDOW = {"sink": 4, "recent": 20}
WORDS = "--q-heads", 4, "--sink", 4, "--recent", 20, "--rounds", 2


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    for module in (decode_cpu, clock):
        monkeypatch.setattr(module, "last_level_cache_bytes", lambda: 1 << 18)


@pytest.fixture
def keep():
    rng = np.random.default_rng(0)
    return np.stack([random_keep(rng, 16, widths) for widths in ((8, 0), (16, 8))])


@pytest.fixture
def mask(keep, tmp_path):
    ChannelMask(keep).save(tmp_path / "mask.safetensors")
    return "--mask", tmp_path / "mask.safetensors"


def pruned(keep, shape, **fields):
    options = Options(**{**WINDOW, "dtype": "float32", **fields})
    return decode_cpu._Pruned(Work("mask", keep, 4, (shape,)), shape, options, 1)


# ------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("dtype, n", [("float32", 4), ("bfloat16", 2)])
def test_decode(dtype, n, mask, keep, tmp_path):
    words = *mask, *WORDS, "--dtype", dtype, "--shapes", "1x300,2x64,1x1"
    (table,), text = found("decode", tmp_path, *words)
    assert 0 < table["error"] <= table["bound"] and f"bound {table['bound']:.1e}" in text
    assert "checked: largest error" in text and "2 layers, Hq/Hkv 4/2, D 16" in text
    for line, shape in zip(table["lines"], ((1, 300), (2, 64), (1, 1)), strict=True):
        assert line["shape"] == dict(zip("BL", shape, strict=True))
        at = {**WINDOW, "elem_bytes": n}
        assert line["needed_bytes"] == np.mean([needed_bytes(x, *shape, **at) for x in keep])
        assert line["dense_bytes"] == dense_bytes(keep[0], *shape, elem_bytes=n)
        assert line["dense_us"].keys() == {"gqa", "folded"}
        us = line["us"]
        assert 0 < us["low"] <= us["median"] <= us["high"] and line["peak_gb_s"] > 0
        assert line["gain"] == line["dense_us"][line["best"]]["median"] / us["median"]
        assert line["share"] == pytest.approx(line["bound_us"] / us["median"])


def test_append(mask, tmp_path):
    words = *mask, *WORDS, "--dtype", "bfloat16", "--shapes", "1x300,3x63"
    (table,), text = found("append", tmp_path, *words)
    assert [line["kind"] for line in table["lines"]] == ["AppendLine"] * 2
    for line, n_rows in zip(table["lines"], (1, 3), strict=True):
        assert line["needed_bytes"] == n_rows * 2 * 2 * 16 * 2  # K and V, Hkv, D, bytes
        assert line["dense_us"].keys() == {"index_copy_", "cat"}
        assert line["added"] == line["us"]["median"] / line["attending_us"]["median"]
    assert "adds" in text and "index_copy_" in text


def test_threads_are_those_asked_for_and_come_back(mask, monkeypatch):
    before, seen = torch.get_num_threads(), []
    decode = leank.decode
    monkeypatch.setattr(
        leank, "decode", lambda *a, **k: (seen.append(k["n_threads"]), decode(*a, **k))[1]
    )
    result = bench("decode", *mask, *WORDS, "--shapes", "1x30", "--threads", before + 1)
    assert result.exit_code == 0 and set(seen) == {before + 1}
    assert f"{before + 1} of " in result.stdout and torch.get_num_threads() == before


def test_a_wrong_result_ends_it(mask, monkeypatch):
    decode = leank.decode
    monkeypatch.setattr(leank, "decode", lambda *a, **k: decode(*a, **k) * np.float32(1.05))
    words = *mask, *WORDS, "--dtype", "float32", "--shapes", "1x300"
    line = one_line(bench("decode", *words), code=1)
    assert line.startswith(
        "leank bench decode: WRONG RESULT: mask.safetensors, layer 0, row 0: expected an error "
    )


def test_a_shape_that_does_not_fit_is_reported(mask, monkeypatch):
    def no_room(rng, shape, dtype):
        if shape[0] == 7:
            raise MemoryError
        return random_array(rng, shape, dtype)

    random_array = decode_cpu.random_array
    monkeypatch.setattr(decode_cpu, "random_array", no_room)
    result = bench("decode", *mask, *WORDS, "--shapes", "7x30,1x30")
    assert result.exit_code == 0 and "│ 1x30 " in result.stdout
    assert "no leank at 7x30: out of memory" in result.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--png", "x.pdf"], "png: expected a name that ends in .png, got x.pdf"),
        (["--png", "none/x.png"], "png: none: no such folder"),
        (["--json", "none/x.json"], "json: none: no such folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused_at_once(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("decode", "append", "learn", "generate"):
        assert one_line(bench(command, *words)) == f"leank bench {command}: {message}"


@pytest.mark.parametrize("missing, extra", [("matplotlib", "learn"), ("torch", "hf")])
def test_without_a_package_it_says_so(missing, extra):
    code = f"import sys; sys.modules[{missing!r}] = None; from leank.__main__ import main; main()"
    for command in ("append", "learn", "generate"):
        words = [sys.executable, "-c", code, "bench", command, "--png", "x.png"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        said = f"leank bench {command}: needs {missing}: pip install 'leank[{extra}]'\n"
        assert done.stderr == said


@pytest.mark.parametrize("command", ["decode", "append", "learn", "generate"])
def test_help_fits_80_columns(command):
    text = bench(command, "--help").stdout
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for option in ("--device", "--rounds", "--seed", "--threads", "--json", "--png"):
        assert option in text


# ----------------------------------------------------------------------------- what is measured


def test_peers_attend_to_the_same(keep, monkeypatch):
    """Both arrangements give what LeanK gives with a mask that keeps everything."""
    outs = []
    monkeypatch.setattr(decode_cpu, "sdpa", lambda *a, **k: outs.append(sdpa(*a, **k)))
    everything = pruned(np.ones_like(keep), Shape(2, 130))
    dense = decode_cpu._Dense(everything, 1)
    assert dense.gqa(0) == dense.folded(0) == 2  # layers that they walk over
    truth = leank.decode(everything.caches[0], everything.q)
    for out in outs:
        np.testing.assert_allclose(out.numpy().reshape(truth.shape), truth, rtol=1e-4, atol=1e-5)
    assert len(outs) == 4


def test_appending_stores_one_token_per_call(keep):
    at = pruned(keep, Shape(2, 130))
    n_layers = len(keep)
    assert at.check("mask") < 1e-4  # leaves 131 tokens
    lengths = [cache.lengths.tolist() for cache in at.caches]
    assert lengths == [[131, 131]] * n_layers
    assert at.append(0) > 0
    assert [cache.lengths.tolist() for cache in at.caches] == [[132, 132]] * n_layers
    assert at.append_to_new_page(0) > 0  # the third page starts at 128
    assert [cache.lengths.tolist() for cache in at.caches] == [[129, 129]] * n_layers
    at.attend(0)
    assert [cache.lengths.tolist() for cache in at.caches] == [[129, 129]] * n_layers


def test_dense_caches_store_the_token(keep):
    at = pruned(keep, Shape(2, 9))
    dense = decode_cpu._Dense(at, 1)
    assert dense.index_copy(0) == dense.cat(0) == 2
    for pair in dense._pairs:
        for x, new, old in zip(pair, at.new, (at.k, at.v), strict=True):
            np.testing.assert_array_equal(x[:, :, -1:].numpy(), new)
            np.testing.assert_array_equal(x[:, :, :-1].numpy(), old[:, :, :-1])


def test_times_are_medians_of_the_rounds_that_count():
    """Floats are seconds per call; ints are calls in the time that passed."""
    seconds = iter([9.0, 9.0, 3.0, 1.0, 2.0])
    calls = []
    times = clock.alternate(
        {"given": lambda i: next(seconds), "taken": lambda i: calls.append(i) or 2}, 3
    )
    assert times["given"] == Timing(2e6, 1e6, 3e6) and calls == [0, 1, 2, 3, 4]
    assert 0 < times["taken"].low <= times["taken"].median <= times["taken"].high


def test_means_of_times():
    a, b = Timing(4.0, 2.0, 8.0), Timing(2.0, 1.0, 3.0)
    assert Timing.mean([a, b]) == Timing(3.0, 1.5, 5.5)
    assert Timing.mean([a, b], [3, 1]) == Timing(3.5, 1.75, 6.75)
    assert a.over(2) == Timing(2.0, 1.0, 4.0)


def test_the_header_names_what_numbers_depend_on(monkeypatch, tmp_path):
    facts = machine.facts("cpu", 7, dtype="float32")
    assert facts["torch"] == torch.__version__ and facts["seed"] == 7
    assert leank.capabilities()["isa"] in facts["variant"] and facts["dtype"] == "float32"
    assert leank.__version__ in facts["leank"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    """Not even that of the project in whose folder it was installed."""
    monkeypatch.setattr(machine, "_PACKAGE", tmp_path / "venv" / "leank")
    (tmp_path / "venv" / "leank").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert machine.commit() == "unknown"
