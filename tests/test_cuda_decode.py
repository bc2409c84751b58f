"""leank.cuda.decode against the float64 rule and the CPU op: dtypes, widths, shapes, windows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .compare import decode as widen
from .conftest import draw, left_padded, random_keep
from .cuda_tools import make, needs_gpu, pretend, run_steps, to_coded, to_gpu, torch

pytestmark = needs_gpu
_cuda_ops = pytest.importorskip("leank._cuda_ops", reason="leank was built without CUDA")
DTYPES = ["bfloat16", "float16"]

# As in test_decode: sizes, window, and steps; decodes bring one column.
DEFAULT = {
    "D": 64,
    "widths": (0, 8, 24, 64),
    "R": 2,
    "window": (10, 40, 20),
    "steps": (("append", (200, 70)), ("decode", (1, 1)), ("decode", (1, 1))),
}
MIXED = (("append", (300, 65)), ("decode", (1, 1)), ("decode", (1, 0)), ("decode", (1, 1)))
CASES = {
    **{f"R{R}": {"R": R} for R in (1, 3, 4, 7, 8, 9, 12, 16)},
    **{f"D{D}": {"D": D, "widths": (0, 8, 24, D - 8, D), "steps": MIXED} for D in (80, 96, 128)},
    **{f"D{D}_R16": {"D": D, "widths": (0, 40, D), "R": 16, "steps": MIXED} for D in (80, 96, 128)},
    "mqa": {"widths": (24,), "R": 8, "steps": MIXED},
    "mha_of_many": {"widths": (0, 8, 16, 24, 32, 40, 48, 56, 64), "R": 1},
    "all_kept": {"widths": (64, 64), "steps": MIXED},
    "all_empty": {"widths": (0, 0), "steps": MIXED},
    "ragged": {
        "R": 1,
        "steps": (
            ("append", (0, 1, 5, 63, 64, 65, 170)),
            ("decode", (1, 1, 1, 1, 1, 1, 1)),
            ("decode", (0, 1, 0, 1, 0, 1, 1)),
            ("decode", (1, 0, 0, 1, 1, 0, 0)),
        ),
    },
    "no_prompt": {"steps": (("decode", (1, 0)), ("decode", (1, 1)), ("decode", (1, 1)))},
    "long": {
        "D": 128,
        "R": 4,
        "widths": (0, 16, 64, 128),
        "window": (64, 128, 64),
        "steps": (("append", (3000, 1500)), ("decode", (1, 1)), ("decode", (1, 1))),
    },
    "turns": {
        "widths": (0, 24),
        "steps": (
            ("append", (150, 90)),
            ("decode", (1, 1)),
            ("append", (70, 200)),
            ("decode", (1, 1)),
            ("append", (1, 0)),
            ("decode", (1, 1)),
        ),
    },
    "crop_to_middle": {
        "window": (10, 40, 0),
        "steps": (
            ("append", (400, 150)),
            ("crop", 290),
            ("decode", (1, 1)),
            ("crop", 100),
            ("decode", (1, 1)),
            ("append", (70, 70)),
            ("decode", (1, 0)),
            ("crop", 0),
            ("append", (70, 20)),
            ("decode", (1, 1)),
        ),
    },
    "select": {
        "widths": (0, 24, 64),
        "steps": (
            ("append", (150, 90, 270)),
            ("decode", (1, 1, 1)),
            ("select", (2, 0, 0)),
            ("decode", (1, 1, 0)),
            ("select", (0, 2, 1)),
            ("decode", (1, 1, 1)),
            ("select", (1, 0, 2, 2, 1)),
            ("decode", (1, 0, 1, 1, 1)),
            ("append", (70, 3, 0, 1, 65)),
            ("select", (4, 4)),
            ("crop", 150),
            ("decode", (1, 1)),
        ),
    },
    "many_rows": {
        "R": 1,
        "widths": (0, 8),
        "steps": (("append", tuple(range(0, 400, 3))), ("decode", (1,) * 134)),
    },
}
for window in [
    (0, 1, 0),
    (0, 40, 0),
    (7, 1, 0),
    (33, 30, 5),
    (63, 63, 0),
    (64, 64, 0),
    (65, 65, 1),
    (1000, 10, 3),
    (10, 10**12, 3),
]:
    CASES["window_{}_{}_{}".format(*window)] = {
        "window": window,
        "widths": (0, 8),
        "steps": (("append", (126, 200, 260)), *[("decode", (1, 1, 1))] * 4),
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_equals_rule(name, dtype):
    run_steps(DEFAULT | CASES[name], len(name), dtype)


def fixed_smem_bytes(case):
    """Bytes that a block needs beside its ring: decode_smem::fixed_bytes in decode_shape.cuh."""
    D, R, n_heads = case["D"], case["R"], len(case["widths"])
    n_rows = len(case["steps"][0][1])
    column_tiles, compute_warps = (1, 8) if R <= 8 else (2, 4)
    q = 2 * 2 * (R + 2) * D + 4 * 2 * column_tiles * (D // 16) * 2 * 32
    states = 4 * compute_warps * R * (2 + D + 4)
    return q + 8 * 40 + 2 * 32 + states + 4 * (1 + 3 * n_rows + n_heads) + n_heads * D


@pytest.mark.parametrize("n_blocks, n_stages", [(1, 6), (2, 2), (7, 3)])
@pytest.mark.parametrize("name", ["long", "ragged", "turns", "many_rows", "R7", "R16", "D80"])
def test_few_blocks_and_short_rings(monkeypatch, name, n_blocks, n_stages):
    """Few blocks cut the work into many chunks; a short ring is used again and again."""
    case = DEFAULT | CASES[name]
    smem_bytes = fixed_smem_bytes(case) + n_stages * 256 * case["D"]
    assert smem_bytes <= _cuda_ops._device_info(0)["smem_bytes"]
    pretend(monkeypatch, n_blocks=n_blocks, smem_bytes=smem_bytes)
    run_steps(case, len(name), "bfloat16")


@st.composite
def cases(draw):
    D = draw(st.sampled_from((64, 80, 96, 128)), "D")
    n_rows = draw(st.integers(1, 4), "B")
    widths = st.lists(
        st.sampled_from(sorted({0, 8, D // 16 * 8, D - 8, D})), min_size=1, max_size=5
    )
    counts = st.tuples(*[st.integers(0, 400)] * n_rows).filter(any)
    ones = st.tuples(*[st.integers(0, 1)] * n_rows).filter(any)
    return {
        "D": D,
        "widths": draw(widths, "widths"),
        "R": draw(st.integers(1, 16), "R"),
        "window": draw(st.tuples(st.integers(0, 130), st.integers(1, 130), st.integers(0, 70))),
        "steps": (
            ("append", draw(counts)),
            *(("decode", draw(ones)) for _ in range(draw(st.integers(0, 2)))),
            ("append", draw(counts)),
            ("decode", draw(ones)),
        ),
    }


@given(cases(), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=60)
def test_decode_of_random_shapes(case, dtype, seed):
    run_steps(case, seed, dtype)


# ------------------------------------------------------------------------- inputs beside q, k and v


def filled(rng, dtype, lengths=(700, 100), widths=(0, 8, 24, 128), D=128, **options):
    """Return a cache with a prompt, and the mask."""
    keep = random_keep(rng, D, widths)
    options = {"sink": 10, "recent": 40, "slack": 20, "max_tokens": max(lengths) + 70} | options
    cache = make(keep, dtype, n_rows=len(lengths), **options)
    valid = left_padded(lengths)
    shape = (len(lengths), len(widths), valid.shape[1], D)
    cache.append(to_gpu(draw(rng, dtype, *shape)), to_gpu(draw(rng, dtype, *shape)), to_gpu(valid))
    return cache


def step(rng, cache, dtype, R=4):
    """Draw q, k and v of one column on the GPU."""
    shape = (cache.n_rows, cache.n_heads, 1, cache.head_dim)
    q = draw(rng, dtype, shape[0], shape[1] * R, 1, shape[3])
    return [to_gpu(x) for x in (q, draw(rng, dtype, *shape), draw(rng, dtype, *shape))]


def visible(cache, b, g, position):
    """Return float64 k, v of the keys that head g of row b sees, and which keep all channels."""
    k, v = (widen(to_coded(x), "bfloat16").astype(np.float64)[g] for x in cache.gather(b))
    j = np.arange(position + 1)
    window = (j < cache.sink) | ((j >= int(cache.lo[b])) & (position - j < cache.recent))
    return k, v, window


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_sinks_and_lse(rng, softcap, with_sinks):
    from leank.cuda import decode

    cache = filled(rng, "bfloat16")
    q, k, v = step(rng, cache, "bfloat16")
    sinks = torch.randn(q.shape[1], device="cuda") * 3 if with_sinks else None
    out, lse = decode(cache, q, k, v, softcap=softcap, sinks=sinks, scale=0.2, return_lse=True)
    q64 = widen(to_coded(q), "bfloat16").astype(np.float64)
    for b, length in enumerate(cache.lengths.tolist()):
        for h in range(q.shape[1]):
            g = h // 4
            kept = cache.keep[g]
            k64, v64, window = visible(cache, b, g, length - 1)
            s = np.where(kept, k64, 0) @ q64[b, h, 0]
            s[window] = k64[window] @ q64[b, h, 0]
            s *= 0.2
            if softcap:
                s = softcap * np.tanh(s / softcap)
            seen = window | kept.any()
            s, values = s[seen], v64[seen]
            logits = np.append(s, float(sinks[h])) if with_sinks else s
            total = math.log(np.exp(logits - logits.max()).sum()) + logits.max()
            truth = np.exp(s - total) @ values
            np.testing.assert_allclose(float(lse[b, h, 0]), total, rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(
                out[b, h, 0].float().cpu().numpy(), truth, rtol=2e-2, atol=1e-2
            )


def test_sliced_inputs(rng):
    """Strided q, k and v, as a model's views of one projection are."""
    from leank.cuda import decode

    caches = [filled(np.random.default_rng(1), "bfloat16") for _ in range(2)]
    q, k, v = step(rng, caches[0], "bfloat16")
    fused = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    parts = fused.split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
    assert torch.equal(decode(caches[0], q, k, v), decode(caches[1], *parts))


