"""Single layers, the share of storing the token, and mixed widths, for ``leank bench decode``.

Times are taken as for the table: see `leank.bench.layers.Timer`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from leank.bench.layers import Layers, Timer, layers_per_graph
from leank.bench.profiles import needed_bytes, random_keep
from leank.bench.work import AppendLine, BenchError, LayerLine, MixedLine, Options, Shape, Work


def per_layer(work: Work, shape: Shape, time: Timer, options: Options) -> Iterator[LayerLine]:
    """Time each layer alone, several caches of it in turn, and a sum over the same memory."""
    n = layers_per_graph(work, shape)
    for i, keep in enumerate(work.keep):
        layers = Layers([keep] * n, work.n_q_heads, shape, options)
        us, plain_us = time(layers.store_and_attend, layers.sum)
        layers.check()
        needed = needed_bytes(keep, *shape, **options.window)
        # Some pieces of a GPU's memory are slower to read than others.
        yield LayerLine(shape, i, us / n, needed, layers.n_bytes / plain_us / 1e6)


def append_share(work: Work, shape: Shape, time: Timer, options: Options) -> AppendLine:
    """Time decode of a new token and attention to stored ones, in turns on the same caches."""
    n = layers_per_graph(work, shape)
    storing = attending = 0.0
    for first in range(0, len(work.keep), n):
        layers = Layers(work.keep[first : first + n], work.n_q_heads, shape, options)
        us = time(layers.store_and_attend, layers.attend)
        layers.check()
        storing, attending = storing + us[0], attending + us[1]
        del layers  # before the next ones are made
    return AppendLine(shape, storing / len(work.keep), attending / len(work.keep))


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
    return MixedLine(shape, tuple(widths), *(x / n for x in us))
