"""Driving leank.cuda as the suite drives leank.LayerCache: coded NumPy arrays in and out."""

import numpy as np
import pytest

from leank import _C

from .compare import bits

torch = pytest.importorskip("torch")

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


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
