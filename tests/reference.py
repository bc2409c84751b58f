"""Float64 truth of what LeanK computes, in short NumPy loops.

``attend`` is the rule for one row, ``select_channels`` the exact-budget choice of a mask.
``History`` keeps all that a cache was ever given, with the positions that the rule needs (prompt
length n0, first whole position lo), and so answers for a cache that may have retired part of it.
"""

import math
from dataclasses import dataclass, field

import numpy as np


def is_window(p, j, *, sink, recent, lo, n0):
    """Whether the query at position p sees all channels of the key at position j <= p."""
    return j < sink or (j >= lo and (p - j < recent or p < n0))


def attend(
    q,
    k,
    v,
    positions,
    keep,
    *,
    sink,
    recent,
    lo,
    n0,
    scale,
    softcap=None,
    sinks=None,
    rounded=None,
):
    """Attend with the queries of one row.

    Parameters
    ----------
    q : array [Hq, T, D]
    k, v : arrays [Hkv, L, D] and [Hkv, L, Dv]
        Everything the row was given; what the rule does not read may be NaN.
    positions : sequence of T ints
        Position of each query among the row's tokens; -1 for padding.
    keep : bool array [Hkv, D]
    n0 : int or inf
        Prompt length, inf while it is not known.
    softcap : float, optional
        Above 0, logits become softcap * tanh(logit / softcap).
    sinks : array [Hq], optional
        Logits of one more key per query head that has no value; neither scaled nor capped.
    rounded : callable, optional
        Rounds the probabilities. With it, or with inputs that are not float64, this is no longer
        the truth but the plain computation in that precision.

    Returns
    -------
    o : array [Hq, T, Dv]
        0 for padding.
    lse : array [Hq, T]
        Natural logarithm of the sum of exponentials; -inf where nothing is attended.
    """
    n_q_heads, n_columns, _ = q.shape
    n_heads, _, v_dim = v.shape
    o = np.zeros((n_q_heads, n_columns, v_dim), q.dtype)
    lse = np.full((n_q_heads, n_columns), -np.inf, q.dtype)
    for t, p in enumerate(positions):
        window = np.array(
            [is_window(p, j, sink=sink, recent=recent, lo=lo, n0=n0) for j in range(p + 1)], bool
        )
        for h in range(n_q_heads):
            g = h // (n_q_heads // n_heads)
            kept, k_g = keep[g], k[g, : p + 1]
            s = np.zeros(p + 1, q.dtype)
            s[window] = k_g[window] @ q[h, t]
            s[~window] = k_g[~window][:, kept] @ q[h, t, kept]
            seen = window | kept.any()
            s = s[seen] * q.dtype.type(scale)
            if softcap:
                s = q.dtype.type(softcap) * np.tanh(s / q.dtype.type(softcap))
            sink_logit = q.dtype.type(-np.inf if sinks is None else sinks[h])
            top = s.max(initial=sink_logit)
            if top == -np.inf:
                continue
            a = np.exp(s - top)
            total = a.sum() + np.exp(sink_logit - top)
            lse[h, t] = top + np.log(total)
            a /= total
            o[h, t] = (a if rounded is None else rounded(a)) @ v[g, : p + 1][seen]
    return o, lse


def select_channels(scores, ratio, align):
    """Keep exactly round(size * (1 - ratio) / align) blocks of `align` channels, best sums first.

    scores [..., D]; a block is `align` neighbours in a head's descending order of scores. Equal
    sums: lower head first; equal scores: lower channel first; half a block rounds up.
    """
    heads = scores.reshape(-1, scores.shape[-1])
    n_heads, head_dim = heads.shape
    blocks = []
    for head in range(n_heads):
        order = sorted(range(head_dim), key=lambda c, head=head: (-float(heads[head, c]), c))
        for start in range(0, head_dim, align):
            channels = order[start : start + align]
            total = math.fsum(float(heads[head, c]) for c in channels)
            blocks.append((-total, head, start, channels))
    blocks.sort()
    keep = np.zeros(heads.shape, bool)
    budget = math.floor(n_heads * head_dim * (1 - ratio) / align + 0.5)
    for _, head, _, channels in blocks[:budget]:
        keep[head, channels] = True
    return keep.reshape(scores.shape)


