"""The border between Python and C: what decode refuses and how it says so, threads, leaks."""

import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from leank import _C, LayerCache, decode

from .cache_tools import snapshot
from .conftest import DTYPES, draw, random_keep

B, HKV, HQ, D, DV = 2, 3, 6, 16, 24


@pytest.fixture
def cache(rng):
    cache = LayerCache(random_keep(rng, D, (0, 8, D)), n_rows=B, v_dim=DV, sink=4, recent=8)
    cache.append(draw(rng, "float32", B, HKV, 90, D), draw(rng, "float32", B, HKV, 90, DV))
    return cache


def good(T=2):
    """Arguments of a call that succeeds."""
    return {
        "q": np.ones((B, HQ, T, D), np.float32),
        "k": np.ones((B, HKV, T, D), np.float32),
        "v": np.ones((B, HKV, T, DV), np.float32),
    }


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    return raw[1:].view(x.dtype).reshape(x.shape)


def gaps(x):
    return np.repeat(x, 2, axis=-1)[..., ::2]


def odd_strides(x):
    """Rows that are no whole number of elements apart."""
    raw = np.zeros((*x.shape[:-1], x.shape[-1] * 4 + 2), np.uint8)
    return np.ndarray(x.shape, x.dtype, raw, strides=(*raw.strides[:-1], 4))


def read_only(x):
    x.flags.writeable = False
    return x


