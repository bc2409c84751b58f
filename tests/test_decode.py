"""leank.decode against the float64 rule: every instruction set, dtype, width, shape and window."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leank import _C, LayerCache, decode

from .compare import assert_within_budget, bits, encode, truth_and_plain
from .compare import decode as widen
from .conftest import AVAILABLE, DTYPES, draw, left_padded, random_keep
from .reference import History, is_window

# A case: sizes, window, and steps. A step is ("append" or "decode", tokens of each row), columns
# padded on the left; ("crop", columns); ("select", rows); ("copy",) keeps a copy alive from there
# on, so that later writes hit shared pages; ("expect_prompt", columns). sinks: draw some, with this
# standard deviation.
DEFAULT = {
    "D": 64,
    "Dv": None,
    "widths": (0, 8, 24, 64),
    "R": 2,
    "window": (10, 40, 20),
    "softcap": None,
    "sinks": None,
    "steps": (("append", (200, 70)), ("decode", (1, 1)), ("decode", (2, 2))),
}
MIXED = (("append", (300, 65)), ("decode", (1, 1)), ("decode", (5, 2)))
CASES = {
    **{f"R{R}": {"R": R} for R in (1, 3, 4, 7, 8)},
    **{f"D{D}": {"D": D, "widths": (0, 8, 24, D), "steps": MIXED} for D in (40, 72, 80, 96, 128)},
    "D256": {"D": 256, "widths": (0, 8, 24, 256), "R": 1, "steps": MIXED},
    "Dv_smaller": {"Dv": 40},
    "Dv_larger": {"Dv": 136, "R": 3},
    "mqa": {"widths": (24,), "R": 8, "steps": MIXED},
    "mha_of_many": {"widths": (0, 8, 16, 24, 32, 40, 48, 56, 64), "R": 1},
    "all_kept": {"widths": (64, 64), "steps": MIXED},
    "all_empty": {"widths": (0, 0), "steps": MIXED},
    "ragged": {
        "R": 1,
        "steps": (
            ("append", (0, 1, 5, 63, 64, 65, 170)),
            ("decode", (1, 1, 1, 1, 1, 1, 1)),
            ("decode", (0, 3, 1, 2, 0, 3, 2)),
            ("decode", (1, 0, 0, 1, 1, 0, 0)),
        ),
    },
    "T17": {"steps": (("append", (130, 40)), ("decode", (17, 17)), ("decode", (17, 3)))},
    "T200": {
        "R": 1,
        "widths": (0, 24),
        "steps": (("append", (90,)), ("decode", (200,)), ("decode", (1,))),
    },
    "T200_first": {"widths": (8, 0), "R": 3, "steps": (("decode", (200,)), ("decode", (1,)))},
    "prompt_in_chunks": {
        "widths": (0, 8),
        "steps": (
            ("expect_prompt", 150),
            ("decode", (60, 10)),
            ("decode", (60, 60)),
            ("decode", (40, 40)),
            ("decode", (1, 1)),
        ),
    },
    "long": {
        "R": 2,
        "widths": (0, 16, 64),
        "window": (64, 128, 64),
        "steps": (("append", (3000, 1500)), ("decode", (1, 1)), ("decode", (3, 1))),
    },
    "crop_to_middle": {
        "window": (10, 40, 0),
        "steps": (
            ("append", (400, 150)),
            ("crop", 290),
            ("decode", (1, 1)),
            ("crop", 100),
            ("decode", (1, 1)),
            ("decode", (70, 70)),
            ("decode", (1, 0)),
        ),
    },
    "crop_shared": {
        "steps": (
            ("append", (200, 90)),
            ("copy",),
            ("crop", 129),
            ("decode", (1, 1)),
            ("copy",),
            ("select", (1, 0, 0)),
            ("decode", (2, 1, 0)),
            ("crop", 64),
            ("decode", (3, 3, 2)),
        ),
    },
}
# Window edges: no sink, sinks that are not multiples of 16, one recent token, edges at a page +- 1.
for window in [
    (0, 1, 0),
    (0, 40, 0),
    (7, 1, 0),
    (33, 30, 5),
    (63, 63, 0),
    (64, 64, 0),
    (65, 65, 1),
]:
    CASES["window_{}_{}_{}".format(*window)] = {
        "window": window,
        "widths": (0, 8),
        "steps": (
            ("append", (126, 200, 260)),
            *[("decode", (1, 1, 1))] * 3,
            ("decode", (3, 2, 1)),
        ),
    }


CAPPED = {
    "strong": {"softcap": 1.5},
    "gemma": {"softcap": 50.0, "window": (33, 30, 5)},
    "sinks": {"sinks": 3.0},
    "sinks_R8": {"sinks": 3.0, "R": 8, "widths": (24,)},
    "both": {"softcap": 2.0, "sinks": 3.0, "R": 3},
    "both_all_empty": {"softcap": 2.0, "sinks": 3.0, "widths": (0, 0)},
    "both_ragged": {"softcap": 3.0, "sinks": 2.0, **CASES["ragged"]},
    "both_T17": {"softcap": 1.5, "sinks": 1.0, **CASES["T17"]},
    "both_T200": {"softcap": 4.0, "sinks": 2.0, **CASES["T200"]},
    "both_in_parts": {"softcap": 5.0, "sinks": 5.0, **CASES["long"]},
}
CASES |= {f"cap_{name}": {"steps": MIXED} | case for name, case in CAPPED.items()}


def options_of(case, keep):
    """Return softcap and sinks of every call of a case."""
    options = {"softcap": case["softcap"]}
    if case["sinks"]:
        own = np.random.default_rng(7)  # the steps draw the same with sinks and without
        n_q_heads = len(keep) * case["R"]
        options["sinks"] = own.normal(0, case["sinks"], n_q_heads).astype(np.float32)
    return options


def run_steps(case, caches, seed, dtype):
    """Run the steps on each cache and a history; yield (cache outputs, truths, plains) of decodes.

    Everything is drawn in the same order whatever `caches` is, so that truths can be kept.
    """
    rng = np.random.default_rng(seed)
    case = DEFAULT | case
    keep = random_keep(rng, case["D"], case["widths"])
    options = options_of(case, keep)
    v_dim = case["Dv"] or case["D"]
    window = dict(zip(("sink", "recent", "slack"), case["window"], strict=True))
    n_rows = next(len(step[1]) for step in case["steps"] if step[0] in ("append", "decode"))
    history = History(n_rows, page=_C.PAGE_TOKENS, **window)
    cache, copies = None, []
    if caches:
        cache = LayerCache(keep, n_rows=n_rows, dtype=dtype, v_dim=v_dim, **window)
    for op, *args in case["steps"]:
        if op == "copy":
            if caches:
                copies.append((cache.copy(), [cache.gather(b) for b in range(cache.n_rows)]))
            continue
        if op in ("crop", "select", "expect_prompt"):
            getattr(history, op)(*args)
            if caches:
                getattr(cache, op)(np.array(args[0]) if op == "select" else args[0])
            continue
        valid = left_padded(args[0])
        shape = (len(args[0]), len(keep), valid.shape[1])
        k, v = draw(rng, dtype, *shape, case["D"]), draw(rng, dtype, *shape, v_dim)
        q = draw(rng, dtype, shape[0], shape[1] * case["R"], shape[2], case["D"])
        history.put(k, v, valid)
        if op == "decode":
            yield (
                decode(cache, q, k, v, valid=valid, **options) if caches else None,
                None
                if caches
                else [expected(history, b, q[b], keep, dtype, **options) for b in range(shape[0])],
            )
        elif caches:
            cache.append(k, v, valid)
        history.settle()
    for copy, rows in copies:
        for b, row in enumerate(rows):
            for got, told in zip(copy.gather(b), row, strict=True):
                np.testing.assert_array_equal(widen(got, dtype), widen(told, dtype))


def expected(history, b, q, keep, dtype, *, scale=None, **options):
    """Truth and plain result of row b for the last columns."""
    row = history.rows[b]
    positions = history.positions(b, q.shape[1])
    if not row.k:
        return None
    k, v = (np.stack(x, axis=1) for x in (row.k, row.v))
    rule = {"sink": history.sink, "recent": history.recent, "lo": row.lo, "n0": row.n0}
    scale = scale or q.shape[-1] ** -0.5
    return truth_and_plain(q, k, v, positions, keep, dtype, scale=scale, **rule, **options)


@functools.cache
def expected_steps(name, dtype):
    """Return the truths of a case once for all instruction sets."""
    return [truths for _, truths in run_steps(CASES[name], False, len(name), dtype)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_equals_rule(name, dtype, isa):
    outputs = [o for o, _ in run_steps(CASES[name], True, len(name), dtype)]
    for i, (o, truths) in enumerate(zip(outputs, expected_steps(name, dtype), strict=True)):
        for b, truth in enumerate(truths):
            label = f"decode {i} row {b}"
            got = widen(o[b], dtype)
            if truth is None:
                assert not got.any(), label
            else:
                assert_within_budget(got, *truth, dtype, label)


def fresh(rng, dtype="float32", widths=(0, 8, 24, 64), n_rows=2, lengths=(300, 100), **options):
    """Return a cache with a prompt, and q, k, v of one more column for it."""
    options = {"sink": 10, "recent": 40, "slack": 20} | options
    cache = LayerCache(random_keep(rng, 64, widths), n_rows=n_rows, dtype=dtype, **options)
    valid = left_padded(lengths)
    shape = (n_rows, len(widths))
    n_columns = valid.shape[1]
    cache.append(
        draw(rng, dtype, *shape, n_columns, 64), draw(rng, dtype, *shape, n_columns, 64), valid
    )
    q = draw(rng, dtype, n_rows, 2 * len(widths), 1, 64)
    return cache, q, *(draw(rng, dtype, *shape, 1, 64) for _ in "kv")


@st.composite
def cases(draw):
    D = 8 * draw(st.integers(1, 17), "D/8")
    n_rows = draw(st.integers(1, 3), "B")
    counts = st.tuples(*[st.integers(0, 70)] * n_rows)
    some = counts.filter(any)
    widths = st.lists(
        st.sampled_from(sorted({0, 8, D // 16 * 8, D - 8, D})), min_size=1, max_size=3
    )
    return {
        "D": D,
        "Dv": 8 * draw(st.integers(1, 17), "Dv/8"),
        "widths": draw(widths, "widths"),
        "R": draw(st.integers(1, 9), "R"),
        "window": draw(st.tuples(st.integers(0, 130), st.integers(1, 130), st.integers(0, 70))),
        "softcap": draw(st.sampled_from((None, 0.5, 2.0, 30.0)), "softcap"),
        "sinks": draw(st.sampled_from((None, 3.0)), "sinks"),
        "steps": (
            ("append", draw(st.tuples(*[st.integers(0, 300)] * n_rows).filter(any))),
            *draw(st.lists(st.tuples(st.sampled_from(["append", "decode"]), some), max_size=2)),
            ("decode", draw(some)),
        ),
    }


@given(cases(), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=60)
def test_decode_of_random_shapes(case, dtype, seed):
    before = _C.isa()
    truths = [t for _, t in run_steps(case, False, seed, dtype)]
    try:
        for name in AVAILABLE:
            _C._force_isa(name)
            outputs = [o for o, _ in run_steps(case, True, seed, dtype)]
            for o, rows in zip(outputs, truths, strict=True):
                for b, truth in enumerate(rows):
                    got = widen(o[b], dtype)
                    if truth is None:
                        assert not got.any()
                    else:
                        assert_within_budget(got, *truth, dtype, f"{name} row {b}")
    finally:
        _C._force_isa(before)


# -------------------------------------------------------------------------------- same, bit for bit

CAP_AND_SINKS = {"softcap": 2.0, "sinks": np.linspace(-2, 3, 8, dtype=np.float32)}
with_and_without = pytest.mark.parametrize("options", [{}, CAP_AND_SINKS], ids=["plain", "capped"])


@with_and_without
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repetition_do_not_matter(rng, dtype, options, isa):
    cache, *new = fresh(rng, dtype, lengths=(5000, 70))
    first = decode(cache.copy(), *new, n_threads=1, **options)
    for n_threads in (1, 2, 3, 7, 0):
        again = decode(cache.copy(), *new, n_threads=n_threads, **options)
        np.testing.assert_array_equal(again, first)
    new = [np.repeat(x, 90, axis=2) for x in new]
    first = decode(cache.copy(), *new, n_threads=1, **options)
    for n_threads in (2, 5):
        again = decode(cache.copy(), *new, n_threads=n_threads, **options)
        np.testing.assert_array_equal(again, first)


@with_and_without
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_batch_equals_the_row_alone(rng, dtype, options, isa):
    cache, q, k, v = fresh(rng, dtype, n_rows=3, lengths=(500, 3, 120))
    together = decode(cache.copy(), q, k, v, **options)
    for b in range(3):
        alone = cache.copy()
        alone.select(np.array([b]))
        one = slice(b, b + 1)
        one_alone = decode(alone, q[one], k[one], v[one], **options)
        np.testing.assert_array_equal(one_alone, together[one])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attending_to_what_is_stored(rng, dtype, isa):
    """Without k and v the last column is attended again, with the same result and no change."""
    cache, q, k, v = fresh(rng, dtype)
    other = cache.copy()
    o = decode(cache, q, k, v)
    other.append(k, v)
    for _ in range(2):
        np.testing.assert_array_equal(decode(other, q), o)
    assert other.n_columns == cache.n_columns
    k, v = (np.concatenate([x, x], axis=2) for x in (k, v))
    other.append(k, v, np.array([[True, True], [True, False]]))
    o = decode(other, q)
    assert o[0].any() and not o[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuts_do_not_matter(rng, dtype, isa):
    """The same tokens in one call, or one at a time, within the rounding of the dtype."""
    cache, *_ = fresh(rng, dtype)
    q = draw(rng, dtype, 2, 8, 70, 64)
    k, v = draw(rng, dtype, 2, 4, 70, 64), draw(rng, dtype, 2, 4, 70, 64)
    other = cache.copy()
    o = widen(decode(cache, q, k, v), dtype)
    for t in range(70):
        column = np.s_[:, :, t : t + 1]
        one = widen(decode(other, q[column], k[column], v[column]), dtype)
        np.testing.assert_allclose(
            one, o[column], rtol=0, atol=2e-6 if dtype == "float32" else 0.02
        )
    for b in range(2):
        for x, y in zip(cache.gather(b), other.gather(b), strict=True):
            np.testing.assert_array_equal(widen(x, dtype), widen(y, dtype))


# ------------------------------------------------------------------------------ where it writes


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_and_nothing_around_it(rng, dtype, isa):
    cache, q, k, v = fresh(rng, dtype, v_dim=64)
    q, k, v = (np.repeat(x, 3, axis=2) for x in (q, k, v))
    plain = decode(cache.copy(), q, k, v)
    guard = encode(-777.0, dtype)
    for offset in (0, 1, 5):
        # Columns before heads, and space between tokens.
        buffer = np.full((2, 3, 8, 64 + 7), guard, plain.dtype)
        out = buffer[..., offset : offset + 64].transpose(0, 2, 1, 3)
        assert decode(cache.copy(), q, k, v, out=out) is out
        np.testing.assert_array_equal(out, plain)
        out[...] = guard
        assert (buffer == guard).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_may_slide_and_stride(rng, dtype, isa):
    cache, q, k, v = fresh(rng, dtype)
    q, k, v = (np.concatenate([x, x[::-1]], axis=2) for x in (q, k, v))
    valid = np.array([[True, True], [False, True]])
    plain = decode(cache.copy(), q, k, v, valid=valid)

    def slide(x, offset):
        flat = np.zeros(x.size + offset, x.dtype)
        flat[offset:] = x.reshape(-1)
        return flat[offset:].reshape(x.shape)

    def columns_first(x):
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def backwards(x):
        return np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]

    for change in (lambda x: slide(x, 1), lambda x: slide(x, 3), columns_first, backwards):
        views = [change(x) for x in (q, k, v)]
        np.testing.assert_array_equal(decode(cache.copy(), *views, valid=valid), plain)


# ------------------------------------------------------------------------------------ values


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
