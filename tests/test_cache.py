"""leank.LayerCache: what it stores bit for bit, what it counts, and sharing."""

import copy

import numpy as np
import pytest

from leank import _C, LayerCache, decode

from .cache_tools import (
    ELEM,
    WIDTHS,
    WINDOW,
    assert_stored,
    feed,
    history_of,
    make,
    snapshot,
    span,
)
from .compare import bits
from .conftest import DTYPES, draw, left_padded, random_keep
from .page_model import PageModel

# ------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_dim", [None, 24])
def test_gather_returns_what_was_appended(rng, dtype, v_dim):
    cache = make(rng, 3, dtype, v_dim=v_dim)
    history = history_of(cache)
    assert_stored(cache, history)
    for counts in [(0, 5, 64), (1, 63, 65), (0, 0, 0), (130, 1, 2), (1, 1, 1), (7, 150, 0)]:
        feed(rng, cache, counts, history)
        assert_stored(cache, history)
    assert (cache.lo > WINDOW["sink"]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_survives(rng, dtype):
    """NaN payloads, infinities and subnormals are moved, not converted."""
    cache = make(rng, 1, dtype, widths=(8, 16), head_dim=16, sink=0, recent=1000)
    size = (1, 2, 100, 16)
    patterns = rng.integers(0, 2 ** (8 * ELEM[dtype]), (2, *size), np.uint64)
    k, v = patterns.astype(f"u{ELEM[dtype]}").view({"bfloat16": np.uint16}.get(dtype, dtype))
    cache.append(k, v)
    k_got, v_got = cache.gather(0)
    np.testing.assert_array_equal(bits(k_got), bits(k[0]))
    np.testing.assert_array_equal(bits(v_got), bits(v[0]))


def test_strides_are_followed(rng):
    cache, same = make(rng, 3), None
    same = cache.copy()
    k, v = span(rng, cache, 70)
    valid = left_padded([70, 3, 30])
    same.append(k, v, valid)
    # Tokens outside heads, rows in reverse, every second head, an offset of one element.
    k_strided = np.ascontiguousarray(k.transpose(0, 2, 1, 3)[::-1])[::-1].transpose(0, 2, 1, 3)
    v_wide = np.zeros((3, 2 * cache.n_heads, 70, cache.v_dim + 3), np.float32)
    v_strided = v_wide[:, ::2, :, 1:-2]
    v_strided[...] = v
    cache.append(k_strided, v_strided, valid)
    assert snapshot(cache) == snapshot(same)


def test_one_key_for_all_rows(rng):
    """Axes of stride 0 are arrays like others."""
    cache = make(rng, 4)
    k, v = span(rng, make(rng, 1), 30)
    cache.append(*(np.broadcast_to(x, (4, *x.shape[1:])) for x in (k, v)))
    for b in range(4):
        np.testing.assert_array_equal(cache.gather(b)[1][1], v[0, 1])


def test_what_was_appended_may_die(rng):
    """Arrays over memory that goes away with the call, and arrays that are used again."""
    cache = make(rng, 2)
    same = cache.copy()
    k, v = span(rng, cache, 70)
    same.append(k, v)
    memory = bytearray(k.tobytes() + v.tobytes())
    whole = np.frombuffer(memory, np.float32)
    cache.append(whole[: k.size].reshape(k.shape), whole[k.size :].reshape(v.shape))
    whole[:] = np.nan
    del whole
    memory.clear()  # BufferError if the cache still had a view
    assert snapshot(cache) == snapshot(same)


def test_properties(rng):
    keep = random_keep(rng, 64, (8, 64))
    window = {"sink": 3, "recent": 4, "slack": 5}
    cache = LayerCache(keep, n_rows=2, **window, dtype="float16", v_dim=32)
    expected = {
        "n_rows": 2,
        "n_columns": 0,
        "n_heads": 2,
        "head_dim": 64,
        "v_dim": 32,
        "dtype": "float16",
        "max_tokens": None,
        **window,
    }
    assert {name: getattr(cache, name) for name in expected} == expected
    np.testing.assert_array_equal(cache.keep, keep)
    # Neither the caller's mask nor the returned one is the cache's.
    keep[:] = True
    cache.keep[:] = True
    assert cache.keep.sum() == 72
    assert LayerCache(keep, n_rows=1, sink=0, recent=1).slack == 64
    assert LayerCache(keep, n_rows=1, sink=0, recent=1, max_tokens=7).max_tokens == 7


# ----------------------------------------------------------------------------------- prompt, lo


def test_announced_prompt_spans_calls_and_padding(rng):
    cache = make(rng, 3)
    history = history_of(cache)
    for x in (cache, history):
        x.expect_prompt(150)
    # Row 1 has no token within the 150 columns, so its prompt is its first call that has one.
    for counts, prompts in [
        ((100, 0, 0), [-1, -1, -1]),
        ((10, 0, 49), [-1, -1, -1]),
        ((3, 2, 2), [111, 2, 49]),
        ((5, 70, 80), [111, 2, 49]),
    ]:
        feed(rng, cache, counts, history)
        assert cache.prompt_lengths.tolist() == prompts
        assert_stored(cache, history)


def test_open_prompt_keeps_its_dropped_channels(rng):
    cache = make(rng, 1)
    cache.expect_prompt(400)
    feed(rng, cache, [399])
    assert cache.lo.tolist() == [WINDOW["sink"]]
    assert cache.memory()["n_twins"] == 7
    feed(rng, cache, [1])
    assert cache.lo.tolist() == [320]
    assert cache.memory()["n_twins"] == 3


def test_announcing_again_and_after_reset(rng):
    cache = make(rng, 1)
    cache.expect_prompt(9)
    cache.expect_prompt(4)
    feed(rng, cache, [3])
    assert cache.prompt_lengths.tolist() == [-1]
    with pytest.raises(RuntimeError, match=r"expect_prompt: expected an empty cache, got .*3 col"):
        cache.expect_prompt(5)
    cache.reset()
    feed(rng, cache, [3])
    assert cache.prompt_lengths.tolist() == [3]


def test_crop_lowers_lo_and_append_fills_the_hole(rng):
    cache = make(rng, 2)
    history = history_of(cache)
    feed(rng, cache, (300, 40), history)
    assert cache.lo.tolist() == [256, 10]
    for n_columns in (290, 270):
        cache.crop(n_columns)
        history.crop(n_columns)
        assert_stored(cache, history)
    cache.crop(100)
    history.crop(100)
    assert cache.lo.tolist() == [100, 10]
    for counts in [(1, 0), (30, 3), (200, 200)]:
        feed(rng, cache, counts, history)
        assert_stored(cache, history)
    cache.crop(0)
    history.crop(0)
    feed(rng, cache, (3, 0), history)
    assert_stored(cache, history)


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "window"),
    [
        (WIDTHS, (10, 20, 5)),
        (WIDTHS, (0, 1, 0)),
        (WIDTHS, (64, 64, 64)),
        ((40, 40), (10, 20, 5)),
        ((0, 0), (100, 20, 5)),
        ((8,), (65, 100, 64)),
    ],
)
def test_memory_equals_prediction(rng, dtype, widths, window):
    window = dict(zip(("sink", "recent", "slack"), window, strict=True))
    cache = make(rng, 4, dtype, widths=widths, v_dim=24, **window)
    model = PageModel(cache.keep, 4, v_dim=24, **window)
    for counts in [(1, 0, 63, 64), (64, 1, 1, 1), (300, 0, 2, 63), (1, 1, 1, 1), (64, 500, 0, 1)]:
        feed(rng, cache, counts)
        got = cache.memory()
        predicted = _C.predict_memory(cache.keep, cache.lengths, **window, dtype=dtype, v_dim=24)
        assert predicted["slab_bytes"] == predicted["total_bytes"]
        assert {**got, "slab_bytes": 0} == {**predicted, "slab_bytes": 0}
        n_pages, n_twins = model.predict(cache.lengths.tolist())
        assert (got["n_pages"], got["n_twins"]) == (n_pages, n_twins)
        assert (got["k_bytes"], got["v_bytes"]) == model.bytes(n_pages, n_twins, ELEM[dtype])
        assert got["total_bytes"] == got["k_bytes"] + got["v_bytes"] <= got["slab_bytes"]
    cache.reset()
    assert set(cache.memory().values()) == {0}


