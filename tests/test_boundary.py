"""The border between Python and C: what decode refuses and how it says so, threads, leaks."""

import gc
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from leank import _C, LayerCache, decode

from .boundary_calls import (
    DV,
    FORWARD,
    HKV,
    HQ,
    KEEP,
    LEARN,
    LEARN_INPUTS,
    OUT,
    REFUSED,
    SCORES,
    SINKS,
    B,
    D,
    good,
)
from .cache_tools import snapshot
from .conftest import DTYPES, draw, random_keep


@pytest.fixture
def cache(rng):
    cache = LayerCache(random_keep(rng, D, (0, 8, D)), n_rows=B, v_dim=DV, sink=4, recent=8)
    cache.append(draw(rng, "float32", B, HKV, 90, D), draw(rng, "float32", B, HKV, 90, DV))
    return cache


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


# ------------------------------------------------------------------------------- absurd sizes


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("n_columns", lambda cache: cache.crop(2**70)),
        ("n_columns", lambda cache: cache.crop(-(2**63) - 1)),
        ("n_columns", lambda cache: cache.expect_prompt(2**70)),
        ("row", lambda cache: cache.gather(2**70)),
        ("align", lambda cache: _C.check_mask(KEEP[None], 2**70)),
        ("align", lambda cache: _C.select_channels(SCORES.reshape(1, HKV, D), 0.5, 2**70)),
        ("sink", lambda cache: _C.learn_forward(*LEARN_INPUTS, **(LEARN | {"sink": 2**70}))),
        ("n_threads", lambda cache: _C.learn_forward(*LEARN_INPUTS, **LEARN, n_threads=2**70)),
        (
            "recent",
            lambda cache: _C.learn_backward(
                FORWARD[0], *FORWARD, *LEARN_INPUTS, **(LEARN | {"recent": 2**70})
            ),
        ),
    ],
)
def test_integers_of_more_than_64_bits(cache, name, call):
    before = snapshot(cache)
    message = rf"^{name}: expected less than 2\*\*60 in size, got -?\d+$"
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert snapshot(cache) == before


def absurd(*shape):
    """A view of the shape whose rows are all the same 16 numbers."""
    strides = (*[0] * (len(shape) - 1), 4)
    return np.lib.stride_tricks.as_strided(np.ones(shape[-1], np.float32), shape, strides)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan ends the process")
def test_views_larger_than_any_memory(cache):
    """A view costs nothing, so that B * H * T * D may be anything up to NumPy's own limit."""
    before, one = snapshot(cache), good(1)
    for T in (2**40, 2**50):
        k, v = absurd(B, HKV, T, D), absurd(B, HKV, T, DV)
        calls = {
            "append": lambda k=k, v=v: cache.append(k, v),
            "columns": lambda T=T, k=k, v=v: decode(cache, absurd(B, HQ, T, D), k, v),
            "heads": lambda T=T: decode(cache, absurd(B, HKV * T, 1, D), one["k"], one["v"]),
        }
        for name, call in calls.items():
            with pytest.raises((MemoryError, ValueError)):
                call()
            assert snapshot(cache) == before, name