ONES = good()
SINKS = np.zeros(HQ, np.float32)
OUT = np.zeros((B, HQ, 2, DV), np.float32)
REFUSED = [
    (TypeError, r"q: expected a NumPy array, got list", {"q": ONES["q"].tolist()}),
    (TypeError, r"q: expected a NumPy array, got NoneType", {"q": None}),
    (TypeError, r"k: expected a NumPy array, got memoryview", {"k": memoryview(ONES["k"])}),
    (TypeError, r"q: expected dtype float32, got float64", {"q": ONES["q"].astype(float)}),
    (TypeError, r"k: expected dtype float32, got uint16", {"k": ONES["k"].astype(np.uint16)}),
    (TypeError, r"v: expected dtype float32, got >f4", {"v": ONES["v"].astype(">f4")}),
    (TypeError, r"out: expected dtype float32, got float16", {"out": OUT.astype(np.float16)}),
    (ValueError, r"q: expected \(2, any, any, 16\), got \(2, 6, 2, 8\)", {"q": ONES["q"][..., :8]}),
    (ValueError, r"q: expected \(2, any, any, 16\), got \(1, 6, 2, 16\)", {"q": ONES["q"][:1]}),
    (ValueError, r"q: expected \(2, any, any, 16\), got \(6, 2, 16\)", {"q": ONES["q"][0]}),
    (ValueError, r"q: expected a multiple of 3 heads, got 4", {"q": ONES["q"][:, :4]}),
    (ValueError, r"q: expected a multiple of 3 heads, got 0", {"q": ONES["q"][:, :0]}),
    (ValueError, r"k: expected \(2, 3, 2, 16\), got \(2, 3, 1, 16\)", {"k": ONES["k"][:, :, :1]}),
    (ValueError, r"k: expected \(2, 3, 2, 16\), got \(2, 6, 2, 16\)", {"k": ONES["q"]}),
    (ValueError, r"v: expected \(2, 3, 2, 24\), got \(2, 3, 2, 16\)", {"v": ONES["k"]}),
    (ValueError, r"out: expected \(2, 6, 2, 24\), got \(2, 6, 2, 16\)", {"out": ONES["q"].copy()}),
    (ValueError, r"q: expected .*aligned.*, got", {"q": misaligned(ONES["q"])}),
    (ValueError, r"k: expected .*contiguous.*, got", {"k": gaps(ONES["k"])}),
    (ValueError, r"v: expected .*contiguous.*, got", {"v": odd_strides(ONES["v"])}),
    (ValueError, r"out: expected .*contiguous.*, got", {"out": gaps(OUT)}),
    (
        ValueError,
        r"out: expected a writable array, got a read-only",
        {"out": read_only(OUT.copy())},
    ),
    (ValueError, r"valid: expected \(2, 2\), got \(2, 3\)", {"valid": np.ones((2, 3), bool)}),
    (ValueError, r"valid: expected .*contiguous.*, got", {"valid": np.ones((2, 4), bool)[:, ::2]}),
    (TypeError, r"valid: expected dtype bool, got int64", {"valid": np.ones((2, 2), int)}),
    (ValueError, r"scale: expected a finite number, got nan", {"scale": float("nan")}),
    (ValueError, r"scale: expected a finite number, got inf", {"scale": float("inf")}),
    (ValueError, r"scale: expected", {"scale": 3e38}),
    (ValueError, r"scale: expected", {"scale": -3e38}),
    (TypeError, r"real number", {"scale": "1"}),
    (ValueError, r"softcap: expected 0 or a positive finite .*, got -1.0", {"softcap": -1.0}),
    (ValueError, r"softcap: expected .*, got nan", {"softcap": float("nan")}),
    (ValueError, r"softcap: expected .*, got inf", {"softcap": float("inf")}),
    (ValueError, r"softcap: expected .*, got -inf", {"softcap": -float("inf")}),
    (ValueError, r"softcap: expected .*, got 1e\+39", {"softcap": 1e39}),
    (ValueError, r"softcap: expected .*, got 1e-60", {"softcap": 1e-60}),
    (TypeError, r"real number", {"softcap": "1"}),
    (TypeError, r"sinks: expected a NumPy array, got list", {"sinks": SINKS.tolist()}),
    (TypeError, r"sinks: expected dtype float32, got float64", {"sinks": SINKS.astype(float)}),
    (ValueError, r"sinks: expected \(6,\), got \(3,\)", {"sinks": SINKS[:3]}),
    (ValueError, r"sinks: expected \(6,\), got \(6, 1\)", {"sinks": SINKS[:, None]}),
    (
        ValueError,
        r"sinks: expected \(6,\), got \(\)",
        {"sinks": SINKS.sum(keepdims=True)[0:1].reshape(())},
    ),
    (
        ValueError,
        r"sinks: expected .*contiguous.*, got",
        {"sinks": np.zeros(2 * HQ, np.float32)[::2]},
    ),
    (ValueError, r"sinks: expected .*aligned.*, got", {"sinks": misaligned(SINKS)}),
    (TypeError, r"k, v: expected both or neither, got one", {"v": None}),
    (TypeError, r"valid: expected only .* k and v", {"k": None, "v": None, "valid": OUT}),
    (ValueError, r"q: expected one column .*, got 2 columns", {"k": None, "v": None}),
    (ValueError, r"q: expected at least one column, got 0", {"q": ONES["q"][:, :, :0]}),
    (TypeError, r"n_threads|integer", {"n_threads": 1.5}),
    (TypeError, r"keyword", {"threads": 1}),
]


@pytest.mark.parametrize(("error", "message", "change"), REFUSED)
def test_decode_refuses(cache, error, message, change):
    before = snapshot(cache)
    arguments = good() | change
    with pytest.raises(error, match=message):
        decode(cache, **arguments)
    assert snapshot(cache) == before
    assert decode(cache, **good()).shape == OUT.shape


def test_decode_refuses_other_objects(rng, cache):
    for other in (None, object(), cache.keep):
        with pytest.raises(TypeError, match="LayerCache"):
            decode(other, **good())


def test_nothing_to_attend(cache):
    cache.reset()
    with pytest.raises(ValueError, match=r"q: expected one column and a cache that has it"):
        decode(cache, good(1)["q"])


