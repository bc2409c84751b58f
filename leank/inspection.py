"""What a mask keeps: by head, by rotary frequency, in bytes, and beside what heads attend to.

Arrays have a row for each layer that LeanK caches; `Inspection.layers` has their numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from leank import _C
from leank.bench.profiles import dense_bytes, needed_bytes
from leank.masks import ChannelMask, kept_shares

LENGTHS = (4096, 32768, 131072)
N_BANDS = 4
DTYPE = "bfloat16"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NEIGHBOURS = 2  # pairs on either side that a pair is compared with


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """Which channels a rotary embedding turns together.

    Parameters
    ----------
    pairs : int array [P, 2]
        Channels of each pair, from the highest frequency to the lowest; those of no pair are not
        turned.
    without : tuple of int
        Numbers of the layers in which nothing is turned.
    """

    pairs: npt.NDArray[np.int64]
    without: tuple[int, ...] = ()

    @classmethod
    def halves(cls, n_channels: int, without: Sequence[int] = ()) -> Rotary:
        """Pair channel i with i + n / 2 among the first n, as Llama and most others do.

        Examples
        --------
        >>> Rotary.halves(8).pairs.tolist()
        [[0, 4], [1, 5], [2, 6], [3, 7]]
        """
        return cls(np.arange(n_channels // 2)[:, None] + [0, n_channels // 2], tuple(without))

    def bands(self, n: int = N_BANDS) -> list[npt.NDArray[np.int64]]:
        """Cut the numbers of the pairs into n runs of nearly one size, or fewer if pairs are few.

        The first one has the highest frequencies.
        """
        numbers = np.arange(len(self.pairs))
        return [band for band in np.array_split(numbers, n) if len(band)]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One row of so many tokens, all layers together.

    Attributes
    ----------
    tokens : int
        The last one is being decoded.
    dense, mask : int
        Bytes of the cache: dense, and with the mask in whole pages, the window included.
    dense_read, mask_read : int
        Bytes that attention reads in decoding one token.
    """

    tokens: int
    dense: int
    mask: int
    dense_read: int
    mask_read: int

    @property
    def saved(self) -> float:
        """Share of the dense cache that is not stored; negative where pages cost more."""
        return 1 - self.mask / self.dense

    @property
    def speedup(self) -> float:
        """How much faster attention decodes if time goes by the bytes that are read."""
        return self.dense_read / self.mask_read


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What a mask keeps.

    Parameters
    ----------
    mask : ChannelMask
    rotary : Rotary, optional
        Of the mask's model (`leank.model_inspection.rotary_of`); default: channel i turns with
        i + D / 2.
    mass : float array [N, Hq], optional
        Attention of each query head to the middle (`leank.model_inspection.middle_mass`).

    Raises
    ------
    ValueError
        If the pairs are not those of `head_dim` channels, or the mass has another shape.

    Examples
    --------
    >>> found = Inspection(leank.load_mask("smollm2-135m-instruct-70"))
    >>> found.widths.shape, round(found.low_half, 2)
    ((30, 3), 0.84)
    """

    mask: ChannelMask
    rotary: Rotary | None = None
    mass: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        head_dim = self.mask.head_dim
        if self.rotary is None:
            object.__setattr__(self, "rotary", Rotary.halves(head_dim))
        channels = np.sort(self.rotary.pairs, axis=None)
        if len(channels) and (
            channels[0] < 0 or channels[-1] >= head_dim or (np.diff(channels) == 0).any()
        ):
            raise ValueError(
                f"rotary: expected pairs of {head_dim} channels, each in one pair at most, got "
                f"{self.rotary.pairs.tolist()}"
            )
        if self.mass is not None:
            n_layers, n_heads = self.widths.shape
            shape = self.mass.shape
            if len(shape) != 2 or shape[0] != n_layers or not shape[1] or shape[1] % n_heads:
                raise ValueError(
                    f"mass: expected ({n_layers}, a multiple of {n_heads}), got {shape}"
                )

    # ------------------------------------------------------------------------------ by head

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that the mask is for."""
        return [i for i in range(self.mask.n_layers) if i not in self.mask.outside]

    @functools.cached_property
    def keep(self) -> npt.NDArray[np.bool_]:
        """Rows of these layers, [N, Hkv, D]."""
        return self.mask.inside

    @functools.cached_property
    def widths(self) -> npt.NDArray[np.int64]:
        """Channels that each head keeps, [N, Hkv]."""
        return self.keep.sum(2, dtype=np.int64)

    @property
    def heads_of_width(self) -> dict[int, int]:
        """Number of heads that keep so many channels."""
        widths, counts = np.unique(self.widths, return_counts=True)
        return dict(zip(widths.tolist(), counts.tolist(), strict=True))

    @property
    def turned(self) -> npt.NDArray[np.bool_]:
        """Layers with a rotary embedding, [N]."""
        without = (i in self.rotary.without for i in self.layers)
        return np.array([len(self.rotary.pairs) > 0 and not x for x in without])

    @functools.cached_property
    def kept_of_pair(self) -> npt.NDArray[np.int64]:
        """Channels that are kept of each pair, 0 to 2, [N, Hkv, P]; 0 in layers without rotary."""
        kept = self.keep[..., self.rotary.pairs].sum(-1, dtype=np.int64)
        return kept * self.turned[:, None, None]

    @functools.cached_property
    def whole_pairs(self) -> npt.NDArray[np.int64]:
        """Pairs of which a head keeps both channels, [N, Hkv]."""
        return (self.kept_of_pair == 2).sum(2)

    @functools.cached_property
    def half_pairs(self) -> npt.NDArray[np.int64]:
        """Pairs of which a head keeps one channel, [N, Hkv]."""
        return (self.kept_of_pair == 1).sum(2)

    @functools.cached_property
    def bands(self) -> npt.NDArray[np.float64]:
        """Share of each band's channels that a head keeps, [N, Hkv, bands]; NaN without rotary."""
        kept = self.kept_of_pair
        shares = [kept[..., band].sum(2) / (2 * len(band)) for band in self.rotary.bands()]
        found = np.stack(shares, -1) if shares else np.zeros((*kept.shape[:2], 0))
        found[~self.turned] = np.nan
        return found

    # ------------------------------------------------------------------------ of all heads

    @property
    def pair_shares(self) -> npt.NDArray[np.float64]:
        """Share of each pair's channels that all heads keep together, [P]."""
        kept = self.kept_of_pair[self.turned]
        return kept.mean((0, 1)) / 2 if len(kept) else np.zeros(0)

    @property
    def low_half(self) -> float | None:
        """Share of the kept channels that is in the half of the pairs with the lower frequencies.

        None if no channel of a pair is kept.
        """
        kept = self.kept_of_pair.sum((0, 1))
        total = int(kept.sum())
        return float(kept[(len(kept) + 1) // 2 :].sum() / total) if total else None

    @property
    def outstanding_pair(self) -> tuple[int, float, float] | None:
        """The pair that is kept most in excess of its neighbours, its share, and theirs.

        Neighbours are two pairs on either side, theirs is the median. None if no pair stands out.
        """
        shares = self.pair_shares
        best = None
        for i, share in enumerate(shares):
            first = max(0, i - _NEIGHBOURS)
            near = np.delete(shares[first : i + _NEIGHBOURS + 1], i - first)
            usual = float(np.median(near)) if len(near) else float(share)
            if share > usual and (best is None or share - usual > best[1] - best[2]):
                best = i, float(share), usual
        return best

    def bytes(self, lengths: Sequence[int] = LENGTHS, dtype: _C.DType = DTYPE) -> list[Bytes]:
        """Return what one row costs at some lengths.

        Raises
        ------
        ValueError
            If the window is not known, or a length is below 1.
        """
        return predicted_bytes(self.mask, lengths, dtype)

    @property
    def kv_mass(self) -> npt.NDArray[np.float64] | None:
        """Mean mass over the query heads of each KV head, [N, Hkv]."""
        if self.mass is None:
            return None
        n_layers, n_heads = self.widths.shape
        return self.mass.reshape(n_layers, n_heads, -1).mean(2)

    @property
    def mass_relation(self) -> Relation | None:
        """How the mass of the middle goes with what is kept of it."""
        return None if self.mass is None else relate(self.widths, self.kv_mass)

    def as_json(self, lengths: Sequence[int] = LENGTHS, dtype: _C.DType = DTYPE) -> dict[str, Any]:
        """Return all figures as JSON values; ``bytes`` is None if the window is not known."""
        mask, relation = self.mask, self.mass_relation
        known = mask.sink is not None and mask.recent is not None
        n_layers, n_heads = self.widths.shape
        lines = self.bytes(lengths, dtype) if known else ()
        return {
            "model": mask.model,
            "method": mask.method,
            "shape": list(mask.keep.shape),
            "outside": list(mask.outside),
            "sink": mask.sink,
            "recent": mask.recent,
            "align": mask.align,
            "ratio": mask.ratio,
            **kept_shares(self.keep),
            "heads_of_width": {str(k): n for k, n in self.heads_of_width.items()},
            "n_pairs": len(self.rotary.pairs),
            "bands": [[int(band[0]), int(band[-1])] for band in self.rotary.bands()],
            "pair_shares": self.pair_shares.tolist(),
            "low_half": self.low_half,
            "outstanding_pair": self.outstanding_pair,
            "whole_pairs": int(self.whole_pairs.sum()),
            "half_pairs": int(self.half_pairs.sum()),
            "bytes": [with_properties(line) for line in lines] if known else None,
            "dtype": dtype,
            "mass": None if relation is None else with_properties(relation),
            "heads": [self._head(i, g) for i in range(n_layers) for g in range(n_heads)],
        }

    def _head(self, row: int, head: int) -> dict[str, Any]:
        found = {
            "layer": self.layers[row],
            "head": head,
            "kept": int(self.widths[row, head]),
            "bands": self.bands[row, head].tolist() if self.turned[row] else None,
            "whole_pairs": int(self.whole_pairs[row, head]),
            "half_pairs": int(self.half_pairs[row, head]),
        }
        if self.mass is not None:
            n = self.mass.shape[1] // self.widths.shape[1]
            found["mass"] = self.mass[row, head * n : (head + 1) * n].tolist()
        return found


def predicted_bytes(
    mask: ChannelMask, lengths: Sequence[int] = LENGTHS, dtype: _C.DType = DTYPE
) -> list[Bytes]:
    """Return what a cache of one row holds, and what decoding reads of it, at some lengths.

    Raises
    ------
    ValueError
        If the window is not known, a length is below 1, or the dtype is unknown.
    """
    found = []
    for n in lengths:
        if n < 1:
            raise ValueError(f"lengths: expected at least 1, got {n}")
        held = mask.predict_memory([n], dtype)["total_bytes"]
        size = {"elem_bytes": _ITEM_BYTES[dtype]}
        window = {"sink": mask.sink, "recent": mask.recent}
        dense = sum(dense_bytes(keep, 1, n, **size) for keep in mask.inside)
        read = sum(needed_bytes(keep, 1, n, **window, **size) for keep in mask.inside)
        found.append(Bytes(n, dense, held, dense, read))
    return found


# --------------------------------------------------------------------------------------- relations


@dataclasses.dataclass(frozen=True)
class Relation:
    """Attention to the middle against the channels kept of it.

    Attributes
    ----------
    by_width : dict
        Channels kept: heads, and their smallest, mean and largest mass.
    correlation : float or None
        Of the ranks (Spearman's), from -1 to 1; None where all heads keep as many channels, or all
        have one mass.
    """

    by_width: dict[int, tuple[int, float, float, float]]
    correlation: float | None


def relate(widths: npt.NDArray[np.int64], mass: npt.NDArray[np.float64]) -> Relation:
    """Relate the mass of heads to what they keep; both [N, Hkv].

    Examples
    --------
    >>> relate(np.array([[0, 8, 8]]), np.array([[0.25, 0.5, 1.0]])).by_width
    {0: (1, 0.25, 0.25, 0.25), 8: (2, 0.5, 0.75, 1.0)}
    """
    by_width = {}
    for width in np.unique(widths).tolist():
        mine = mass[widths == width]
        by_width[width] = len(mine), float(mine.min()), float(mine.mean()), float(mine.max())
    a, b = _ranks(widths), _ranks(mass)
    varies = np.ptp(a) > 0 and np.ptp(b) > 0
    return Relation(by_width, float(np.corrcoef(a, b)[0, 1]) if varies else None)


def _ranks(values: np.ndarray) -> npt.NDArray[np.float64]:
    """Return ranks of a flattened array; equal values share their mean rank."""
    _, inverse, counts = np.unique(values.reshape(-1), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + last - 1) / 2)[inverse]


def with_properties(line: Any) -> dict[str, Any]:
    """Return the fields of a dataclass and what follows from them."""
    names = [name for name, x in vars(type(line)).items() if isinstance(x, property)]
    return dataclasses.asdict(line) | {name: getattr(line, name) for name in names}
