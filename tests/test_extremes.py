"""Values at the ends of a dtype: no NaN or infinity that the rule has not, within the budget."""

import numpy as np
import pytest

from leank import LayerCache, decode

from .compare import EPS, assert_within_budget, encode
from .compare import decode as widen
from .conftest import DTYPES, random_keep
from .decode_tools import expected
from .reference import History

HEADS, D, L = (0, 8, 32), 32, 140
WINDOW = {"sink": 3, "recent": 30, "slack": 0}
# Of these the inverse is a normal number too, but in float16.
LARGEST = {"float32": 2.0**126, "bfloat16": 2.0**126, "float16": 2.0**15}
SMALLEST = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}


def signs(rng, *shape):
    return rng.choice([-1.0, 1.0], shape)


def equal_keys(rng, dtype, q, k, v):
    return q, np.broadcast_to(k[:, :1], k.shape), v


def logits_of_1e4(rng, dtype, q, k, v):
    """Of both signs, no two the same, and all exact: one key takes everything."""
    q = np.zeros_like(q)
    q[..., 0] = 1e4
    k = np.zeros_like(k)
    k[..., 0] = rng.permuted(np.arange(-64, 76)[: k.shape[1]] / 64, axis=0)[:, None].T
    return q, k, v


def denormal(rng, dtype, q, k, v):
    small = 3 * SMALLEST[dtype]
    return q, small * signs(rng, *k.shape), small * signs(rng, *v.shape)


def large_k(rng, dtype, q, k, v):
    large = LARGEST[dtype]
    return signs(rng, *q.shape) / large, large * signs(rng, *k.shape), v


def large_q(rng, dtype, q, k, v):
    large = LARGEST[dtype]
    return large * signs(rng, *q.shape), signs(rng, *k.shape) / large, v


def large_v(rng, dtype, q, k, v):
    """Sums over the tokens fit: they are divided by their weights at the end, as torch does."""
    return q, k, LARGEST[dtype] / 256 * rng.uniform(0.5, 1, v.shape)


def all_zero(rng, dtype, q, k, v):
    return 0 * q, 0 * k, 0 * v


CASES = [equal_keys, logits_of_1e4, denormal, large_k, large_q, large_v, all_zero]


@pytest.mark.parametrize("n_new", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(rng, dtype, case, n_new, isa):
    keep = random_keep(rng, D, HEADS)
    keep[1:, 0] = keep[1:].sum(1) > 0  # channel 0 is kept where any is
    keep[1] = np.arange(D) < 8
    q = rng.standard_normal((2 * len(HEADS), n_new, D))
    k, v = (rng.standard_normal((len(HEADS), L, D)) for _ in "kv")
    q, k, v = (encode(np.float32(x), dtype)[None] for x in case(rng, dtype, q, k, v))
    cache = LayerCache(keep, n_rows=1, dtype=dtype, **WINDOW)
    history = History(1, page=64, **WINDOW)
    for part in (slice(0, L - n_new), slice(L - n_new, L)):
        span = k[:, :, part].copy(), v[:, :, part].copy()
        history.put(*span, np.ones((1, span[0].shape[2]), bool))
        if part.start == 0:
            cache.append(*span)
            history.settle()
    o = widen(decode(cache, q, *span), dtype)[0]
    truth, plain = expected(history, 0, q[0], keep, dtype)
    assert np.isfinite(truth).all()
    # The dot product of AVX-512 BF16 takes what is below the smallest normal number for 0.
    lost = 2.0**-126 / EPS["float32"] if isa == "avx512bf16" else 0
    terms = max(np.abs(widen(v, dtype)).max(), lost)
    assert_within_budget(o, truth, plain, dtype, case.__name__, terms=terms)
