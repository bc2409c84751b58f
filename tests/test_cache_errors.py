"""leank.LayerCache refuses, reaches a limit, or runs out of memory: the cache is as it was."""

import pickle

import numpy as np
import pytest

from leank import _C, LayerCache, decode

from .cache_tools import feed, make, snapshot, span
from .conftest import draw, left_padded


def test_limits(rng):
    cache = make(rng, 2, max_tokens=200, max_call=2)
    feed(rng, cache, (150, 10))
    feed(rng, cache, (2, 2))
    before = snapshot(cache)
    for counts, q_columns in [((3, 0), 3), ((0, 3), 3), ((49, 0), 49)]:
        with pytest.raises(ValueError, match=r"append: .*max_tokens=200.*max_call"):
            feed(rng, cache, counts)
        k, v = span(rng, cache, q_columns)
        with pytest.raises(ValueError, match=r"decode: .*max_tokens=200.*max_call"):
            decode(
                cache, draw(rng, "float32", 2, 4, q_columns, 40), k, v, valid=left_padded(counts)
            )
    assert snapshot(cache) == before
    for _ in range(24):
        feed(rng, cache, (2, 1))
    with pytest.raises(ValueError, match=r"append: .*max_tokens=200"):
        feed(rng, cache, (1, 0))
    feed(rng, cache, (0, 1))
    cache.crop(100)
    feed(rng, cache, (2, 2))


def test_reserved_caches_are_not_held(rng):
    cache = make(rng, 2, max_tokens=200, max_call=2)
    with pytest.raises(ValueError, match="hold: expected a cache that grows, got .*max_tokens=200"):
        cache.hold(True)


def test_a_refused_call_changes_nothing(rng):
    cache = make(rng, 2)
    feed(rng, cache, (100, 3))
    k, v = span(rng, cache, 3)
    before = snapshot(cache)
    for error, message, call in [
        (ValueError, r"k: expected \(2, 4, any, 40\), got \(1, 4, 3, 40\)", (k[:1], v)),
        (ValueError, r"v: expected \(2, 4, 3, 40\), got \(2, 4, 2, 40\)", (k, v[:, :, :2])),
        (ValueError, r"v: expected \(2, 4, 3, 40\), got \(2, 3, 3, 40\)", (k, v[:, :3])),
        (ValueError, r"valid: expected \(2, 3\), got \(2, 2\)", (k, v, np.ones((2, 2), bool))),
        (TypeError, r"valid: expected dtype bool, got uint8", (k, v, np.ones((2, 3), np.uint8))),
        (TypeError, r"k: expected dtype float32, got float64", (k.astype(float), v)),
        (TypeError, r"v: expected dtype float32, got float16", (k, v.astype(np.float16))),
    ]:
        with pytest.raises(error, match=message):
            cache.append(*call)
    for error, message, method, arg in [
        (ValueError, r"n_columns: expected 0 to 100, got 101", "crop", 101),
        (ValueError, r"n_columns: expected 0 to 100, got -1", "crop", -1),
        (ValueError, r"rows: expected indices 0 to 1, got", "select", np.array([0, 2])),
        (ValueError, r"rows: expected indices 0 to 1, got", "select", np.array([-1])),
        (ValueError, r"rows: expected at least one row, got 0", "select", np.array([], np.int64)),
        (TypeError, r"rows: expected dtype int64, got int32", "select", np.array([0], np.int32)),
        (IndexError, r"row: expected 0 to 1, got 2", "gather", 2),
        (IndexError, r"row: expected 0 to 1, got -1", "gather", -1),
        (RuntimeError, r"expect_prompt: expected an empty cache", "expect_prompt", 3),
    ]:
        with pytest.raises(error, match=message):
            getattr(cache, method)(arg)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(cache)
    assert snapshot(cache) == before


def every_failure(base, operation):
    """Let each allocation of an operation fail in turn, each time on a copy of `base`.

    Returns how many allocations there were. The copies share pages with `base`, which must stay as
    it was, with slabs that hold nothing besides.
    """
    before = snapshot(base)
    for n in range(1, 200):
        cache = base.copy()
        state = snapshot(cache)
        _C._fail_allocation(n)
        try:
            operation(cache)
        except MemoryError:
            _C._fail_allocation(0)
            assert snapshot(cache) == state, f"allocation {n}"
        else:
            _C._fail_allocation(0)
            del cache
            assert snapshot(base) == before
            return n - 1
        del cache
        assert snapshot(base) == before, f"allocation {n}"
    raise AssertionError("200 allocations failed and the operation still makes more")


