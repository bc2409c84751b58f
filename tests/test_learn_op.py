"""The attention of mask learning against its float64 truth: forward, backward, every variant."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leank import _C

from . import reference_learn
from .compare import assert_within_budget, bits, encode
from .compare import decode as widen
from .conftest import AVAILABLE, DTYPES, draw

NAMES = ("q", "k_context", "v_context", "k", "v", "alpha")
OUTPUTS = ("o", "lse", "dq", "dk", "dv", "dalpha")

# A case: sizes, window, first real column of each row, hidden heads, how alpha is drawn.
DEFAULT = {
    "R": 2,
    "heads": 2,
    "D": 64,
    "Dv": None,
    "T": 40,
    "Lc": 200,
    "window": (10, 50),
    "start": (0, 0),
    "hidden": None,
    "alpha": "random",
}
CASES = {
    **{f"R{R}": {"R": R} for R in (1, 3, 4, 8)},
    **{f"D{D}": {"D": D} for D in (80, 96, 128)},
    **{f"D{D}": {"D": D, "R": 1} for D in (1, 5, 17, 40, 512)},
    "Dv_smaller": {"Dv": 24},
    "Dv_larger": {"Dv": 136},
    **{f"T{T}": {"T": T} for T in (1, 2, 63, 65, 200)},
    "no_context": {"Lc": 0, "T": 150, "R": 1},
    "one_token": {"Lc": 0, "T": 1, "R": 1},
    "window_least": {"window": (0, 1)},
    "window_no_sink": {"window": (0, 40)},
    "window_of_blocks": {"window": (64, 64)},
    "window_of_everything": {"window": (2**40, 2**59)},
    "recent_times_R_is_2_to_64": {"window": (0, 2**59), "R": 32, "heads": 1, "T": 5},
    "window_recent_beyond": {"window": (0, 10**9)},
    "ragged": {"start": (0, 3, 199, 200, 201, 220, 239, 240), "T": 40, "R": 1},
    "ragged_long_span": {"start": (0, 70, 129), "Lc": 10, "T": 120, "R": 3},
    "hidden_one": {"hidden": (False, True)},
    "hidden_all": {"hidden": (True, True), "T": 150, "window": (3, 20)},
    "hidden_ragged": {"hidden": (True, False), "start": (0, 17, 205), "window": (0, 1)},
    "alpha_0": {"alpha": 0.0},
    "alpha_1": {"alpha": 1.0},
    "long": {"Lc": 5000, "T": 9, "R": 1, "start": (0,), "window": (64, 512)},
}


def make(case, seed, dtype):
    """Return (arguments by name, d_o, options) of a case."""
    rng = np.random.default_rng(seed)
    B, Hkv, T, D = len(case["start"]), case["heads"], case["T"], case["D"]
    Dv = case["Dv"] or D
    alpha = rng.random((Hkv, D), np.float32)
    if case["alpha"] != "random":
        alpha[...] = case["alpha"]
    arrays = {
        "q": draw(rng, dtype, B, Hkv * case["R"], T, D),
        "k_context": draw(rng, dtype, B, Hkv, case["Lc"], D),
        "v_context": draw(rng, dtype, B, Hkv, case["Lc"], Dv),
        "k": draw(rng, dtype, B, Hkv, T, D),
        "v": draw(rng, dtype, B, Hkv, T, Dv),
        "alpha": alpha,
    }
    sink, recent = case["window"]
    options = {"sink": sink, "recent": recent, "scale": D**-0.5}
    options["start"] = np.array(case["start"], np.int64)
    if case["hidden"] is not None:
        options["hidden"] = np.array(case["hidden"])
    return arrays, draw(rng, dtype, B, Hkv * case["R"], T, Dv), options


def run(arrays, d_o, options, **more):
    """Return the outputs of both directions by name."""
    inputs = [arrays[name] for name in NAMES]
    o, lse = _C.learn_forward(*inputs, **options, **more)
    gradients = _C.learn_backward(d_o, o, lse, *inputs, **options, **more)
    return dict(zip(OUTPUTS, (o, lse, *gradients), strict=True))


def expect(arrays, d_o, options, dtype):
    """Return name -> (truth, plain, terms) of the outputs."""

    def rounded(x):
        return widen(encode(x, dtype), dtype)

    real = {name: widen(arrays[name], dtype) for name in NAMES[:-1]}
    k, v = (np.concatenate([real[f"{x}_context"], real[x]], axis=2) for x in "kv")
    inputs = (real["q"], k, v, arrays["alpha"])
    rule = {**options, "n_context": arrays["k_context"].shape[2]}
    d_o = widen(d_o, dtype)
    o, lse, A = reference_learn.forward(*inputs, **rule)
    gradients = reference_learn.backward(d_o, o, A, *inputs, **rule)
    # With these signs nothing cancels.
    sizes = reference_learn.backward(
        np.abs(d_o), -np.abs(o), A, *(np.abs(x) for x in inputs), **rule
    )
    rule["dtype"] = np.float32
    plain_o, plain_lse, plain_A = reference_learn.forward(*inputs, **rule, rounded=rounded)
    plain_o = rounded(plain_o)
    plain_dq, plain_dk, plain_dv, plain_dalpha = reference_learn.backward(
        d_o, plain_o, plain_A, *inputs, **rule
    )
    plain = (plain_lse, *(rounded(x) for x in (plain_dq, plain_dk, plain_dv)), plain_dalpha)
    terms = (0.0, *(np.abs(x).max() for x in sizes))
    return {
        "o": (o, plain_o, 0.0),
        **dict(zip(OUTPUTS[1:], zip((lse, *gradients), plain, terms, strict=True), strict=True)),
    }


@functools.cache
def expected(name, dtype):
    """Return the truths of a case once for all instruction sets."""
    return expect(*make(DEFAULT | CASES[name], len(name), dtype), dtype)


def check(got, truths, dtype, label=""):
    for name, (truth, plain, terms) in truths.items():
        coded = name not in ("lse", "dalpha")
        actual = widen(got[name], dtype) if coded else got[name]
        kind = "float32" if name == "lse" else dtype  # computed from the same values for all
        assert_within_budget(actual, truth, plain, kind, f"{label} {name}", terms)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_learn_equals_formulas(name, dtype, isa):
    arrays, d_o, options = make(DEFAULT | CASES[name], len(name), dtype)
    check(run(arrays, d_o, options), expected(name, dtype), dtype)


@st.composite
def cases(draw):
    Lc, T = draw(st.integers(0, 150), "Lc"), draw(st.integers(1, 90), "T")
    heads = draw(st.integers(1, 2), "Hkv")
    return {
        "R": draw(st.sampled_from((1, 2, 3, 5)), "R"),
        "heads": heads,
        "D": draw(st.integers(1, 70), "D"),
        "Dv": draw(st.integers(1, 70), "Dv"),
        "T": T,
        "Lc": Lc,
        "window": draw(st.tuples(st.integers(0, 130), st.integers(1, 130)), "window"),
        "start": draw(st.lists(st.integers(0, Lc + T), min_size=1, max_size=2), "start"),
        "hidden": draw(st.lists(st.booleans(), min_size=heads, max_size=heads), "hidden"),
        "alpha": draw(st.sampled_from(("random", 0.0, 1.0)), "alpha"),
    }


@given(cases(), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=40)
def test_learn_of_random_shapes(case, dtype, seed):
    before = _C.isa()
    arrays, d_o, options = make(case, seed, dtype)
    truths = expect(arrays, d_o, options, dtype)
    try:
        for name in AVAILABLE:
            _C._force_isa(name)
            check(run(arrays, d_o, options), truths, dtype, name)
    finally:
        _C._force_isa(before)


def test_formulas_are_the_derivatives():
    """Central differences of the float64 reference, in every number of every input."""
    case = DEFAULT | {"D": 3, "Dv": 2, "T": 4, "Lc": 5, "window": (1, 2), "start": (0, 7)}
    arrays, d_o, options = make(case | {"hidden": (False, True)}, 0, "float32")
    inputs = [arrays["q"], *(np.concatenate([arrays[f"{x}_context"], arrays[x]], 2) for x in "kv")]
    inputs = [x.astype(np.float64) for x in (*inputs, arrays["alpha"])]
    rule = {**options, "n_context": 5}
    o, _, A = reference_learn.forward(*inputs, **rule)
    gradients = reference_learn.backward(d_o, o, A, *inputs, **rule)
    for x, gradient in zip(inputs, gradients, strict=True):
        differences = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            value, losses = x[at], []
            for step in (1e-5, -1e-5):
                x[at] = value + step
                losses.append((reference_learn.forward(*inputs, **rule)[0] * d_o).sum())
            x[at] = value
            differences[at] = (losses[0] - losses[1]) / 2e-5
        if gradient.shape != x.shape:
            differences = differences[:, :, 5:]
        np.testing.assert_allclose(gradient, differences, atol=1e-8)
        assert np.abs(gradient).max() > 1e-3


# -------------------------------------------------------------------------------- same, bit for bit


def assert_same(got, told, label=""):
    for name in OUTPUTS:
        np.testing.assert_array_equal(bits(got[name]), bits(told[name]), f"{label} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repetition_do_not_matter(dtype, isa):
    arrays, d_o, options = make(DEFAULT | {"T": 150, "R": 3, "start": (0, 60, 300)}, 0, dtype)
    first = run(arrays, d_o, options, n_threads=1)
    for n_threads in (1, 2, 3, 7, 0):
        assert_same(run(arrays, d_o, options, n_threads=n_threads), first, n_threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_batch_equals_the_row_alone(dtype, isa):
    """And padding makes no difference, whatever it holds."""
    starts = (0, 33, 200)
    arrays, d_o, options = make(DEFAULT | {"start": starts, "T": 70}, 0, dtype)
    for b, start in enumerate(starts):
        for name in ("k_context", "v_context"):
            arrays[name][b, :, :start] = encode(np.nan, dtype)
    together = run(arrays, d_o, options)
    for b, start in enumerate(starts):
        one = {name: x if name == "alpha" else x[b : b + 1] for name, x in arrays.items()}
        for name in ("k_context", "v_context"):
            one[name] = one[name][:, :, start:]
        alone = run(one, d_o[b : b + 1], options | {"start": None})
        for name in OUTPUTS[:-1]:
            np.testing.assert_array_equal(alone[name][0], together[name][b], f"{name} row {b}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_in_the_span_is_not_read(dtype, isa):
    case = DEFAULT | {"start": (230, 100, 240), "T": 40}
    arrays, d_o, options = make(case, 0, dtype)
    clean = run(arrays, d_o, options)
    assert not clean["o"][0, :, :30].any() and not clean["o"][2].any()
    assert clean["o"][0, :, 30:].any() and np.isneginf(clean["lse"][2]).all()
    for name in ("dq", "dk", "dv"):
        assert not clean[name][0, :, :30].any() and not clean[name][2].any()
    for x in (arrays["q"], arrays["k"], arrays["v"], d_o):
        x[0, :, :30] = encode(np.nan, dtype)
        x[2] = encode(np.nan, dtype)
    assert_same(run(arrays, d_o, options), clean)
    o = clean["o"].copy()
    o[0, :, :30] = o[2] = encode(np.nan, dtype)
    inputs = [arrays[name] for name in NAMES]
    gradients = _C.learn_backward(d_o, o, clean["lse"], *inputs, **options)
    assert_same({**clean, **dict(zip(OUTPUTS[2:], gradients, strict=True))}, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_may_slide_and_stride(dtype, isa):
    arrays, d_o, options = make(DEFAULT, 0, dtype)
    plain = run(arrays, d_o, options)

    def slide(x):
        flat = np.zeros(x.size + 1, x.dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].reshape(x.shape)

    def columns_first(x):
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def backwards(x):
        return np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]

    for change in (slide, columns_first, backwards):
        views = {name: x if name == "alpha" else change(x) for name, x in arrays.items()}
        assert_same(run(views, change(d_o), options), plain, change.__name__)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_do_not_overflow(dtype, isa):
    """One key takes all, far beyond what exp can hold; then no logit has a gradient."""
    arrays, d_o, options = make(DEFAULT, 0, dtype)
    for name in ("q", "k", "k_context"):
        arrays[name] = encode(100 * widen(arrays[name], dtype), dtype)
    got = run(arrays, d_o, options)
    for name in OUTPUTS:
        coded = name not in ("lse", "dalpha")
        assert np.isfinite(widen(got[name], dtype) if coded else got[name]).all(), name
    assert np.abs(widen(got["o"], dtype)).max() < 10


def test_nan_stays_where_it_belongs(isa):
    """NaN in one query shows in its own o, lse and dq, and in dk, dv, dalpha of its KV head."""
    arrays, d_o, options = make(DEFAULT, 0, "float32")
    arrays["q"][1, 2, 5, 7] = np.nan
    got = {name: np.isnan(x) for name, x in run(arrays, d_o, options).items()}
    for name in ("o", "dq", "lse"):
        assert got[name][1, 2, 5].all()
        got[name][1, 2, 5] = False
        assert not got[name].any(), name
    assert got["dalpha"][1].any() and not got["dalpha"][0].any()
    for name in ("dk", "dv"):
        assert got[name][1, 1].any() and not got[name][0].any() and not got[name][1, 0].any()


def test_failing_allocations_raise(isa):
    arrays, d_o, options = make(DEFAULT, 0, "float32")
    good = run(arrays, d_o, options)
    inputs = [arrays[name] for name in NAMES]
    _C._fail_allocation(1)
    with pytest.raises(MemoryError):
        _C.learn_forward(*inputs, **options)
    for n in (1, 2):
        _C._fail_allocation(n)
        with pytest.raises(MemoryError):
            _C.learn_backward(d_o, good["o"], good["lse"], *inputs, **options)
    _C._fail_allocation(0)
    assert_same(run(arrays, d_o, options), good)


# ------------------------------------------------------------------------------------------ errors

F32 = np.float32
REFUSED = {
    "q_list": ({"q": [1.0]}, TypeError, "q: expected a NumPy array, got list"),
    "q_dtype": ({"q": np.zeros((1, 2, 3, 8))}, TypeError, "q: expected dtype float32, .* float64"),
    "q_heads": (
        {"q": np.zeros((1, 3, 3, 8), F32)},
        ValueError,
        "q: expected a multiple of 2 heads",
    ),
    "q_axes": ({"q": np.zeros((2, 3, 8), F32)}, ValueError, "q: expected .* got \\(2, 3, 8\\)"),
    "q_empty": ({"q": np.zeros((1, 2, 0, 8), F32)}, ValueError, "q: expected a number of columns"),
    "q_dim": ({"q": np.zeros((1, 2, 3, 520), F32)}, ValueError, "q: expected a head dim from 1 to"),
    "k_dtype": ({"k": np.zeros((1, 2, 3, 8))}, TypeError, "k: expected dtype float32, got float64"),
    "k_columns": (
        {"k": np.zeros((1, 2, 4, 8), F32)},
        ValueError,
        r"k: expected \(1, any, 3, 8\), got \(1, 2, 4, 8\)",
    ),
    "v_heads": ({"v": np.zeros((1, 1, 3, 8), F32)}, ValueError, r"v: expected \(1, 2, 3, any\)"),
    "v_context": (
        {"v_context": np.zeros((1, 2, 6, 8), F32)},
        ValueError,
        r"v_context: expected \(1, 2, 5, 8\), got \(1, 2, 6, 8\)",
    ),
    "k_context": (
        {"k_context": np.zeros((1, 2, 5, 16), F32)[..., ::2]},
        ValueError,
        "k_context: expected an aligned array whose last axis is contiguous",
    ),
    "alpha_shape": ({"alpha": np.zeros((2, 9), F32)}, ValueError, r"alpha: expected \(2, 8\)"),
    "alpha_dtype": ({"alpha": np.zeros((2, 8))}, TypeError, "alpha: expected dtype float32"),
    "sink": ({"sink": -1}, ValueError, "sink: expected at least 0"),
    "recent": ({"recent": 0}, ValueError, "recent: expected at least 1"),
    "scale": ({"scale": np.inf}, ValueError, "scale: expected a finite number, got inf"),
    "start_dtype": ({"start": np.zeros(1, np.int32)}, TypeError, "start: expected dtype int64"),
    "start_range": ({"start": np.array([9])}, ValueError, "start: expected values from 0 to 8"),
    "start_below": ({"start": np.array([-1])}, ValueError, "start: .* got -1 for row 0"),
    "hidden": ({"hidden": np.zeros(3, bool)}, ValueError, r"hidden: expected \(2,\), got \(3,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_named(name):
    change, error, message = REFUSED[name]
    small = {"D": 8, "T": 3, "Lc": 5, "R": 1, "start": (0,)}
    arrays, d_o, options = make(DEFAULT | small, 0, "float32")
    good = run(arrays, d_o, options)
    mixed = arrays | options | change
    inputs = [mixed.pop(key) for key in NAMES]
    with pytest.raises(error, match=message):
        _C.learn_forward(*inputs, **mixed)
    with pytest.raises(error, match=message):
        _C.learn_backward(d_o, good["o"], good["lse"], *inputs, **mixed)


def test_what_only_the_backward_takes_is_checked():
    arrays, d_o, options = make(DEFAULT, 0, "float32")
    o, lse = _C.learn_forward(*arrays.values(), **options)
    with pytest.raises(ValueError, match=r"d_o: expected \(2, 4, 40, 64\), got \(2, 4, 39, 64\)"):
        _C.learn_backward(d_o[:, :, 1:], o, lse, *arrays.values(), **options)
    with pytest.raises(TypeError, match="o: expected dtype float32, got float64"):
        _C.learn_backward(d_o, o.astype(float), lse, *arrays.values(), **options)
    with pytest.raises(ValueError, match=r"lse: expected \(2, 4, 40\), got \(2, 4, 39\)"):
        _C.learn_backward(d_o, o, lse[:, :, 1:], *arrays.values(), **options)
    for missing in ("sink", "recent", "scale"):
        rest = {name: x for name, x in options.items() if name != missing}
        with pytest.raises(TypeError, match=f"missing required keyword argument: '{missing}'"):
            _C.learn_forward(*arrays.values(), **rest)
