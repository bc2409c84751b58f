"""Timing contenders in turn, and the rates at which the machine only reads, or only multiplies.

Contenders take turns within a round, so that a machine that slows down does so for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from leank.bench.lines import Timing
from leank.bench.machine import last_level_cache_bytes

_WARM_UPS = 2
# Larger than any cache of a GPU, and so that what starts and ends a kernel does not count.
_GPU_READ_BYTES = 4 << 30


def alternate(
    contenders: Mapping[str, Callable[[int], int | float]], n_rounds: int
) -> dict[str, Timing]:
    """Time contenders on the CPU.

    Parameters
    ----------
    contenders : mapping
        Name to a function of the round's number, which returns how many calls it made (an int), or
        the seconds per call that it measured itself (a float).
    n_rounds : int
        Rounds that count; there are two before them.

    Returns
    -------
    dict
        Microseconds per call, by name.
    """
    us: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(_WARM_UPS + n_rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            result = run(i)
            elapsed = time.perf_counter() - start
            if i >= _WARM_UPS:
                us[name].append(
                    1e6 * (result if isinstance(result, float) else elapsed / int(result))
                )
    return {name: Timing.of(values) for name, values in us.items()}


class ReadRate:
    """The rate of reading memory of the CPU that is in no cache, with torch's threads.

    The fastest of two reductions counts: which one is faster depends on the CPU. NumPy asks for
    huge pages, as leank does for its slabs.
    """

    _REDUCTIONS: Mapping[str, Callable] = {"read, sum": torch.sum, "read, amax": torch.amax}

    def __init__(self, n_bytes: int) -> None:
        buffer = np.ones(n_bytes // 4, dtype=np.float32)
        self._parts = torch.from_numpy(buffer).split(1 << 26)

    def contenders(self) -> dict[str, Callable[[int], float]]:
        """Return functions for `alternate` that measure seconds per GB."""

        def run(reduce: Callable, i: int) -> float:
            part = self._parts[i % len(self._parts)]
            start = time.perf_counter()
            reduce(part)
            return (time.perf_counter() - start) / (part.numel() * 4 / 1e9)

        return {
            name: lambda i, reduce=reduce: run(reduce, i)
            for name, reduce in self._REDUCTIONS.items()
        }

    def gb_s(self, times: Mapping[str, Timing]) -> float:
        """Return the rate from what `alternate` found."""
        return 1e6 / min(times[name].median for name in self._REDUCTIONS)


def read_gb_s(device: str, n_rounds: int) -> float:
    """Return the rate of reading memory of a device, where nothing else is timed beside."""
    if device == "cpu":
        read = ReadRate(4 * last_level_cache_bytes())
        return read.gb_s(alternate(read.contenders(), n_rounds))
    free, _ = torch.cuda.mem_get_info()
    buffer = torch.ones(min(_GPU_READ_BYTES, free // 2) // 4, device="cuda")
    us = alternate({"read": timed(lambda: torch.sum(buffer), device)}, n_rounds)["read"]
    return buffer.nbytes / us.median / 1e3


def product_tflop_s(device: str, dtype: torch.dtype, n_rounds: int) -> float:
    """Return the rate of torch's product of two square matrices."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    run = timed(lambda: a @ b, device)
    return 2 * n**3 / alternate({"product": run}, n_rounds)["product"].median / 1e6


def timed(run: Callable[[], object], device: str) -> Callable[[int], int | float]:
    """Return what `alternate` calls: on a GPU the time between two events on the stream."""

    def on_cuda(_: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def on_cpu(_: int) -> int:
        run()
        return 1

    return on_cuda if device == "cuda" else on_cpu