@pytest.fixture
def base(rng):
    """Rows that share pages with each other, one cropped below lo, in a growing cache."""
    cache = make(rng, 2)
    feed(rng, cache, (300, 100))
    cache.crop(150)
    feed(rng, cache, (30, 0))
    cache.select(np.array([0, 1, 0]))
    return cache


def test_allocation_failure_in_append(rng, base):
    for n_columns in (1, 200):
        k, v = span(rng, base, n_columns)
        assert every_failure(base, lambda cache, k=k, v=v: cache.append(k, v)) >= 5


def test_allocation_failure_in_decode(rng, base):
    for n_columns in (1, 150):
        k, v = span(rng, base, n_columns)
        q = draw(rng, "float32", 3, 4, n_columns, 40)
        used = every_failure(base, lambda cache, q=q, k=k, v=v: decode(cache, q, k, v))
        assert used >= 6


def test_allocation_failure_in_select(base):
    rows = np.array([0, 0, 1, 2, 1])
    assert every_failure(base, lambda cache: cache.select(rows)) >= 3


def test_allocation_failure_in_copy(base):
    assert every_failure(base, lambda cache: cache.copy()) >= 3


def test_allocation_failure_in_reserved(rng):
    cache = make(rng, 2, max_tokens=300, max_call=2)
    feed(rng, cache, (290, 70))
    k, v = span(rng, cache, 2)
    every_failure(cache, lambda cache: cache.append(k, v))
    every_failure(cache, lambda cache: cache.copy())
    every_failure(cache, lambda cache: cache.select(np.array([0, 0, 1])))


def allocations_of(call):
    """Count them by letting each fail, until none does and the call succeeds."""
    for n in range(1, 100):
        _C._fail_allocation(n)
        try:
            call()
        except MemoryError:
            continue
        finally:
            _C._fail_allocation(0)
        return n - 1
    raise AssertionError("the call never succeeds")


@pytest.mark.parametrize("widths", [(0, 8, 24, 40), (8, 16)])
def test_steps_of_a_reserved_cache_take_no_slabs(rng, widths):
    """Every step allocates what a step within a page does: room to work in, no pages or twins.

    An empty head splits its work, for one allocation more; a slab would be two.
    """
    cache = make(rng, 2, widths=widths, max_tokens=800, max_call=130)
    # The table of columns grows by allocations of its own, and stays as it is through a reset.
    feed(rng, cache, (800, 800))
    cache.reset()
    feed(rng, cache, (40, 3))
    before = cache.memory()
    counts = {}
    for T in (1, 30, 130, 1, 63, 64, 65, 2, 130, 26, 100):
        k, v = span(rng, cache, T)
        q = draw(rng, "float32", 2, len(widths), T, 40)
        n = allocations_of(lambda q=q, k=k, v=v: decode(cache, q, k, v))
        counts[f"{T} tokens after {cache.n_columns - T}"] = n
        assert cache.memory() == before
    assert max(counts.values()) <= min(counts.values()) + 1, counts


@pytest.mark.parametrize("options", [{}, {"max_tokens": 300}])
def test_allocation_failure_in_create(rng, options):
    for n in range(1, 50):
        _C._fail_allocation(n)
        try:
            make(rng, 2, **options)
        except MemoryError:
            continue
        finally:
            _C._fail_allocation(0)
        assert n > 4  # the pool, its geometry, the cache, its rows
        return
    raise AssertionError("creating never succeeds")


