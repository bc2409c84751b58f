"""``leank bench`` decode and append on an NVIDIA GPU.

LeanK's time is that of decode with the new token stored, mean over the layers of a mask; dense
peers only attend. Each contender is captured in CUDA graphs of as many layers as fit in memory, one
after the other. Before each replay a write of twice the L2 cache evicts what was read before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from leank._cuda_ops import _cuda
from leank.bench import details
from leank.bench.clock import read_gb_s
from leank.bench.layers import Layers, Timer, check, layers_per_graph
from leank.bench.lines import LayerLine, Line, MixedLine, Refusal, Shape, Table, Timing
from leank.bench.machine import need_gpu
from leank.bench.peers import measure_peers
from leank.bench.profiles import dense_bytes, needed_bytes
from leank.bench.work import BenchError, Options, Work


class OnCuda:
    """Checks masks and times shapes on the GPU in use.

    Raises
    ------
    BenchError
        If there is no GPU, or the kernels do not take a mask or a shape.
    """

    def __init__(self, options: Options, works: list[Work]) -> None:
        need_gpu()
        for work in works:
            check_limits(work, options)
        self._options, self._time = options, Timer(options.rounds)
        self._peak_gb_s = read_gb_s("cuda", options.rounds)
        torch.cuda.empty_cache()

    @property
    def how(self) -> str:
        """What the numbers are, for the end of a report."""
        options = self._options
        text = (
            f"Times are us of one layer: medians of {options.rounds} replays of CUDA graphs, with "
            "the L2 cache evicted before each. LeanK stores the new token and attends. "
        )
        if options.per_layer:
            text += "Sum: what torch.sum reads per time of all that the same caches hold. "
        if options.append:
            text += (
                "Storing: by how much more that takes than attending, in the same rounds. "
                "index_copy_: as transformers' static caches store. "
            )
        if not (options.per_layer or options.append or options.mixed):
            text += "Its time is the mean over the layers; dense peers only attend. "
        return text + f"Peak: torch.sum, {self._peak_gb_s:,.0f} GB/s."

    def check(self, work: Work, table: Table) -> None:
        """Check each layer at a length that the kernel cuts into many chunks."""
        table.checked(check(work, self._options))

    def lines(
        self, work: Work, shape: Shape, table: Table
    ) -> Iterator[Line | LayerLine | MixedLine]:
        """Time one shape; what peers refuse goes into the table."""
        options, time = self._options, self._time
        torch.cuda.empty_cache()  # what the last shape held, also if it ran out of memory
        if options.per_layer:
            yield from details.per_layer(work, shape, time, options)
        if options.append:
            yield details.append(work, shape, time, options, self._peak_gb_s)
        if options.mixed:
            yield details.mixed(work, shape, time, options)
        if not (options.per_layer or options.append or options.mixed):
            yield self._against_peers(work, shape, table)

    def _against_peers(self, work: Work, shape: Shape, table: Table) -> Line:
        us = self._leank(work, shape)
        torch.cuda.empty_cache()
        n, dtype = layers_per_graph(work, shape), getattr(torch, self._options.dtype)
        dense_us, reasons = measure_peers(work, shape, n, dtype, self._time)
        table.refusals.extend(Refusal(name, shape, reason) for name, reason in reasons.items())
        needed = [needed_bytes(keep, *shape, **self._options.window) for keep in work.keep]
        return Line(
            shape=shape,
            us=us,
            needed_bytes=float(np.mean(needed)),
            dense_bytes=dense_bytes(work.keep[0], *shape),
            dense_us=dense_us,
            peak_gb_s=self._peak_gb_s,
        )

    def _leank(self, work: Work, shape: Shape) -> Timing:
        """Return the time of one layer, mean over all of them."""
        n, parts, sizes = layers_per_graph(work, shape), [], []
        for first in range(0, len(work.keep), n):
            keep = work.keep[first : first + n]
            layers = Layers(keep, work.n_q_heads, shape, self._options)
            (us,) = self._time(layers.store_and_attend)
            layers.check()
            parts.append(us.over(len(keep)))
            sizes.append(len(keep))
            del layers  # before the next ones are made
        return Timing.mean(parts, sizes)


def check_limits(work: Work, options: Options) -> None:
    """Raise BenchError for what the kernels do not take."""
    n_per_head = work.n_q_heads // work.n_heads
    if work.head_dim not in _cuda.HEAD_DIMS:
        raise BenchError(f"mask: expected a head dim of {_cuda.HEAD_DIMS}, got {work.head_dim}")
    if n_per_head > _cuda.MAX_R:
        raise BenchError(
            f"q-heads: expected at most {_cuda.MAX_R} per KV head, got {n_per_head} in {work.name}"
        )
    most = min(65535, _cuda.MAX_UNITS // work.n_heads)
    for shape in work.shapes:
        if shape.n_rows > most:
            raise BenchError(f"shapes: expected at most {most} rows, got {shape}")
    if options.mixed:
        details.mixed_widths(work.n_heads, work.head_dim)
