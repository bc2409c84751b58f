"""Widths of published masks, and the bytes that a decode with a mask must read.

A profile holds how many channels each KV head keeps, not which ones: bytes and time depend on the
widths alone. ``data/bench-profiles.json`` has the ``kept_per_head`` of masks that
``ChannelMask.from_pth`` read.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json

import numpy as np
import numpy.typing as npt

_DATA = "data/bench-profiles.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """The widths of a mask, int [N, Hkv], and the query heads and head dim of its model."""

    name: str
    source: str
    n_q_heads: int
    head_dim: int
    widths: npt.NDArray[np.int64]

    def keep(self, seed: int) -> npt.NDArray[np.bool_]:
        """Return a mask [N, Hkv, D]: each head's width, in random places."""
        return random_keep(self.widths, self.head_dim, seed)


def load_profiles() -> dict[str, Profile]:
    """Return the profiles of the package by name."""
    text = importlib.resources.files("leank").joinpath(_DATA).read_text(encoding="utf-8")
    return {
        name: Profile(name=name, **fields | {"widths": np.array(fields["widths"], np.int64)})
        for name, fields in json.loads(text).items()
    }


def random_keep(widths: npt.ArrayLike, head_dim: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return a mask whose heads keep as many channels as `widths` says, in random places.

    Parameters
    ----------
    widths : int array [N, Hkv]
    head_dim : int
        D.
    seed : int

    Returns
    -------
    bool array [N, Hkv, D]

    Examples
    --------
    >>> random_keep([[0, 8], [16, 8]], 16, seed=0).sum(2).tolist()
    [[0, 8], [16, 8]]
    """
    widths = np.asarray(widths)
    ranks = np.tile(np.arange(head_dim), (*widths.shape, 1))
    return np.random.default_rng(seed).permuted(ranks, axis=-1) < widths[..., None]


def needed_bytes(
    keep: npt.NDArray[np.bool_],
    n_rows: int,
    length: int,
    *,
    sink: int,
    recent: int,
    elem_bytes: int = 2,
) -> int:
    """Return the bytes that one decode of a layer must read.

    A token of the window costs 2 D elements in each head. Any other token costs Dk + D in a head
    that keeps channels, and nothing in one that keeps none.

    Parameters
    ----------
    keep : bool array [Hkv, D]
    n_rows, length : int
        B and L; the new token is one of the L.
    sink, recent : int
        S0 and W.
    elem_bytes : int
        Bytes of an element.
    """
    n_heads, head_dim = keep.shape
    window = min(length, sink + recent)
    middle = sum(int(n) + head_dim for n in keep.sum(1) if n)
    return n_rows * elem_bytes * (window * 2 * head_dim * n_heads + (length - window) * middle)


def dense_bytes(
    keep: npt.NDArray[np.bool_], n_rows: int, length: int, *, elem_bytes: int = 2
) -> int:
    """Return the bytes of dense K and V of a layer, all of which dense attention reads."""
    return n_rows * elem_bytes * length * 2 * keep.size


def token_bytes(keep: npt.NDArray[np.bool_], n_rows: int, *, elem_bytes: int = 2) -> int:
    """Return the bytes of one token's K and V in a layer, all of which are stored at first."""
    return dense_bytes(keep, n_rows, 1, elem_bytes=elem_bytes)
