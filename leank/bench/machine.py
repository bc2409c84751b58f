"""The machine, the versions and the commit in words: what a reader needs to compare numbers."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

import leank
from leank.bench.work import BenchError

_PACKAGE = Path(leank.__file__).resolve().parent


def facts(device: str, seed: int, **settings: object) -> dict[str, str | int | float]:
    """Return machine, versions, commit, seed and settings by name, in the order of a header.

    Parameters
    ----------
    device : str
        "cpu", or "cuda": then the GPU in use is described, else the CPU.
    seed : int
    **settings
        What else decides about the numbers.
    """
    where = _gpu() if device == "cuda" else _cpu()
    return where | {
        "torch": torch.__version__,
        "leank": f"{leank.__version__}, commit {commit()}",
        "date": datetime.date.today().isoformat(),
        **settings,
        "seed": seed,
    }


def need_gpu() -> None:
    """Raise BenchError where there is none that torch can use."""
    if not torch.cuda.is_available():
        raise BenchError(f"needs an NVIDIA GPU; torch {torch.__version__} finds none")


@contextlib.contextmanager
def threads(n: int | None) -> Iterator[None]:
    """Let torch use so many threads of the CPU; None: as many as it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> dict[str, str | int]:
    found = leank.capabilities()
    return {
        "CPU": cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "cache": f"{last_level_cache_bytes() >> 20} MiB, the last level",
        "variant": f"{found['isa']}, {found['compiler']}",
        "numpy": np.__version__,
    }


def _gpu() -> dict[str, str | int]:
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": _driver(),
        "CUDA": torch.version.cuda or "none",
        "cuDNN": str(torch.backends.cudnn.version()),
        "FlashInfer": _flashinfer_version(),
        "kernels": ", ".join(leank.capabilities()["cuda_built"] or ["not built"]),
    }


def cpu_name() -> str:
    """Return the CPU's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Return the size of the largest CPU cache; 32 MiB at least, also where nothing is told."""
    sizes = [32 << 20]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def commit() -> str:
    """Return the short commit of a checkout, with a plus sign when it has changes.

    An installed package is in no repository of its own: "unknown".
    """

    def git(*args: str) -> str:
        words = ["git", "-C", str(_PACKAGE), *args]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or Path(git("rev-parse", "--show-toplevel")) != _PACKAGE.parent:
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--short") else "")


def _driver() -> str:
    """Return the version of the driver; torch only knows that of the CUDA interface."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 else "unknown"


def _flashinfer_version() -> str:
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:  # built from source under another name
        return "unknown version"
