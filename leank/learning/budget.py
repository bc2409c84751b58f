"""Which channels to keep for a budget: of K alone, or of K and V together.

A head that keeps a channel stores all of its V; one that keeps none stores no V of the middle. A
budget of K counts channels alone. A budget of K and V also counts the V of heads that live, so that
emptying a head frees D channels of V with those of K.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from leank import _C

BUDGETS = ("k", "kv")


def choose_channels(
    scores: npt.NDArray[np.float32],
    ratio: float,
    align: int,
    budget: str = "k",
    live: float = 0.0,
) -> npt.NDArray[np.bool_]:
    """Return the mask with the largest sum of scores that meets a budget.

    Each head's channels are sorted by score and cut into blocks of `align`; a head keeps its first
    blocks.

    Parameters
    ----------
    scores : float32 array [N, Hkv, D]
        Finite; at least 0 for "kv".
    ratio : float
        Share to drop of the K channels ("k"), or of the bytes of K and V outside the window ("kv").
    align : int
        Block size, a divisor of D.
    budget : {"k", "kv"}
    live : float, default 0
        For "kv": added to the sum for each head that keeps any channel.

    Returns
    -------
    bool array [N, Hkv, D]
        "k": exactly ``round(N * Hkv * D * (1 - ratio) / align)`` blocks. "kv": kept channels and D
        for each head that keeps any are at most ``2 * N * Hkv * D * (1 - ratio)``, and no other
        such mask has a larger sum; of equal ones the one that keeps more.

    Raises
    ------
    ValueError
        An argument is outside its range.

    Examples
    --------
    >>> scores = np.ones((1, 2, 16), np.float32)
    >>> scores[0, 1] = 0.4
    >>> choose_channels(scores, 0.5, 8).sum(-1).tolist()
    [[16, 0]]
    >>> choose_channels(scores, 0.125, 8, "kv").sum(-1).tolist()
    [[16, 8]]
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget: expected {' or '.join(BUDGETS)}, got {budget!r}")
    if budget == "k":
        return _C.select_channels(scores, ratio, align)
    _C.select_channels(scores[:1, :1], ratio, align)  # its checks of ratio and align
    if not (scores >= 0).all():
        raise ValueError(f"scores: expected at least 0, got {scores.min()}")
    n_layers, n_heads, head_dim = scores.shape
    order = np.argsort(-scores, axis=-1, kind="stable")
    blocks = np.take_along_axis(scores, order, -1).astype(np.float64)
    blocks = blocks.reshape(n_layers * n_heads, head_dim // align, align).sum(-1)
    # A tiny step up, since 2 * 6 * 4 * (1 - 0.7) is 14.399999999999999 where it should be 14.4.
    n_blocks = int(2 * blocks.size * (1 - ratio) * (1 + 1e-12))
    widths = _fill(blocks, n_blocks, live).reshape(n_layers, n_heads, 1) * align
    keep = np.zeros(scores.shape, bool)
    np.put_along_axis(keep, order, np.arange(head_dim) < widths, -1)
    return keep


def _fill(blocks: npt.NDArray[np.float64], budget: int, live: float) -> npt.NDArray[np.int64]:
    """Return how many of its blocks each head keeps: the best choice, by dynamic programming.

    Parameters
    ----------
    blocks : float64 array [heads, m]
        Sums of scores, the largest of a head first.
    budget : int
        Blocks in all; a head that keeps any of K pays m more for its V.
    live : float
        Gain of a head that keeps any.

    Returns
    -------
    int64 array [heads]

    Notes
    -----
    Time is heads * m * budget, all but the loop over heads * m in NumPy: 10 ms for 90 heads of 8
    blocks.
    """
    n_heads, m = blocks.shape
    gains = np.concatenate([np.zeros((n_heads, 1)), live + np.cumsum(blocks, 1)], 1)
    # best[c]: the largest sum of the heads so far at a cost of exactly c.
    best = np.full(budget + 1, -np.inf)
    best[0] = 0
    widths = np.zeros((n_heads, budget + 1), np.uint8)
    for head in range(n_heads):
        new = best.copy()
        for width in range(1, m + 1):
            cost = m + width
            if cost > budget:
                break
            sums = best[: budget + 1 - cost] + gains[head, width]
            # Equal sums: the wider, so that a budget does not stay unused among zeros.
            better = (sums >= new[cost:]) & (sums > -np.inf)
            new[cost:][better] = sums[better]
            widths[head, cost:][better] = width
        best = new
    left = budget - int(np.argmax(best[::-1]))  # the greatest cost among equals
    chosen = np.zeros(n_heads, np.int64)
    for head in reversed(range(n_heads)):
        chosen[head] = widths[head, left]
        left -= (m + chosen[head]) * bool(chosen[head])
    return chosen