def test_large_scale_does_not_become_infinite(cache):
    """A float64 that is finite but no float32 is refused, not turned into infinity."""
    with pytest.raises(ValueError, match="scale: expected"):
        decode(cache, **good(), scale=1e300)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_out_may_not_share_memory_with_inputs(cache, name):
    """Inputs are read while out is written: one element in common is too much."""
    arguments, buffer, at = good() | {"sinks": np.ones_like(SINKS)}, np.ones(2000, np.float32), 700
    shape = arguments[name].shape
    n_input, n_out = arguments[name].size, OUT.size
    given = buffer[at : at + n_input].reshape(shape)
    before = snapshot(cache)
    backwards = given if name == "sinks" else given[::-1, ::-1, ::-1]
    for view in (given, backwards):
        for begin in (at, at + 1, at - n_out + 1, at + n_input - 1):
            out = buffer[begin : begin + n_out].reshape(OUT.shape)
            with pytest.raises(ValueError, match=f"out: expected .*, got some that {name} uses"):
                decode(cache, **(arguments | {name: view}), out=out)
    assert (buffer == 1).all()
    assert snapshot(cache) == before
    expected = decode(cache.copy(), **arguments)
    for begin in (at - n_out, at + n_input):
        out = buffer[begin : begin + n_out].reshape(OUT.shape)
        decode(cache.copy(), **(arguments | {name: given}), out=out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_out_needs_elements_of_its_own(cache, axis):
    before, memory = snapshot(cache), OUT.copy()
    strides = list(memory.strides)
    strides[axis] = 0
    out = np.lib.stride_tricks.as_strided(memory, OUT.shape, strides)
    with pytest.raises(ValueError, match=f"out: expected .*, got stride 0 on axis {axis}"):
        decode(cache, **good(), out=out)
    assert not memory.any()
    assert snapshot(cache) == before


def test_integers_of_either_name(cache):
    """NumPy has two types of 64-bit integers, and which one is int64 depends on the platform."""
    for dtype in (np.longlong, np.int64, np.int_):
        copy = cache.copy()
        copy.select(np.array([1, 0, 1], dtype))
        assert copy.n_rows == 3
        window = {"sink": cache.sink, "recent": cache.recent}
        predicted = _C.predict_memory(cache.keep, np.array([90, 90], dtype), v_dim=DV, **window)
        assert predicted["total_bytes"] == cache.memory()["total_bytes"]


def test_half_dtypes_do_not_mix(rng):
    """The 16-bit dtypes have one size; each takes only its own arrays."""
    x = {dtype: draw(rng, dtype, 1, 1, 1, 8) for dtype in DTYPES}
    for dtype, right in x.items():
        cache = LayerCache(np.ones((1, 8), bool), n_rows=1, sink=0, recent=1, dtype=dtype)
        assert decode(cache, right, right, right).dtype == right.dtype
        for other, wrong in x.items():
            if other != dtype:
                with pytest.raises(TypeError, match=f"q: expected dtype {right.dtype}"):
                    decode(cache, wrong, right, right)


def test_references_are_balanced(cache):
    arrays = [*good().values(), OUT, np.ones((B, 2), bool), np.arange(B), SINKS]
    q, k, v, out, valid, rows, sinks = arrays

    def use():
        cache.append(k, v, valid)
        decode(cache, q, k, v, valid=valid, sinks=sinks, softcap=2.0, out=out)
        cache.select(rows)
        for _ in range(2):
            with pytest.raises(ValueError):
                decode(cache, q, k, v[:1], out=out)
            with pytest.raises(ValueError):
                decode(cache, q, k, v, sinks=sinks[:1])
            with pytest.raises(ValueError):
                cache.select(rows[:0])

    def counts():
        gc.collect()  # exceptions and their frames are cycles that hold arguments
        return [sys.getrefcount(x) for x in [*arrays, cache, LayerCache, None]]

    use()
    before = counts()
    for _ in range(50):
        use()
    after = counts()
    # None is everybody's, so it may drift a little; 50 rounds of a leak would show.
    assert after[:-1] == before[:-1]
    assert abs(after[-1] - before[-1]) < 25


def test_results_are_owned_by_the_caller(cache):
    o = decode(cache, **good())
    k, v = cache.gather(0)
    assert all(x.flags.owndata and x.flags.writeable for x in (o, k, v, cache.real, cache.lengths))
    before = snapshot(cache)
    k[...] = 7
    cache.real[...] = False
    cache.lengths[...] = 0
    assert snapshot(cache) == before


# ------------------------------------------------------------------------------------ threads


def test_copies_may_be_used_from_several_threads(rng, cache):
    calls = [
        [draw(rng, "float32", B, n, 1, d) for n, d in ((HQ, D), (HKV, D), (HKV, DV))]
        for _ in range(120)
    ]

    def run(copy, n):
        for i, (q, k, v) in enumerate(calls):
            o = decode(copy, q, k, v)
            if i % 10 == n:
                # Back into pages that all threads share.
                copy.crop(85)
                copy = copy.copy()
        return o.tobytes(), snapshot(copy)[:3]

    expected = [run(cache.copy(), n) for n in range(4)]
    before = snapshot(cache)
    with ThreadPoolExecutor(4) as pool:
        copies = [cache.copy() for _ in range(4)]
        assert list(pool.map(run, copies, range(4))) == expected
    del copies
    gc.collect()
    assert snapshot(cache) == before


def test_one_cache_from_two_threads(rng):
    """A call on a cache that is in use raises, and what got through is whole."""
    cache = LayerCache(random_keep(rng, 64, (0, 16)), n_rows=1, sink=4, recent=64)
    shape = (1, 2, 4000, 64)
    cache.append(draw(rng, "float32", *shape), draw(rng, "float32", *shape))
    x = draw(rng, "float32", 1, 2, 1, 64)
    done, refused, start = [0, 0], [0, 0], threading.Barrier(2)

    def run(i):
        start.wait()
        for _ in range(300):
            try:
                decode(cache, x, x, x, n_threads=1)
                done[i] += 1
            except RuntimeError as error:
                assert "cache: in use by another thread" in str(error)
                refused[i] += 1

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert sum(done) + sum(refused) == 600
    assert cache.lengths.tolist() == [4000 + sum(done)]
    k, v = cache.gather(0)
    for tail in (k[:, -min(sum(done), 64) :], v[:, -min(sum(done), 64) :]):
        np.testing.assert_array_equal(tail, np.broadcast_to(x[0], tail.shape))


def test_the_gil_is_released(rng):
    """While a long call runs in one thread, another one that asks for the cache is refused."""
    cache = LayerCache(random_keep(rng, 128, (64,) * 4), n_rows=1, sink=4, recent=64)
    shape = (1, 4, 3000, 128)
    k, v = draw(rng, "float32", *shape), draw(rng, "float32", *shape)
    q = draw(rng, "float32", 1, 8, 3000, 128)
    refused = dict.fromkeys(["n_rows", "n_columns", "lengths", "prompt_lengths", "lo", "real"], 0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decode, cache, q, k, v)
        while not running.done():
            for name in refused:
                try:
                    getattr(cache, name)
                except RuntimeError as error:
                    assert "cache: in use by another thread" in str(error)
                    refused[name] += 1
        running.result()
    assert all(refused.values()), refused
    assert cache.memory()["n_pages"] == 47


# ------------------------------------------------------------------------------------ leaks


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan delays freeing")
def test_nothing_leaks(rng):
    keep = random_keep(rng, 64, (0, 8, 64))
    k, v = (draw(rng, "float32", 2, 3, 130, 64) for _ in "kv")
    q = draw(rng, "float32", 2, 6, 130, 64)
    bad = k[..., :8]

    def one_round(i):
        limit = {"max_tokens": 200, "max_call": 5} if i % 2 else {}
        cache = LayerCache(keep, n_rows=2, sink=4, recent=16, **limit)
        decode(cache, q[:, :, :20], k[:, :, :20], v[:, :, :20])
        cache.append(k[:, :, :5], v[:, :, :5])
        other = cache.copy()
        other.crop(10)
        other.select(np.array([1, 1, 0]))
        other.select(np.array([0, 2]))
        other.append(k[:, :, :3], v[:, :, :3])
        cache.gather(0)
        cache.memory()
        _C._fail_allocation(1 + i % 12)
        try:
            other.copy().append(k[:, :, :5], v[:, :, :5])
        except MemoryError:
            pass
        _C._fail_allocation(0)
        with pytest.raises(ValueError):
            cache.append(bad, v)
        cache.append(k[:, :, :2], v[:, :, :2])

    for i in range(300):
        one_round(i)
    before = resident_bytes()
    for i in range(2000):
        one_round(i)
    # One leaked page a round would be 100 MB, a leaked row table 0.2 MB.
    assert resident_bytes() - before < 3 << 20
