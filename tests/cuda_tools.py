"""Driving leank.cuda as the suite drives leank.LayerCache: coded NumPy arrays in and out."""

import numpy as np
import pytest

from leank import _C, LayerCache
from leank import decode as cpu_decode

from .compare import assert_within_budget, bits
from .compare import decode as widen
from .conftest import draw, left_padded, random_keep
from .decode_tools import expected, options_of
from .reference import History, attend

torch = pytest.importorskip("torch")

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on_gpu(test):
    """Mark one test, where a file has others too."""
    for mark in needs_gpu:
        test = mark(test)
    return test


def to_gpu(coded):
    """Return a coded array as a tensor on the GPU; uint16 holds bfloat16 bits."""
    x = torch.from_numpy(np.ascontiguousarray(coded))
    if coded.dtype == np.uint16:
        x = x.view(torch.bfloat16)
    return x.cuda()


def to_coded(x):
    """Return a tensor as a coded array."""
    x = x.cpu()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def make(keep, dtype, **options):
    """Return a cache whose unused slots hold NaN."""
    from leank.cuda import LayerCache

    cache = LayerCache(keep, dtype=TORCH_DTYPES[dtype], **options)
    cache.slab.fill_(0xFF)
    return cache


def assert_same_contents(gpu, cpu, dtype):
    """Compare what a GPU cache stores with a CPU cache, bit for bit, and the bytes it takes."""
    assert gpu.lengths.tolist() == cpu.lengths.tolist()
    assert gpu.lo.tolist() == cpu.lo.tolist()
    assert gpu.n_columns == int(gpu.columns) == cpu.n_columns
    real = gpu._real[:, : cpu.n_columns].cpu().numpy().astype(bool)
    np.testing.assert_array_equal(real, cpu.real)
    for b in range(cpu.n_rows):
        for got, told in zip(gpu.gather(b), cpu.gather(b), strict=True):
            np.testing.assert_array_equal(bits(to_coded(got)), bits(told))
    n_pages = -(-gpu.max_tokens // _C.PAGE_TOKENS)
    assert gpu.memory()["n_pages"] == gpu.n_rows * n_pages


def pretend(monkeypatch, **numbers):
    """Launch as on a GPU that has these numbers instead of its own: n_blocks, smem_bytes."""
    from leank import _cuda_ops

    _cuda_ops.workspace(0)  # is kept, and has to be that of the real device
    info = _cuda_ops._device_info(0) | numbers
    monkeypatch.setattr(_cuda_ops, "_device_info", lambda device: info)


# --------------------------------------------------------------------------- cases, see test_decode


def run_steps(case, seed, dtype):
    """Run the steps on the GPU, the CPU and a history; check outputs and what is stored."""
    from leank.cuda import decode

    rng = np.random.default_rng(seed)
    keep = random_keep(rng, case["D"], case["widths"])
    terms = {name: x for name, x in options_of(case, keep).items() if x is not None}
    on_gpu = terms | ({"sinks": to_gpu(terms["sinks"])} if "sinks" in terms else {})
    window = dict(zip(("sink", "recent", "slack"), case["window"], strict=True))
    n_rows = len(case["steps"][0][1])
    history = History(n_rows, page=64, **window)
    n_columns = sum(max(step[1]) for step in case["steps"] if step[0] in ("append", "decode"))
    gpu = make(keep, dtype, n_rows=n_rows, max_tokens=n_columns, **window)
    cpu = LayerCache(keep, n_rows=n_rows, dtype=dtype, **window)
    for i, (op, argument) in enumerate(case["steps"]):
        if op in ("crop", "select"):
            for cache in (history, gpu, cpu):
                as_array = cache is cpu and op == "select"
                getattr(cache, op)(np.array(argument) if as_array else argument)
            assert_same_contents(gpu, cpu, dtype)
            continue
        valid = left_padded(argument)
        shape = (len(valid), len(keep), valid.shape[1], case["D"])
        k, v = draw(rng, dtype, *shape), draw(rng, dtype, *shape)
        q = draw(rng, dtype, shape[0], shape[1] * case["R"], *shape[2:])
        history.put(k, v, valid)
        if op == "append":
            gpu.append(to_gpu(k), to_gpu(v), to_gpu(valid))
            cpu.append(k, v, valid)
        else:
            inputs = (to_gpu(x) for x in (q, k, v))
            out, lse = decode(gpu, *inputs, valid=to_gpu(valid), return_lse=True, **on_gpu)
            other = widen(cpu_decode(cpu, q, k, v, valid=valid, **terms), dtype)
            check(history, keep, q, to_coded(out), lse.cpu().numpy(), other, dtype, i, terms)
        history.settle()
        assert_same_contents(gpu, cpu, dtype)


def check(history, keep, q, out, lse, other, dtype, i, terms):
    """Compare with the truth, and the CPU's result with it too."""
    for b in range(len(q)):
        label = f"step {i} row {b}"
        got, wanted = widen(out[b], dtype), expected(history, b, q[b], keep, dtype, **terms)
        padding = np.array(history.positions(b, q.shape[2])) < 0
        assert not got[:, padding].any(), label
        assert (np.isneginf(lse[b]) == padding).all(), label
        if wanted is None:
            continue
        assert_within_budget(got, *wanted, dtype, label)
        assert_within_budget(other[b], *wanted, dtype, f"{label} on the CPU")
        assert_lse(history, keep, b, q, lse[b], dtype, terms)


def assert_lse(history, keep, b, q, lse, dtype, terms):
    row = history.rows[b]
    k, v = (widen(np.stack(x, axis=1), dtype).astype(np.float64) for x in (row.k, row.v))
    rule = {"sink": history.sink, "recent": history.recent, "lo": row.lo, "n0": row.n0}
    positions = history.positions(b, q.shape[2])
    q64 = widen(q[b], dtype).astype(np.float64)
    truth = attend(q64, k, v, positions, keep, scale=q.shape[3] ** -0.5, **rule, **terms)[1]
    is_token = np.array(positions) >= 0
    np.testing.assert_allclose(lse[:, is_token], truth[:, is_token], rtol=2e-3, atol=2e-3)
