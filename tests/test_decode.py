"""leank.decode against the float64 rule: every instruction set, dtype, width, shape and window."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leank import _C, LayerCache, decode

from .compare import assert_within_budget, encode
from .compare import decode as widen
from .conftest import AVAILABLE, DTYPES, draw, left_padded, random_keep
from .decode_tools import expected, fresh, options_of, with_and_without
from .reference import History

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
