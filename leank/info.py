"""What this machine is and what was built for it: the facts of ``leank info``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import leank

_PACKAGES = ("torch", "transformers", "numpy")


def facts() -> dict[str, Any]:
    """Return versions, instruction sets, threads and GPUs; imports torch if it is there.

    Returns
    -------
    dict
        What ``leank.capabilities()`` returns, and ``versions``, {name: version, None if not
        installed}; ``machine``; ``cpus`` that this process may use; ``torch_threads``, of a patched
        model, None without torch; ``gpus``, a list of name, capability and whether kernels were
        ``built`` that it can run.

    Raises
    ------
    ValueError
        ``LEANK_ISA`` names a variant that is not built or cannot run here.
    """
    found = leank.capabilities()
    torch = import_module("torch") if find_spec("torch") else None
    devices: dict[int, tuple[int, int]] = dict(found["cuda_devices"])
    names = dict.fromkeys(devices, "name not known without torch")
    for i in range(torch.cuda.device_count() if torch else 0):
        devices[i] = torch.cuda.get_device_capability(i)
        names[i] = torch.cuda.get_device_name(i)
    versions = {"python": platform.python_version(), "leank": leank.__version__}
    return found | {
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "cpus": _n_cpus(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "gpus": [
            {
                "name": names[i],
                "capability": list(capability),
                "built": can_run(found["cuda_built"] or (), capability),
            }
            for i, capability in sorted(devices.items())
        ],
    }


def can_run(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Tell whether a GPU can run kernels that were built for these architectures.

    Code for a GPU ("sm") runs on its successors of the same major number, PTX ("compute") on all
    later ones; with an "a" behind it, both run on that GPU alone.

    Examples
    --------
    >>> built = ["sm_80", "sm_90a", "compute_90"]
    >>> [can_run(built, gpu) for gpu in ((7, 5), (8, 6), (9, 0), (12, 0))]
    [False, True, True, True]
    """
    for name in built:
        kind, major, minor, exact = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", name).groups()
        target = int(major), int(minor)
        if exact:
            runs = capability == target
        elif kind == "sm":
            runs = capability[0] == target[0] and capability >= target
        else:
            runs = capability >= target
        if runs:
            return True
    return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _n_cpus() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
