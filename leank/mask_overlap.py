"""How alike two masks are, against chance."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from leank.inspection import Inspection, with_properties
from leank.masks import ChannelMask


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What two masks have in common in one layer, or in all.

    Attributes
    ----------
    layer : int or None
        None: all layers.
    kept_a, kept_b, both : int
        Channels that are kept by each, and by both.
    chance : float
        Channels that both would keep on average if each head of both kept as many, but random ones.
    most : int
        Channels that both could keep in common with these widths.
    empty_a, empty_b, empty_both : int
        Heads that keep nothing.
    """

    layer: int | None
    kept_a: int
    kept_b: int
    both: int
    chance: float
    most: int
    empty_a: int
    empty_b: int
    empty_both: int

    @property
    def share(self) -> float | None:
        """Channels in both by those in either (Jaccard); None if there are none."""
        either = self.kept_a + self.kept_b - self.both
        return self.both / either if either else None

    @property
    def above_chance(self) -> float | None:
        """0: as alike as random channels; 1: as alike as the widths allow.

        None where the widths alone decide, as in heads that keep nothing or everything.
        """
        room = self.most - self.chance
        return (self.both - self.chance) / room if room > 1e-9 else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two masks of one shape: the overlap of each layer, and of all together."""

    layers: tuple[Overlap, ...]
    total: Overlap

    def as_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "total": with_properties(self.total),
            "layers": [with_properties(layer) for layer in self.layers],
        }


def compare(a: ChannelMask, b: ChannelMask) -> Comparison:
    """Compare two masks of one shape; windows do not count.

    Raises
    ------
    ValueError
        If their shapes differ, or the layers that are outside.

    Examples
    --------
    >>> a = leank.ChannelMask(np.arange(16).reshape(1, 1, 16) < 8)
    >>> total = compare(a, a).total
    >>> total.both, total.chance, total.above_chance
    (8, 4.0, 1.0)
    """
    if a.keep.shape != b.keep.shape:
        raise ValueError(f"b: expected a mask of shape {a.keep.shape}, got {b.keep.shape}")
    if a.outside != b.outside:
        raise ValueError(f"b: expected {list(a.outside)} as layers outside, got {list(b.outside)}")
    x, y = a.inside, b.inside
    m, n = x.sum(2), y.sum(2)
    columns = {
        "kept_a": m,
        "kept_b": n,
        "both": (x & y).sum(2),
        "chance": m * n / a.head_dim,
        "most": np.minimum(m, n),
        "empty_a": m == 0,
        "empty_b": n == 0,
        "empty_both": (m == 0) & (n == 0),
    }
    sums = {name: column.sum(1) for name, column in columns.items()}
    layers = tuple(
        Overlap(number, **{name: column[i].item() for name, column in sums.items()})
        for i, number in enumerate(Inspection(a).layers)
    )
    total = Overlap(None, **{name: column.sum().item() for name, column in sums.items()})
    return Comparison(layers, total)
