"""What the benchmarks share: the machine in words, alternating timing, read bandwidth."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import leank
from leank.bench.profiles import load_profiles

ROOT = Path(__file__).resolve().parents[2]


def cpu_name() -> str:
    """Return the CPU's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """Return the size of the largest CPU cache; 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def commit() -> str:
    """Return the short commit, with a plus sign when the tree has changes."""

    if shutil.which("git") is None:
        return "unknown"

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "-s") else "")


def machine(n_threads: int, seed: int) -> dict[str, object]:
    """Return what a reader needs to compare numbers: machine, versions, commit, seed."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": n_threads,
        "last_level_cache_mib": last_level_cache_bytes() >> 20,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        **{f"leank_{key}": value for key, value in leank.capabilities().items()},
        "commit": commit(),
        "seed": seed,
    }


def gpu() -> dict[str, object]:
    """Return what there is to say about the GPU."""
    driver = "unknown (no nvidia-smi)"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        driver = done.stdout.strip().partition("\n")[0] or "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def load_keep(path: Path | None, seed: int) -> np.ndarray:
    """Return the mask [N, Hkv, D] of a .pth or .safetensors file, or one of Llama-3.1-8B widths."""
    if path is None:
        return load_profiles()["llama-3.1-8b"].keep(seed)
    if path.suffix == ".pth":
        return leank.ChannelMask.from_pth(path).keep
    return leank.ChannelMask.load(path).keep


@dataclass
class Timing:
    """Seconds of one contender over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median * 1e6:9.1f} us ({self.low * 1e6:.1f}..{self.high * 1e6:.1f})"


def alternate(
    contenders: dict[str, Callable[[int], object]], n_rounds: int, warm_up: int = 2
) -> dict[str, Timing]:
    """Time contenders in turn, so that a machine that slows down does so for all.

    Parameters
    ----------
    contenders : dict
        Name to a function of the round's number, which returns how many calls it made, or the
        seconds per call that it measured itself (a float).
    n_rounds : int
        Rounds that count.
    warm_up : int
        Rounds before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm_up + n_rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            result = run(i)
            elapsed = time.perf_counter() - start
            if i >= warm_up:
                each = result if isinstance(result, float) else elapsed / int(result)
                seconds[name].append(each)
    return {
        name: Timing(statistics.median(values), min(values), max(values))
        for name, values in seconds.items()
    }


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return standard normal values as leank takes them: bfloat16 as uint16."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if dtype == "bfloat16":
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return values.astype(dtype)


class ReadBandwidth:
    """Bytes per second of reading memory that is in no cache, with torch's threads.

    The fastest of two reductions counts: which one is faster depends on the CPU. NumPy asks for
    huge pages, as leank does for its slabs.
    """

    def __init__(self, n_bytes: int) -> None:
        buffer = np.ones(n_bytes // 4, dtype=np.float32)
        self.parts = torch.from_numpy(buffer).split(1 << 26)
        self.reductions = {"sum": torch.sum, "amax": torch.amax}

    def contenders(self) -> dict[str, Callable[[int], float]]:
        """Return functions for `alternate` that measure seconds per byte."""

        def run(reduce: Callable, i: int) -> float:
            part = self.parts[i % len(self.parts)]
            start = time.perf_counter()
            reduce(part)
            return (time.perf_counter() - start) / (part.numel() * 4)

        return {
            f"read {name}": lambda i, reduce=reduce: run(reduce, i)
            for name, reduce in self.reductions.items()
        }