def assert_slabs_small(cache):
    """Require at most 1%, or a page with its twin per row, of slabs above what lives in them."""
    memory = cache.memory()
    dense_page = _C.PAGE_TOKENS * cache.n_heads * (cache.head_dim + cache.v_dim) * ELEM[cache.dtype]
    most = max(memory["total_bytes"] / 100, dense_page * cache.n_rows)
    assert memory["slab_bytes"] - memory["total_bytes"] <= most, memory


@pytest.mark.parametrize("n_rows", [1, 3])
def test_slabs_stay_close_when_growing(rng, n_rows):
    cache = make(rng, n_rows)
    feed(rng, cache, [500] * n_rows)
    assert_slabs_small(cache)
    for _ in range(300):
        feed(rng, cache, [1] * n_rows)
        assert_slabs_small(cache)
    feed(rng, cache, [5000] * n_rows)
    assert_slabs_small(cache)


@pytest.mark.parametrize("chunk", [300, 2000])
def test_slabs_stay_close_after_a_prompt_that_was_whole(rng, chunk):
    """All twins of an open prompt, or of a call that is attended, exist at once, then most go."""
    cache = make(rng, 2)
    cache.expect_prompt(2000)
    for begin in range(0, 2000, chunk):
        n_columns = min(chunk, 2000 - begin)
        k, v = span(rng, cache, n_columns)
        decode(cache, draw(rng, "float32", 2, 4, n_columns, 40), k, v)
    assert_slabs_small(cache)