def test_a_failed_first_call_does_not_forget_the_announcement(rng):
    cache = make(rng, 1)
    k, v = span(rng, cache, 3)
    q = draw(rng, "float32", 1, 4, 3, 40)
    cache.expect_prompt(5)

    def two_calls(cache):
        try:
            decode(cache, q, k, v)
        except MemoryError:
            _C._fail_allocation(0)
            decode(cache, q, k, v)
            assert cache.prompt_lengths.tolist() == [-1]
            raise
        assert cache.prompt_lengths.tolist() == [-1]

    for n in range(1, 50):
        other = cache.copy()
        _C._fail_allocation(n)
        try:
            two_calls(other)
        except MemoryError:
            continue
        _C._fail_allocation(0)
        assert n > 5
        return
    raise AssertionError("the call never succeeds")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_rows": 0}, ValueError, r"n_rows: expected 1 to \d+, got 0"),
        ({"n_rows": 2**40}, ValueError, r"n_rows: expected 1 to \d+, got 1099511627776"),
        ({"sink": -1}, ValueError, r"sink: expected at least 0.*, got -1"),
        ({"recent": 0}, ValueError, r"recent: expected at least 1.*, got 0"),
        ({"slack": -1}, ValueError, r"slack: expected at least 0.*, got -1"),
        ({"slack": 2**62}, ValueError, r"slack: expected .*, got \d+"),
        ({"dtype": "float64"}, ValueError, r"dtype: expected 'float32'.*, got 'float64'"),
        ({"dtype": np.float32}, ValueError, r"dtype: expected 'float32'.*, got"),
        ({"v_dim": 20}, ValueError, r"v_dim: expected .*8.*, got 20"),
        ({"v_dim": 0}, ValueError, r"v_dim: expected .*, got 0"),
        ({"v_dim": 520}, ValueError, r"v_dim: expected .*512.*, got 520"),
        ({"max_tokens": 0}, ValueError, r"max_tokens: expected at least 1 .*, got 0"),
        ({"max_tokens": 9, "max_call": 0}, ValueError, r"max_call: expected at least 1 .*, got 0"),
        (
            {"max_tokens": 2**60},
            ValueError,
            r"max_tokens: expected .*2\*\*60, got 1152921504606846976",
        ),
        (
            {"max_tokens": 9, "max_call": 2**60},
            ValueError,
            r"max_call: expected .*2\*\*60, got 1152921504606846976",
        ),
        ({"n_rows": 2**70}, ValueError, r"n_rows: expected less than 2\*\*60 in size, got 11805"),
        ({"sink": 2**70}, ValueError, r"sink: expected .*2\*\*60 in size, got 11805"),
        ({"recent": -(2**70)}, ValueError, r"recent: expected .*2\*\*60 in size, got -11805"),
        ({"slack": 2**64}, ValueError, r"slack: expected .*2\*\*60 in size, got 18446"),
        ({"v_dim": 2**64}, ValueError, r"v_dim: expected .*2\*\*60 in size, got 18446"),
        ({"max_tokens": 2**63}, ValueError, r"max_tokens: expected .*2\*\*60 in size, got 92233"),
        ({"max_call": 2**63}, ValueError, r"max_call: expected .*2\*\*60 in size, got 92233"),
        ({"sink": 1.5}, TypeError, r"sink: expected an integer, got float"),
        ({"max_tokens": "9"}, TypeError, r"max_tokens: expected an integer, got str"),
        ({"keep": np.ones((2, 12), bool)}, ValueError, r"keep: expected .*8.*, got 12"),
        ({"keep": np.ones((0, 16), bool)}, ValueError, r"keep: expected 1 to \d+ heads, got 0"),
        ({"keep": np.eye(8, dtype=bool)}, ValueError, r"keep: expected .*8 channels, head 0"),
        ({"keep": np.ones((2, 16))}, TypeError, r"keep: expected dtype bool, got float64"),
        ({"keep": [[True] * 8]}, TypeError, r"keep: expected a NumPy array, got list"),
        ({"keep": np.ones(16, bool)}, ValueError, r"keep: expected \(any, any\), got \(16,\)"),
        ({"keep": np.ones((4, 16), bool)[::2]}, ValueError, r"keep: .*contiguous"),
    ],
)
def test_create_and_predict_refuse(options, error, message):
    options = {"keep": np.ones((2, 16), bool), "n_rows": 1, "sink": 4, "recent": 4} | options
    keep, n_rows = options.pop("keep"), options.pop("n_rows")
    with pytest.raises(error, match=message):
        LayerCache(keep, n_rows=n_rows, **options)
    if n_rows == 1:  # the other has no such argument
        with pytest.raises(error, match=message):
            _C.predict_memory(keep, np.zeros(1, np.int64), **options)


def test_predict_refuses_lengths():
    keep = np.ones((1, 8), bool)
    for error, message, lengths in [
        (TypeError, r"lengths: expected dtype int64, got int32", np.zeros(1, np.int32)),
        (TypeError, r"lengths: expected a NumPy array, got list", [1]),
        (ValueError, r"lengths: expected \(any,\), got \(1, 1\)", np.zeros((1, 1), np.int64)),
        (ValueError, r"lengths: expected 0 or more .*, got array\(\[-1\]\)", np.array([-1])),
        (ValueError, r"lengths: expected .* less than 2\*\*60 .*, got", np.array([1, 2**60])),
    ]:
        with pytest.raises(error, match=message):
            _C.predict_memory(keep, lengths, sink=4, recent=4)
    with pytest.raises(ValueError, match="overflow"):
        _C.predict_memory(keep, np.array([2**59]), sink=4, recent=4)