@dataclass
class Row:
    """All tokens of one row: lists of k [Hkv, D] and v [Hkv, Dv], and a bool per column."""

    lo: int
    n0: float = math.inf
    held: float = math.inf
    k: list = field(default_factory=list)
    v: list = field(default_factory=list)
    real: list = field(default_factory=list)

    def copy(self):
        return Row(self.lo, self.n0, self.held, list(self.k), list(self.v), list(self.real))


class History:
    """What a cache was given and where its rows stand, by the definitions alone."""

    def __init__(self, n_rows, *, sink, recent, slack, page):
        self.sink, self.recent, self.slack, self.page = sink, recent, slack, page
        self.rows = [Row(lo=sink) for _ in range(n_rows)]
        self.announced = None
        self.n_columns = 0

    def expect_prompt(self, n_columns):
        self.announced = n_columns

    def put(self, k, v, valid):
        """Add T columns: k [B, Hkv, T, D], v [B, Hkv, T, Dv], valid [B, T]."""
        for b, row in enumerate(self.rows):
            for t in range(valid.shape[1]):
                row.real.append(bool(valid[b, t]))
                if valid[b, t]:
                    row.k.append(k[b, :, t].copy())
                    row.v.append(v[b, :, t].copy())
        self.n_columns += valid.shape[1]
        for row in self.rows:
            if row.n0 == math.inf and row.k and self.n_columns >= (self.announced or 0):
                row.n0 = sum(row.real[: self.announced or 0]) or len(row.k)

    def positions(self, b, n_columns):
        """Return the positions of row b's tokens in the last columns, -1 for padding."""
        position, positions = len(self.rows[b].k), []
        for real in reversed(self.rows[b].real[self.n_columns - n_columns :]):
            position -= real
            positions.insert(0, position if real else -1)
        return positions

    def attend(self, b, q, keep, scale):
        """Attend with the queries [Hq, T, D] of row b's last T columns."""
        row, positions = self.rows[b], self.positions(b, q.shape[1])
        if not row.k:
            return np.zeros((*q.shape[:2], 0)), positions
        k, v = (np.stack(x, axis=1).astype(q.dtype) for x in (row.k, row.v))
        rule = {"sink": self.sink, "recent": self.recent, "lo": row.lo, "n0": row.n0}
        return attend(q, k, v, positions, keep, scale=scale, **rule)[0], positions

    def stored(self, b, keep):
        """Return k, v of row b, and which of their elements a cache must still hold.

        [Hkv, L, D], [Hkv, L, Dv], and a bool array of either shape.
        """
        row, kept = self.rows[b], keep[:, None, :]
        k, v = (np.stack(x, axis=1) for x in (row.k, row.v))
        j = np.arange(len(row.k))[None, :, None]
        whole = (j < self.sink) | (j >= row.lo)
        return k, v, whole | kept, np.broadcast_to(whole | kept.any(axis=2, keepdims=True), v.shape)

    def settle(self):
        for row in self.rows:
            if row.n0 < math.inf:
                n = min(len(row.k), max(row.held, row.n0))
                old = (n - self.recent - self.slack) // self.page * self.page
                row.lo = max(row.lo, self.sink, old)

    def crop(self, n_columns):
        self.n_columns = n_columns
        if n_columns == 0:
            self.announced = None
        for row in self.rows:
            del row.real[n_columns:]
            n_tokens = sum(row.real)
            del row.k[n_tokens:], row.v[n_tokens:]
            row.lo = max(self.sink, min(row.lo, n_tokens))
            if n_tokens == 0:
                row.n0 = math.inf

    def hold(self, on):
        for row in self.rows:
            row.held = len(row.k) if on else math.inf
        self.settle()

    def select(self, rows):
        self.rows = [self.rows[b].copy() for b in rows]

    def copy(self):
        other = History(0, sink=self.sink, recent=self.recent, slack=self.slack, page=self.page)
        other.rows = [row.copy() for row in self.rows]
        other.announced, other.n_columns = self.announced, self.n_columns
        return other
