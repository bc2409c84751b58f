"""The extension ``leank._cuda``, or an error that says how to get it."""

import functools
from importlib.util import find_spec

try:
    from leank import _cuda
except ImportError as error:
    if find_spec("leank._cuda") is not None:
        raise  # it is there, and cannot be loaded
    raise ModuleNotFoundError(
        "leank was built without CUDA: install it where nvcc is found, with LEANK_CUDA=1",
        name="leank._cuda",
    ) from error

__all__ = ["_cuda", "device_info"]


@functools.cache
def device_info(device: int) -> dict:
    """Return what ``leank._cuda`` tells of a device, which does not change."""
    return _cuda.device_info(device)
