"""leank.decode of scales, caps, sinks, extreme logits, NaN and infinities: where they show."""

import numpy as np
import pytest

from leank import LayerCache, decode

from .compare import assert_within_budget, bits, encode
from .compare import decode as widen
from .conftest import DTYPES, draw, random_keep
from .decode_tools import expected, fresh, with_and_without
from .reference import History, is_window


def test_scale(rng, isa):
    cache, q, k, v = fresh(rng)
    default = decode(cache.copy(), q, k, v)
    np.testing.assert_array_equal(decode(cache.copy(), q, k, v, scale=0.125), default)
    np.testing.assert_allclose(
        decode(cache.copy(), q, k, v, scale=0.5), decode(cache.copy(), 4 * q, k, v), atol=1e-6
    )
    flat = decode(cache.copy(), q, k, v, scale=0.0)
    assert np.abs(flat - default).max() > 0.01
    # All logits are 0: the mean of V over what is attended, here everything.
    k_all, v_all = cache.gather(0)
    mean = (v_all[3].sum(0, dtype=float) + v[0, 3, 0]) / (len(v_all[3]) + 1)
    np.testing.assert_allclose(flat[0, 6, 0], mean, atol=1e-6)


@pytest.mark.parametrize("softcap", [20.0, 1000.0, 1e6, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sinks_of_extreme_logits(rng, dtype, softcap, isa):
    """Logits up to 1e4 that float32 holds exactly: the cap decides which of them still differ."""
    keep = random_keep(rng, 64, (0, 8, 64))
    window = {"sink": 3, "recent": 30, "slack": 0}
    cache, history = (
        LayerCache(keep, n_rows=1, dtype=dtype, **window),
        History(1, page=64, **window),
    )
    few = [encode(rng.integers(-1, 2, (1, 3, 150, 64)), dtype) for _ in "kv"]
    valid = np.ones((1, 150), bool)
    cache.append(*few, valid)
    history.put(*few, valid)
    history.settle()
    for T in (1, 3):
        q = encode(rng.integers(-1, 2, (1, 6, T, 64)), dtype)
        k, v = encode(rng.integers(-1, 2, (1, 3, T, 64)), dtype), draw(rng, dtype, 1, 3, T, 64)
        options = {"scale": 512.0, "softcap": softcap}
        options["sinks"] = np.array([-np.inf, -1e4, 0, 19, 999, 2e4], np.float32)
        valid = np.ones((1, T), bool)
        history.put(k, v, valid)
        o = widen(decode(cache, q, k, v, **options), dtype)
        truth, plain = expected(history, 0, q[0], keep, dtype, **options)
        assert_within_budget(o[0], truth, plain, dtype, f"T {T}")
        if softcap in (20.0, 1000.0):  # the last sink is above all that is capped
            assert not o[:, 5].any()
        history.settle()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_and_caps_at_the_ends_of_their_ranges(rng, dtype, isa):
    cache, q, k, v = fresh(rng, dtype)

    def run(**options):
        return widen(decode(cache.copy(), q, k, v, **options), dtype)

    plain, mean = run(), run(scale=0.0)
    np.testing.assert_array_equal(run(softcap=0.0), plain)
    np.testing.assert_array_equal(run(sinks=np.full(8, -np.inf, np.float32)), plain)
    np.testing.assert_array_equal(run(sinks=np.full(8, -1e4, np.float32)), plain)
    for huge in (1e4, 3e38, np.inf):
        assert not run(sinks=np.full(8, huge, np.float32)).any()
        assert not run(sinks=np.full(8, huge, np.float32), softcap=1.0).any()
    one = np.full(8, -np.inf, np.float32)
    one[3] = np.inf
    o = run(sinks=one)
    assert not o[:, 3].any()
    np.testing.assert_array_equal(np.delete(o, 3, 1), np.delete(plain, 3, 1))
    one[3] = np.nan
    o = np.isnan(run(sinks=one))
    assert o[:, 3].all() and not np.delete(o, 3, 1).any()
    # A large cap changes nothing, a tiny one makes all logits alike.
    close = {"rtol": 0, "atol": 2e-6 if dtype == "float32" else 0.02}
    for softcap in (1e6, 1e30, 2e38):
        np.testing.assert_allclose(run(softcap=softcap), plain, **close)
    for softcap in (1e-6, 1e-38, 1e-44):
        np.testing.assert_allclose(run(softcap=softcap), mean, **close)


@pytest.mark.parametrize("sink", [None, -3.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_sink_is_attended(dtype, sink, isa):
    """Logits of -inf are not attended: the result is 0 and no NaN; a cap makes them finite."""
    cache = LayerCache(np.ones((1, 64), bool), n_rows=2, dtype=dtype, sink=0, recent=4)
    q, k, v = (encode(np.full((2, 1, 1, 64), x), dtype) for x in (6e4, -6e4, 1.5))
    valid = np.array([[True], [False]])
    sinks = None if sink is None else np.array([sink], np.float32)
    o = widen(decode(cache.copy(), q, k, v, valid=valid, scale=1e38, sinks=sinks), dtype)
    assert not o.any()
    o = widen(decode(cache, q, k, v, valid=valid, scale=1e38, sinks=sinks, softcap=2.0), dtype)
    # The logit is -2, at the cap.
    share = 1.0 if sink is None else 1 / (1 + np.exp(sink + 2))
    np.testing.assert_allclose(o[0], 1.5 * share, rtol=1e-6 if dtype == "float32" else 0.01)
    assert not o[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_do_not_overflow(rng, dtype, isa):
    """One key takes all, far beyond what exp can hold."""
    cache, q, k, v = fresh(rng, dtype)
    big = encode(100 * widen(q, dtype), dtype)
    o = widen(decode(cache, big, encode(100 * widen(k, dtype), dtype), v, scale=10.0), dtype)
    assert np.isfinite(o).all()
    assert np.abs(o).max() < 10


@with_and_without
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_belongs(rng, dtype, options, isa):
    """NaN in K of one head and row shows there, whole, and nowhere else."""
    cache, q, k, v = fresh(rng, dtype)
    k = k.copy()
    k[1, 2, 0, 5] = encode(np.nan, dtype)
    o = np.isnan(widen(decode(cache, q, k, v, **options), dtype))
    assert o[1, 4:6].all()
    o[1, 4:6] = False
    assert not o.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_a_call_do_not_see_each_others_tokens(rng, dtype, which, bad, isa):
    """NaN and infinities reach the queries that attend to their token, and no others."""
    window = {"sink": 10, "recent": 8, "slack": 5}
    sizes = [(0, 17, 1), (63, 17, 3), (200, 17, 4), (90, 33, 2), (127, 2, 1), (300, 5, 2)]
    for n_stored, T, R in sizes:
        cache = LayerCache(random_keep(rng, 64, (0, 8, 64)), n_rows=1, dtype=dtype, **window)
        cache.append(*(draw(rng, dtype, 1, 3, n_stored, 64) for _ in "kv"))
        rule = {"sink": 10, "recent": 8, "lo": cache.lo[0], "n0": n_stored or T}
        q = draw(rng, dtype, 1, 3 * R, T, 64)
        new = {x: draw(rng, dtype, 1, 3, T, 64) for x in "kv"}
        clean = decode(cache.copy(), q, **new)[0]
        for j in {0, 1, T // 2, T - 1}:
            dirty = new | {which: new[which].copy()}
            dirty[which][:, :, j, 5 if which == "v" else slice(None)] = encode(bad, dtype)
            o = decode(cache.copy(), q, **dirty)[0]
            seen = np.repeat([np.arange(T) >= j] * 3, R, axis=0)
            for t in range(j, T):  # the empty head
                seen[:R, t] = is_window(n_stored + t, n_stored + j, **rule)
            label = f"{n_stored} tokens, T {T}, R {R}, bad {j}"
            np.testing.assert_array_equal(bits(o[~seen]), bits(clean[~seen]), err_msg=label)
            finite = np.isfinite(widen(o[seen], dtype))
            if which == "v":
                assert finite.sum() == 63 * len(finite) and not finite[:, 5].any(), label
            elif np.isnan(bad):
                assert not finite.any(), label


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_cropped_is_not_read(rng, dtype, isa):
    """NaN and infinities in tokens that were cropped away leave no trace in any slot."""
    for n_columns in (299, 298, 256, 255):
        cache, q, k, v = fresh(rng, dtype, lengths=(n_columns - 1, n_columns - 1))
        # One token after the prompt, whose result no retirement within the slack changes.
        cache.append(k, v)
        other = cache.copy()
        bad_k, bad_v = (np.repeat(x, 20, axis=2) for x in (k, v))
        bad_k[...] = encode(np.nan, dtype)
        bad_v[...] = encode(np.inf, dtype)
        # Both into pages that are shared and into the cache's own.
        for _ in range(2):
            cache.append(bad_k, bad_v)
            cache.crop(n_columns)
            np.testing.assert_array_equal(decode(cache, q), decode(other, q))
        np.testing.assert_array_equal(decode(cache, q, k, v), decode(other, q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_retired_is_not_read(rng, dtype, isa):
    """Dropped channels of middle keys, and empty heads' middle keys, may be NaN from the start."""
    cache, q, k, v = fresh(rng, dtype, lengths=(0, 1))
    k_all, v_all = (draw(rng, dtype, 2, 4, 400, 64) for _ in "kv")
    clean, dirty = cache.copy(), cache.copy()
    clean.append(k_all, v_all)
    keep = cache.keep
    # Row 1 has one token more, so that its column c is position c + 1.
    middle = slice(11, 250)
    for x in (k_all, v_all):
        x[:, 0, middle] = encode(np.nan, dtype)
    for g in (1, 2):
        k_all[:, g, middle][..., ~keep[g]] = encode(np.nan, dtype)
    dirty.append(k_all, v_all)
    o = decode(clean, q, k, v)
    assert np.isfinite(widen(o, dtype)).all()
    np.testing.assert_array_equal(decode(dirty, q, k, v), o)
