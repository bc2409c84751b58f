"""Comparing with the float64 truth; the plain same-dtype computation measures the error.

Arrays that cross the boundary ("coded") are float32, float16, or uint16 holding bfloat16 bits.
"""

import numpy as np

from .reference import attend

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def encode(x, dtype):
    """Round to the dtype, nearest even; bfloat16 becomes uint16 bits."""
    if dtype != "bfloat16":
        return np.asarray(x).astype(dtype)
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(coded, dtype):
    """Widen coded values to float32, which holds all of them."""
    if dtype != "bfloat16":
        return np.asarray(coded).astype(np.float32)
    return (coded.astype(np.uint32) << 16).view(np.float32)


def bits(coded):
    """Bit patterns of a coded array, so that NaN equals the same NaN."""
    return coded.view({2: np.uint16, 4: np.uint32}[coded.dtype.itemsize])


def truth_and_plain(q, k, v, positions, keep, dtype, **rule):
    """Attend in float64, and plainly: f32 arithmetic, probabilities and output rounded."""

    def rounded(x):
        return decode(encode(x, dtype), dtype)

    q, k, v = (decode(x, dtype) for x in (q, k, v))
    truth = attend(*(x.astype(np.float64) for x in (q, k, v)), positions, keep, **rule)[0]
    plain = attend(q, k, v, positions, keep, rounded=rounded, **rule)[0]
    return truth, rounded(plain)


def assert_within_budget(actual, truth, plain, dtype, label="", terms=0.0):
    """Require an error of at most twice that of `plain` plus a floor.

    The floor is a rounding or few of the largest value. All three arrays hold real numbers (float32
    or float64). Positions of inf and NaN must be the same first. terms: sum of the absolute values
    that the largest element adds up; where they cancel, one float32 rounding of it is allowed too.
    """
    assert actual.shape == truth.shape, f"{label}: shape {actual.shape}, expected {truth.shape}"
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(test(actual) != test(truth))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            raise AssertionError(
                f"{label}: {name} at {len(wrong)} wrong places, first {at}: "
                f"got {actual[at]}, truth {truth[at]}"
            )
    finite = np.isfinite(truth)
    if not finite.any():
        return
    error = np.where(finite, np.abs(np.where(finite, actual, 0) - np.where(finite, truth, 0)), 0)
    noise = np.abs(plain[finite] - truth[finite]).max()
    roundings = 8 if dtype == "float32" else 0.5
    budget = 2 * noise + roundings * EPS[dtype] * np.abs(truth[finite]).max()
    budget += EPS["float32"] * terms
    at = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    # Written so that a NaN in `error` or `budget` fails.
    assert error[at] <= budget, (
        f"{label}: error {error[at]:.3e} at {at} (got {actual[at]}, truth {truth[at]}), "
        f"budget {budget:.3e} = 2 * {noise:.3e} of the plain {dtype} computation and a floor"
    )