def assert_covered(cache):
    memory = cache.memory()
    assert memory["total_bytes"] == memory["k_bytes"] + memory["v_bytes"] <= memory["slab_bytes"]


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 700, "max_call": 40}])
def test_slabs_cover_what_lives_and_go_back(rng, limits):
    """Their 1% is for rows that grow; padding on the right, crops and lost rows may leave more."""
    cache = make(rng, 3, **limits)
    empty = cache.memory()
    zeros = np.zeros(3, np.int64)
    assert empty == _C.predict_memory(cache.keep, zeros, **WINDOW, **limits)
    for _ in range(2):
        cache.expect_prompt(500)
        valid = ~left_padded([0, 350, 499], 500)
        for begin in range(0, 500, 125):
            part = np.ascontiguousarray(valid[:, begin : begin + 125])
            k, v = span(rng, cache, 125)
            decode(cache, draw(rng, "float32", 3, 4, 125, 40), k, v, valid=part)
            assert_covered(cache)
        assert cache.lengths.tolist() == cache.prompt_lengths.tolist() == [500, 150, 1]
        for _ in range(3):
            feed(rng, cache, (40, 1, 0))
            assert_covered(cache)
        cache.crop(130)
        assert_covered(cache)
        feed(rng, cache, (1, 1, 1))
        cache.select(np.array([2]))
        assert_covered(cache)
        feed(rng, cache, (30,))
        assert_covered(cache)
        cache.select(zeros)
        feed(rng, cache, (2, 1, 0))
        assert_covered(cache)
        cache.reset()
        assert cache.memory() == empty


