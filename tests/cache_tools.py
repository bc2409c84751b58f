"""Caches of a standard shape for the tests of leank.LayerCache, and comparing them."""

import numpy as np

from leank import _C, LayerCache

from .compare import bits
from .compare import decode as widen
from .conftest import draw, left_padded, random_keep
from .reference import History

WIDTHS = (0, 8, 24, 40)
WINDOW = {"sink": 10, "recent": 20, "slack": 5}
ELEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def make(rng, n_rows, dtype="float32", widths=WIDTHS, head_dim=40, **options):
    return LayerCache(
        random_keep(rng, head_dim, widths), n_rows=n_rows, dtype=dtype, **(WINDOW | options)
    )


def span(rng, cache, n_columns):
    """Draw k and v of one call."""
    shape = (cache.n_rows, cache.n_heads, n_columns)
    return (
        draw(rng, cache.dtype, *shape, cache.head_dim),
        draw(rng, cache.dtype, *shape, cache.v_dim),
    )


def feed(rng, cache, counts, history=None):
    """Append counts[b] tokens to each row, padded on the left."""
    valid = left_padded(counts)
    k, v = span(rng, cache, valid.shape[1])
    cache.append(k, v, valid)
    if history:
        history.put(k, v, valid)
        history.settle()


def history_of(cache):
    return History(
        cache.n_rows, sink=cache.sink, recent=cache.recent, slack=cache.slack, page=_C.PAGE_TOKENS
    )


def assert_stored(cache, history):
    """Compare lengths, columns and all elements, bit for bit; NaN is where nothing must be left."""
    assert cache.n_columns == history.n_columns
    assert cache.lengths.tolist() == [len(row.k) for row in history.rows]
    assert cache.lo.tolist() == [row.lo for row in history.rows]
    prompts = [-1 if row.n0 == np.inf else row.n0 for row in history.rows]
    assert cache.prompt_lengths.tolist() == prompts
    assert cache.real.tolist() == [row.real for row in history.rows]
    for b, row in enumerate(history.rows):
        k_got, v_got = cache.gather(b)
        assert k_got.shape == (cache.n_heads, len(row.k), cache.head_dim)
        assert v_got.shape == (cache.n_heads, len(row.k), cache.v_dim)
        if row.k:
            k, v, k_stored, v_stored = history.stored(b, cache.keep)
            for got, told, stored in ((k_got, k, k_stored), (v_got, v, v_stored)):
                np.testing.assert_array_equal(bits(got)[stored], bits(told)[stored])
                assert np.isnan(widen(got, cache.dtype)[~stored]).all()


def snapshot(cache):
    """Return all that a caller can see of a cache, in comparable form."""
    rows = [x.tobytes() for b in range(cache.n_rows) for x in cache.gather(b)]
    state = (cache.lengths, cache.prompt_lengths, cache.lo, cache.real)
    return rows, cache.n_columns, [x.tolist() for x in state], cache.memory()