@pytest.mark.parametrize("lengths", [(5000, 70, 900), (6000,) * 8], ids=["ragged", "many chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_agree_bit_for_bit(rng, dtype, lengths):
    """Which block takes which part of the work differs from run to run, the result does not."""
    from leank.cuda import decode

    cache = filled(rng, dtype, lengths, widths=(0, 8, 24, 128, 64, 64, 32, 96))
    q, _, _ = step(rng, cache, dtype)
    first = decode(cache, q)
    for _ in range(30):
        assert torch.equal(decode(cache, q), first)


def test_attending_to_what_is_stored(rng):
    """Without k and v the last column is attended again, and nothing changes."""
    from leank.cuda import decode

    cache = filled(rng, "bfloat16")
    q, k, v = step(rng, cache, "bfloat16")
    out = decode(cache, q, k, v)
    for _ in range(2):
        assert torch.equal(decode(cache, q), out)
    assert cache.n_columns == 701
    cache.append(k, v, torch.tensor([[True], [False]], device="cuda"))
    out = decode(cache, q)
    assert out[0].any() and not out[1].any()


def test_append_equals_decode(rng):
    """A column that is stored by append is what decode stores."""
    from leank.cuda import decode

    caches = [filled(np.random.default_rng(1), "bfloat16") for _ in range(2)]
    for _ in range(70):
        q, k, v = step(rng, caches[0], "bfloat16")
        out = decode(caches[0], q, k, v)
        caches[1].append(k, v)
        assert torch.equal(decode(caches[1], q), out)
    for b in range(2):
        for x, y in zip(caches[0].gather(b), caches[1].gather(b), strict=True):
            assert torch.equal(x.view(torch.int16), y.view(torch.int16))
