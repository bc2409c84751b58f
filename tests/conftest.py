"""Fixtures and makers of the suite: fixed seeds, poisoned slots, one run per instruction set."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from leank import _C

from .compare import encode

DTYPES = ["float32", "bfloat16", "float16"]

# The same examples on every run and machine; a deadline would be an assertion about time.
settings.register_profile("leank", derandomize=True, deadline=None, database=None)
settings.load_profile("leank")

AVAILABLE = [name for name, available in _C.isa_built().items() if available]


@pytest.fixture(autouse=True)
def _seed():
    random.seed(20250820)
    np.random.seed(20250820)  # noqa: NPY002


@pytest.fixture(scope="session", autouse=True)
def _poison():
    """Fill new pages and twins with NaN, so that reading a slot that was never written shows."""
    _C._poison(True)
    yield
    _C._poison(False)


@pytest.fixture
def rng():
    return np.random.default_rng(20250820)


@pytest.fixture(params=AVAILABLE)
def isa(request):
    """Run the test with each instruction set that this build and machine have."""
    before = _C.isa()
    _C._force_isa(request.param)
    yield request.param
    _C._force_isa(before)


def random_keep(rng, head_dim, widths):
    """Mask [Hkv, D] whose heads keep `widths` random channels."""
    keep = np.zeros((len(widths), head_dim), bool)
    for g, width in enumerate(widths):
        keep[g, rng.permutation(head_dim)[:width]] = True
    return keep


def draw(rng, dtype, *shape):
    """Normal values in a dtype of the cache; bfloat16 as bits."""
    return encode(rng.standard_normal(shape, np.float32), dtype)


def left_padded(counts, n_columns=None):
    """Boolean [B, T]: the last counts[b] columns are tokens."""
    n_columns = max(counts) if n_columns is None else n_columns
    return np.arange(n_columns) >= n_columns - np.array(counts)[:, None]


@pytest.fixture
def fresh_compiler():
    """Count graphs of torch.compile from zero, and leave none behind."""
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request):
    """Where models of tests of a GPU's code are: see cuda_model_tools."""
    from .cuda_model_tools import place_of

    yield from place_of(request.param)


@pytest.fixture(scope="module")
def one(place):
    """Return a tiny Llama there, in bfloat16."""
    from .cuda_model_tools import small

    return small(place)


@pytest.fixture
def reference_mask():
    """Return where a mask of the reference implementation is; skip if it is not here."""
    folder = os.environ.get("LEANK_REFERENCE_MASKS", Path(__file__).parents[2] / "shared" / "masks")

    def find(name):
        path = Path(folder, name)
        if not path.exists():
            pytest.skip(
                f"{name} is not part of the project; LEANK_REFERENCE_MASKS names its folder"
            )
        return path

    return find
