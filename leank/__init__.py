"""LeanK: attention over a K cache of which a learned, static part is not stored.

Importing this module changes nothing in any other library, and imports none but NumPy; what needs
PyTorch and transformers is imported when it is first used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from leank import _C, shipped
from leank._C import LayerCache, decode
from leank._versions import old_transformers
from leank.mask_source import load_mask
from leank.masks import ChannelMask, MaskFileError

if TYPE_CHECKING:
    from leank._patch import make_cache, patch, unpatch
    from leank.cache import LeanKCache
    from leank.learning.run import learn, learn_many
    from leank.memory import memory_report

__version__ = "0.1.0"

_NEEDS_TORCH = {
    "LeanKCache": "leank.cache",
    "learn": "leank.learning.run",
    "learn_many": "leank.learning.run",
    "make_cache": "leank._patch",
    "memory_report": "leank.memory",
    "patch": "leank._patch",
    "unpatch": "leank._patch",
}
_MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]

__all__ = [
    "ChannelMask",
    "LayerCache",
    "LeanKCache",
    "MaskFileError",
    "capabilities",
    "decode",
    "learn",
    "learn_many",
    "load_mask",
    "make_cache",
    "memory_report",
    "patch",
    "shipped",
    "unpatch",
]
if _MISSING:  # `from leank import *` and help(leank) ask for every name
    __all__ = [name for name in __all__ if name not in _NEEDS_TORCH]


def __getattr__(name: str) -> object:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'leank' has no attribute {name!r}")
    if _MISSING:
        raise AttributeError(
            f"leank.{name} needs {' and '.join(_MISSING)}: pip install 'leank[hf]'", name=name
        )
    if problem := old_transformers():
        raise AttributeError(f"leank.{name} needs another version of {problem}", name=name)
    return getattr(import_module(_NEEDS_TORCH[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def capabilities() -> dict[str, object]:
    """Tell what was built and what this machine can run.

    Returns
    -------
    dict
        ``version``; ``isa``, the variant in use; ``isa_built``, {variant: can run here}, best
        first; ``compiler``; ``openmp``, the version date of OpenMP, 0 when built without;
        ``threads``, what ``decode`` uses unless it is told (a patched model: what torch uses);
        ``cuda_built``, the architectures that kernels were built for, None when built without;
        ``cuda_devices``, {number: (major, minor) compute capability} of the GPUs that can be seen.

    Raises
    ------
    ValueError
        ``LEANK_ISA`` names a variant that is not built or cannot run here.
    """
    return {
        "version": __version__,
        "isa": _C.isa(),
        "isa_built": _C.isa_built(),
        **_C.build_info(),
        **_cuda_capabilities(),
    }


def _cuda_capabilities() -> dict[str, object]:
    if find_spec("leank._cuda") is None:
        return {"cuda_built": None, "cuda_devices": {}}
    cuda = import_module("leank._cuda")
    devices = range(cuda.device_count())
    return {
        "cuda_built": cuda.built().split(","),
        "cuda_devices": {i: cuda.device_info(i)["capability"] for i in devices},
    }
