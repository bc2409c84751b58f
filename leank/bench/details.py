"""Single layers, storing the token, and mixed widths, on an NVIDIA GPU.

Times are taken as for the table: see `leank.bench.layers.Timer`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from leank.bench.layers import Layers, Timer, layers_per_graph
from leank.bench.lines import AppendLine, LayerLine, MixedLine, Shape, Timing
from leank.bench.profiles import needed_bytes, random_keep, token_bytes
from leank.bench.work import BenchError, Options, Work


def per_layer(work: Work, shape: Shape, time: Timer, options: Options) -> Iterator[LayerLine]:
    """Time each layer alone, several caches of it in turn, and a sum over the same memory."""
    n = layers_per_graph(work, shape)
    for i, keep in enumerate(work.keep):
        layers = Layers([keep] * n, work.n_q_heads, shape, options)
        us, plain_us = time(layers.store_and_attend, layers.sum)
        layers.check()
        needed = needed_bytes(keep, *shape, **options.window)
        # Some pieces of a GPU's memory are slower to read than others.
        yield LayerLine(shape, i, us.median / n, needed, layers.n_bytes / plain_us.median / 1e6)


def append(work: Work, shape: Shape, time: Timer, options: Options, peak_gb_s: float) -> AppendLine:
    """Time decode of a new token and attention to stored ones, in turns on the same caches.

    The difference of the two, round by round, is the time of storing.
    """
    n, parts, sizes = layers_per_graph(work, shape), [], []
    for first in range(0, len(work.keep), n):
        keep = work.keep[first : first + n]
        layers = Layers(keep, work.n_q_heads, shape, options)
        both, attending = time.rounds(layers.store_and_attend, layers.attend)
        layers.check()
        storing = [a - b for a, b in zip(both, attending, strict=True)]
        parts.append([Timing.of(us).over(len(keep)) for us in (storing, attending)])
        sizes.append(len(keep))
        del layers  # before the next ones are made
    torch.cuda.empty_cache()
    us, attending_us = (Timing.mean(part, sizes) for part in zip(*parts, strict=True))
    n_bytes = token_bytes(work.keep[0], shape.n_rows)
    return AppendLine(
        shape=shape,
        us=us,
        attending_us=attending_us,
        needed_bytes=n_bytes,
        dense_us={"index_copy_": _index_copy(work, shape, n, time, options)},
        dense_bytes=n_bytes,
        peak_gb_s=peak_gb_s,
    )


def _index_copy(work: Work, shape: Shape, n: int, time: Timer, options: Options) -> Timing:
    """Time what transformers' static caches do with a token."""

    def make(n_tokens: int) -> torch.Tensor:
        at = (shape.n_rows, work.n_heads, n_tokens, work.head_dim)
        return torch.randn(at, device="cuda", dtype=getattr(torch, options.dtype))

    layers = [make(shape.length) for _ in range(2 * n)]  # K and V
    new, last = make(1), torch.tensor([shape.length - 1], device="cuda")

    def store() -> None:
        for x in layers:
            x.index_copy_(2, last, new)

    (us,) = time(store)
    return us.over(n)


def mixed_widths(n_heads: int, head_dim: int) -> list[int]:
    """Return one width for each head, evenly spaced around D / 2.

    Raises
    ------
    BenchError
        If there are none that are multiples of 8.

    Examples
    --------
    >>> mixed_widths(8, 128)
    [8, 24, 40, 56, 72, 88, 104, 120]
    """
    if head_dim % (16 * n_heads):
        raise BenchError(
            f"mixed: expected a head dim that is a multiple of 16 times the KV heads, "
            f"got {head_dim} and {n_heads}"
        )
    return [(2 * g + 1) * head_dim // (2 * n_heads) for g in range(n_heads)]


def mixed(work: Work, shape: Shape, time: Timer, options: Options) -> MixedLine:
    """Time a mask whose heads all differ in width against one whose heads all keep D / 2.

    Both need the same bytes. In each layer the widths have another order.
    """
    widths = mixed_widths(work.n_heads, work.head_dim)
    n = layers_per_graph(work, shape)
    orders = np.random.default_rng(options.seed).permuted(np.tile(widths, (n, 1)), axis=1)
    both = [
        random_keep(each, work.head_dim, options.seed)
        for each in (orders, np.full((n, work.n_heads), work.head_dim // 2))
    ]
    layers = [Layers(keep, work.n_q_heads, shape, options) for keep in both]
    us = time(*(x.store_and_attend for x in layers))
    for x in layers:
        x.check()
    return MixedLine(shape, tuple(widths), *(x.median / n for x in us))
