"""Filled caches of some layers, the check of their decode, and the timer, on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from leank.bench.lines import Shape, Timing
from leank.bench.profiles import dense_bytes
from leank.bench.truth import attend64, checked_error
from leank.bench.work import Options, Work
from leank.cuda import LayerCache, decode

# Dense K and V of the layers that are captured together, at most (but one layer at least).
GRAPH_BYTES = 24 << 30
_WARM_UPS = 3
# Enough that the kernel cuts each row of the check into many chunks.
_CHECK_TOKENS = 40_000
_CHECK_ROWS = 2


class Timer:
    """Microseconds of captured work, with the L2 cache evicted before each replay."""

    def __init__(self, n_rounds: int) -> None:
        self.n_rounds = n_rounds
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, *works: Callable[[], object]) -> list[Timing]:
        """Run each once, capture each in a graph, then replay the graphs in turn."""
        return [Timing.of(seen) for seen in self.rounds(*works)]

    def rounds(self, *works: Callable[[], object]) -> list[list[float]]:
        """Return the times of each round, by work."""
        graphs = [self._capture(work) for work in works]
        times = [[] for _ in graphs]
        for i in range(_WARM_UPS + self.n_rounds):
            for graph, seen in zip(graphs, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                if i >= _WARM_UPS:
                    seen.append(start.elapsed_time(end) * 1e3)
        return times

    def _capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        work()  # allocates and compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph


def layers_per_graph(work: Work, shape: Shape) -> int:
    """Return how many layers are captured together: a layer of a model follows another one."""
    return min(len(work.keep), max(1, GRAPH_BYTES // dense_bytes(work.keep[0], *shape)))


class Layers:
    """Caches of L - 1 tokens each, one per mask [Hkv, D], and the q, k and v of one more.

    All rows and all spans of 1024 tokens are the same: time does not depend on values.
    """

    def __init__(
        self, keeps: Sequence[npt.NDArray[np.bool_]], n_q_heads: int, at: Shape, options: Options
    ) -> None:
        dtype = getattr(torch, options.dtype)
        n_heads, head_dim = keeps[0].shape

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, head_dim, device="cuda", dtype=dtype)

        self.q = draw(at.n_rows, n_q_heads, 1)
        self.k, self.v = (draw(at.n_rows, n_heads, 1) for _ in "kv")
        n_span = min(at.length, 1024)
        span = [draw(1, n_heads, n_span).expand(at.n_rows, -1, -1, -1) for _ in "kv"]
        # Each run or replay of a step stores one token.
        n_steps = 1 + _WARM_UPS + options.rounds
        self.caches = []
        for keep in keeps:
            cache = LayerCache(
                keep,
                n_rows=at.n_rows,
                max_tokens=at.length - 1 + n_steps,
                dtype=dtype,
                **options.window,
            )
            for first in range(0, at.length - 1, n_span):
                n = min(n_span, at.length - 1 - first)
                cache.append(*(x[:, :, :n] for x in span))
            self.caches.append(cache)

    def store_and_attend(self) -> None:
        """Decode the new token, layer after layer."""
        for cache in self.caches:
            decode(cache, self.q, self.k, self.v)

    def attend(self) -> None:
        """Attend to what is stored, layer after layer."""
        for cache in self.caches:
            decode(cache, self.q)

    def sum(self) -> None:
        """Read all pages and twins, layer after layer, and nothing else."""
        for cache in self.caches:
            torch.sum(cache.slab.view(torch.float32), 0)

    @property
    def n_bytes(self) -> int:
        """Bytes that `sum` reads."""
        return sum(cache.slab.numel() for cache in self.caches)

    def check(self) -> None:
        """Raise if a replay found its cache full, for then it did less."""
        for cache in self.caches:
            cache.check()


def check(work: Work, options: Options) -> float:
    """Compare a decode of each layer with float64; return the largest error.

    Raises
    ------
    WrongResultError
        If it is above its bound.
    """
    dtype = getattr(torch, options.dtype)
    largest = 0.0
    shape = (_CHECK_ROWS, work.n_heads, _CHECK_TOKENS, work.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in "kv")
    q_shape = (_CHECK_ROWS, work.n_q_heads, 1, work.head_dim)
    q = torch.randn(q_shape, device="cuda", dtype=dtype)
    new = [x[:, :, -1:].contiguous() for x in (k, v)]
    for i, keep in enumerate(work.keep):
        cache = LayerCache(
            keep, n_rows=_CHECK_ROWS, max_tokens=_CHECK_TOKENS, dtype=dtype, **options.window
        )
        cache.append(k[:, :, :-1], v[:, :, :-1])
        out = decode(cache, q, *new)
        for b in range(_CHECK_ROWS):
            truth = attend64(q[b, :, 0], k[b], v[b], keep, **options.window)
            where = f"{work.name}, layer {i}, row {b}"
            largest = max(largest, checked_error(out[b, :, 0], truth, where))
    return largest