def test_memory_of_reserved_rows(rng):
    limits = {"max_tokens": 1000, "max_call": 3}
    cache = make(rng, 2, **limits)
    model = PageModel(cache.keep, 2, **WINDOW, **limits)
    predicted = _C.predict_memory(cache.keep, np.zeros(2, np.int64), **WINDOW, **limits)
    assert (predicted["n_pages"], predicted["n_twins"]) == model.predict([0, 0]) == (32, 6)
    assert cache.memory() == predicted
    feed(rng, cache, (700, 3))
    assert cache.memory() == predicted
    for counts in [(1, 1), (3, 0), (0, 3)] * 70:
        feed(rng, cache, counts)
        assert cache.memory() == predicted
    cache.crop(100)
    assert cache.memory() == predicted
    cache.reset()
    assert cache.memory() == predicted


def test_reserved_rows_hold_a_chunked_prompt_whole(rng):
    cache = make(rng, 1, max_tokens=640, max_call=1)
    before = cache.memory()
    assert before["n_twins"] == 3
    cache.expect_prompt(600)
    feed(rng, cache, [599])
    assert cache.memory()["n_twins"] == 10
    feed(rng, cache, [1])
    # What the prompt needed beyond the reservation went back, its slabs included.
    assert cache.memory() == before


def test_reserved_rows_come_and_go(rng):
    cache = make(rng, 2, max_tokens=100, max_call=1)
    feed(rng, cache, (50, 60))
    per_row = cache.memory()["total_bytes"] // 2
    cache.select(np.array([0, 1, 1, 0, 0]))
    assert cache.memory()["total_bytes"] == cache.memory()["slab_bytes"] == 5 * per_row
    feed(rng, cache, [1] * 5)
    assert cache.memory()["slab_bytes"] == 5 * per_row
    other = cache.copy()
    assert other.memory()["total_bytes"] == 5 * per_row
    assert other.memory()["slab_bytes"] == 10 * per_row
    del other
    cache.select(np.array([3]))
    assert cache.memory()["total_bytes"] == per_row


# ------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_share_until_they_write(rng, dtype):
    cache = make(rng, 2, dtype)
    history = history_of(cache)
    feed(rng, cache, (200, 90), history)
    alone = cache.memory()
    pairs = [(cache, history)]
    for make_copy in (LayerCache.copy, copy.copy, copy.deepcopy):
        pairs.append((make_copy(cache), history.copy()))
    assert all(x.memory() == alone for x, _ in pairs)
    # Into the middle of a page, of a full page, to a page's edge, and without a crop.
    for (x, told), n_columns in zip(pairs, (170, 128, 150, 200), strict=True):
        x.crop(n_columns)
        told.crop(n_columns)
        feed(rng, x, (3, 1), told)
    for x, told in pairs:
        assert_stored(x, told)
    del cache, x
    pairs.pop(0)
    for x, told in pairs:
        feed(rng, x, (70, 70), told)
        assert_stored(x, told)


def test_rows_of_one_cache_share_until_they_write(rng):
    cache = make(rng, 2)
    history = history_of(cache)
    feed(rng, cache, (100, 30), history)
    for rows in ([0, 1, 0], [2, 2, 1, 0], [1, 3], [1]):
        cache.select(np.array(rows))
        history.select(rows)
        assert_stored(cache, history)
        feed(rng, cache, [5] * len(rows), history)
        assert_stored(cache, history)


def test_shared_rows_count_once(rng):
    cache = make(rng, 1)
    feed(rng, cache, [100])
    one = cache.memory()
    cache.select(np.zeros(4, np.int64))
    assert cache.memory() == one
    # Each row gets its own second page; the full first one stays shared.
    feed(rng, cache, [1] * 4)
    assert cache.memory()["n_pages"] == 1 + 4


def test_shared_pages_leave_no_leftovers(rng):
    """Of rows that share a page all but the last copy it, and the last owner writes in place."""
    cache = make(rng, 1)
    feed(rng, cache, [100])
    cache.select(np.zeros(4, np.int64))
    feed(rng, cache, [1] * 4)
    other = cache.copy()
    feed(rng, other, [1] * 4)
    del other
    cache.reset()
    assert set(cache.memory().values()) == {0}
