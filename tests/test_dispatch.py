"""Choosing an instruction set: what is built, what is forced, what is refused."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import leank
from leank import _C

from .conftest import AVAILABLE, draw, random_keep

NAMES = ["scalar", "avx2", "avx512", "avx512bf16", "neon"]


def python(code, **environment):
    """Run code in a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "LEANK_ISA"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_scalar_is_always_there_and_last():
    built = _C.isa_built()
    assert set(built) <= set(NAMES)
    assert list(built)[-1] == "scalar" and built["scalar"] is True
    assert set(map(type, built.values())) == {bool}


def test_each_variant_can_be_forced(isa):
    assert _C.isa() == isa
    assert leank.capabilities()["isa"] == isa


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_an_unknown_name_is_refused_and_changes_nothing(name):
    before = _C.isa()
    with pytest.raises(ValueError, match=f"name: expected .*'scalar': True.*, got '{name}'"):
        _C._force_isa(name)
    assert _C.isa() == before
    with pytest.raises(TypeError):
        _C._force_isa(1)


def test_best_is_the_default():
    done = python("from leank import _C; print(_C.isa())")
    assert done.stdout.split() == AVAILABLE[:1], done.stderr
    # An empty value is as good as none.
    done = python("from leank import _C; print(_C.isa())", LEANK_ISA="")
    assert done.stdout.split() == AVAILABLE[:1], done.stderr


@pytest.mark.parametrize("name", AVAILABLE)
def test_environment_forces(name):
    done = python("import leank; print(leank.capabilities()['isa'])", LEANK_ISA=name)
    assert done.stdout.split() == [name], done.stderr


DECODE = """
import numpy as np, leank
cache = leank.LayerCache(np.ones((1, 8), bool), n_rows=1, sink=0, recent=1)
x = np.ones((1, 1, 1, 8), np.float32)
try:
    leank.decode(cache, x, x, x)
except ValueError as error:
    print(error)
    print(cache.n_columns)
"""


def test_environment_with_an_unknown_name():
    done = python("import leank; leank.capabilities()", LEANK_ISA="sse9")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: LEANK_ISA: expected ")
    assert last.endswith("got 'sse9'")
    assert all(repr(name) in last for name in _C.isa_built())
    # Whoever computes without asking first must not get another variant than the one named.
    done = python(DECODE, LEANK_ISA="sse9")
    message, n_columns = done.stdout.strip().splitlines()
    assert "instruction set" in message and n_columns == "0", done.stderr


def test_importing_does_not_need_a_variant():
    done = python("import leank; print(leank.__version__)", LEANK_ISA="sse9")
    assert done.stdout.split() == [leank.__version__], done.stderr


def test_capabilities():
    found = leank.capabilities()
    assert found["version"] == leank.__version__
    assert found["isa_built"] == _C.isa_built()
    assert found["isa_built"][found["isa"]]
    assert isinstance(found["compiler"], str) and isinstance(found["openmp"], int)
    if find_spec("leank._cuda"):
        assert all(name.startswith(("sm_", "compute_")) for name in found["cuda_built"])
    else:
        assert found["cuda_built"] is None
    assert isinstance(found["cuda_devices"], dict)


def test_constants():
    assert (_C.PAGE_TOKENS, _C.CHANNEL_STEP, _C.MAX_HEAD_DIM) == (64, 8, 512)


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="this machine runs one variant only")
def test_variants_are_not_all_the_same_code(rng):
    """Forcing has an effect: variants sum in different orders, so some last bits differ."""
    keep = random_keep(rng, 128, (64, 128))
    shape = (1, 2, 1000, 128)
    cache = leank.LayerCache(keep, n_rows=1, sink=4, recent=64)
    cache.append(draw(rng, "float32", *shape), draw(rng, "float32", *shape))
    q, k, v = (draw(rng, "float32", 1, n, 1, 128) for n in (8, 2, 2))
    before, outputs = _C.isa(), set()
    for name in AVAILABLE:
        _C._force_isa(name)
        outputs.add(leank.decode(cache.copy(), q, k, v).tobytes())
    _C._force_isa(before)
    assert len(outputs) > 1
    assert np.isfinite(np.frombuffer(outputs.pop(), np.float32)).all()
