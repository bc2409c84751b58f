"""A plain Python model of the paged cache: pages of kept channels, twins of dropped ones.

Every value lives in a slot of a page or twin, and reading a slot that is not stored raises, so that
a mistake in when things retire, or in who may write, shows as an exception or a wrong value.
Nothing here is fast.
"""

import copy
import itertools
import math

import numpy as np


class Page:
    """Slots of up to P tokens of one row: slot -> {(kind, head): values}. A twin is one too."""

    def __init__(self):
        self.slot = {}
        self.refs = 1

    def duplicate(self):
        page = Page()
        page.slot = {j: dict(values) for j, values in self.slot.items()}
        return page


class ModelRow:
    """One row: tables of pages and twins (or None), lo, n0, and which columns are its tokens."""

    def __init__(self, lo):
        self.len, self.lo, self.n0, self.held = 0, lo, math.inf, math.inf
        self.page, self.twin = [], []
        self.real = []

    def share(self):
        """Return a row with the same pages."""
        row = copy.copy(self)
        row.page, row.twin, row.real = list(self.page), list(self.twin), list(self.real)
        for page in itertools.chain(row.page, row.twin):
            if page is not None:
                page.refs += 1
        return row


class PageModel:
    """The cache of one layer.

    keep [Hkv, D] bool. `page` is P. With `max_tokens` the cache is reserved: what rows of that many
    tokens and calls of `max_call` columns need is counted in memory from the start.
    """

    def __init__(
        self,
        keep,
        n_rows,
        *,
        sink,
        recent,
        slack=64,
        v_dim=None,
        page=64,
        max_tokens=None,
        max_call=1,
    ):
        self.keep = np.array(keep, bool)
        self.n_heads, self.head_dim = self.keep.shape
        self.v_dim = v_dim or self.head_dim
        self.sink, self.recent, self.slack, self.P = sink, recent, slack, page
        self.max_tokens, self.max_call = max_tokens, max_call
        self.rows = [ModelRow(sink) for _ in range(n_rows)]
        self.n_columns, self.announced = 0, None

    # ------------------------------------------------------------------------------------- writing

    def expect_prompt(self, n_columns):
        if self.n_columns:
            raise RuntimeError("expect_prompt: the cache has columns")
        self.announced = n_columns

    def put(self, k, v, valid):
        """Store every channel of T columns: k [B, Hkv, T, D], v [B, Hkv, T, Dv], valid [B, T]."""
        for b, row in enumerate(self.rows):
            for t in range(valid.shape[1]):
                if valid[b, t]:
                    self._store(row, k[b, :, t], v[b, :, t])
                row.real.append(bool(valid[b, t]))
        self.n_columns += valid.shape[1]

    def _store(self, row, k, v):
        i, j = divmod(row.len, self.P)
        if i == len(row.page):
            row.page.append(Page())
            row.twin.append(None)
        if row.twin[i] is None:
            row.twin[i] = Page()
        page, twin = self._own(row.page, i), self._own(row.twin, i)
        page.slot[j], twin.slot[j] = {}, {}
        for g, keep in enumerate(self.keep):
            page.slot[j]["k", g] = k[g][keep].copy()
            twin.slot[j]["k", g] = k[g][~keep].copy()
            (page if keep.any() else twin).slot[j]["v", g] = v[g].copy()
        row.len += 1

    @staticmethod
    def _own(table, i):
        """Make page i of a table writable: copy it if somebody else holds it as well."""
        if table[i].refs > 1:
            table[i].refs -= 1
            table[i] = table[i].duplicate()
        return table[i]

    def _prompt(self, row):
        """Prompt length as of the columns that are there, inf while it is not complete."""
        announced = self.announced or 0
        if row.n0 < math.inf or row.len == 0 or self.n_columns < announced:
            return row.n0
        return sum(row.real[:announced]) or row.len

    def settle(self):
        """Complete prompts, raise lo, drop the twins that are wholly middle."""
        for row in self.rows:
            row.n0 = self._prompt(row)
            if row.n0 == math.inf:
                continue
            n = min(row.len, max(row.held, row.n0))
            old = (n - self.recent - self.slack) // self.P * self.P
            row.lo = max(row.lo, self.sink, old)
            for i in range(len(row.twin)):
                if i * self.P >= self.sink and (i + 1) * self.P <= row.lo:
                    self._release(row.twin, i)

    @staticmethod
    def _release(table, i):
        if table[i] is not None:
            table[i].refs -= 1
            table[i] = None

    def append(self, k, v, valid):
        self.put(k, v, valid)
        self.settle()

    def crop(self, n_columns):
        """Keep the first columns."""
        self.n_columns = n_columns
        if n_columns == 0:
            self.announced = None
        for row in self.rows:
            del row.real[n_columns:]
            row.len = sum(row.real)
            n_pages = -(-row.len // self.P)
            for table in (row.page, row.twin):
                for i in range(n_pages, len(table)):
                    self._release(table, i)
                del table[n_pages:]
                # What is cut off an own page is gone; in a shared one another row may need it.
                if table and table[-1] is not None and table[-1].refs == 1:
                    for j in [j for j in table[-1].slot if (n_pages - 1) * self.P + j >= row.len]:
                        del table[-1].slot[j]
            row.lo = max(self.sink, min(row.lo, row.len))
            if row.len == 0:
                row.n0 = math.inf

    def hold(self, on):
        """Let crops to the present length lose nothing, or no more."""
        for row in self.rows:
            row.held = row.len if on else math.inf
        self.settle()

    def reset(self):
        self.crop(0)

    def select(self, rows):
        old, self.rows = self.rows, [self.rows[b].share() for b in rows]
        for row in old:
            self._free_row(row)

    def _free_row(self, row):
        for table in (row.page, row.twin):
            for i in range(len(table)):
                self._release(table, i)

    def copy(self):
        other = copy.copy(self)
        other.rows = [row.share() for row in self.rows]
        return other

    def free(self):
        for row in self.rows:
            self._free_row(row)
        self.rows = []

    # ------------------------------------------------------------------------------------- reading

    def _dropped(self, row, j):
        """Slot of the twin that holds position j; KeyError or TypeError if it is not stored."""
        assert j < self.sink or j >= row.lo, f"position {j} in [{self.sink}, {row.lo}) is middle"
        return row.twin[j // self.P].slot[j % self.P]

    def attend(self, q, scale):
        """Attend with the last T columns: q [B, Hq, T, D] to o [B, Hq, T, Dv], 0 for padding."""
        n_rows, n_q_heads, n_columns, _ = q.shape
        ratio = n_q_heads // self.n_heads
        o = np.zeros((n_rows, n_q_heads, n_columns, self.v_dim), q.dtype)
        for b, row in enumerate(self.rows):
            for t in range(n_columns):
                column = self.n_columns - n_columns + t
                if not row.real[column]:
                    continue
                p = sum(row.real[:column])
                for g in range(self.n_heads):
                    k, v, window = self._keys(row, g, p)
                    for h in range(g * ratio, (g + 1) * ratio):
                        o[b, h, t] = self._one(q[b, h, t] * scale, g, k, v, window)
        return o

    def _keys(self, row, g, p):
        """Collect what a query at position p attends to in head g: kept part, dropped part, V."""
        kept, dropped, v, window = [], [], [], []
        n0, empty = self._prompt(row), not self.keep[g].any()
        for j in range(p + 1):
            dense = j < self.sink or (j >= row.lo and (p - j < self.recent or p < n0))
            if empty and not dense:
                continue
            page = row.page[j // self.P].slot[j % self.P]
            twin = self._dropped(row, j) if dense else None
            kept.append(page["k", g])
            dropped.append(twin["k", g] if dense else np.zeros(np.sum(~self.keep[g])))
            v.append((twin if empty else page)["v", g])
            window.append(dense)
        return (np.array(kept), np.array(dropped)), np.array(v), np.array(window)

    def _one(self, q, g, k, v, window):
        s = k[0] @ q[self.keep[g]] + np.where(window, k[1] @ q[~self.keep[g]], 0)
        a = np.exp(s - s.max())
        return a @ v / a.sum()

    def gather(self, b):
        """Dense K and V of row b, NaN where an element is not stored any more."""
        row = self.rows[b]
        k = np.full((self.n_heads, row.len, self.head_dim), np.nan)
        v = np.full((self.n_heads, row.len, self.v_dim), np.nan)
        for j in range(row.len):
            page = row.page[j // self.P].slot[j % self.P]
            stored = j < self.sink or j >= row.lo
            twin = self._dropped(row, j) if stored else None
            for g, keep in enumerate(self.keep):
                k[g, j, keep] = page["k", g]
                if stored:
                    k[g, j, ~keep] = twin["k", g]
                if stored or keep.any():
                    v[g, j] = (page if keep.any() else twin)["v", g]
        return k, v

    # -------------------------------------------------------------------------------------- memory

    def live(self):
        """Count live pages and twins: shared ones once, reserved ones anyway."""
        pages = {id(page) for row in self.rows for page in row.page}
        twins = {id(twin) for row in self.rows for twin in row.twin if twin is not None}
        live = len(pages), 0 if self.keep.all() else len(twins)
        if self.max_tokens is None:
            return live
        return tuple(np.maximum(live, self.predict([0] * len(self.rows))).tolist())

    def predict(self, lengths):
        """Count pages and twins of uncropped rows with a complete prompt, or of reserved ones."""
        if self.max_tokens is not None:
            pages = -(-self.max_tokens // self.P)
            recent = -(-(self.recent + self.slack + self.max_call) // self.P) + 1
            twins = min(pages, -(-self.sink // self.P) + recent)
            return len(lengths) * pages, 0 if self.keep.all() else len(lengths) * twins
        n_pages = n_twins = 0
        for n in lengths:
            lo = max(self.sink, (n - self.recent - self.slack) // self.P * self.P)
            for i in range(-(-n // self.P)):
                n_pages += 1
                n_twins += i * self.P < self.sink or (i + 1) * self.P > lo
        return n_pages, 0 if self.keep.all() else n_twins

    def bytes(self, n_pages, n_twins, elem):
        """Split pages and twins into bytes of K and of V."""
        live = self.keep.any(axis=1)
        page_k, page_v = np.sum(self.keep), np.sum(live) * self.v_dim
        twin_k, twin_v = np.sum(~self.keep), np.sum(~live) * self.v_dim
        slot = self.P * elem
        return (
            int(n_pages * page_k + n_twins * twin_k) * slot,
            int(n_pages * page_v + n_twins * twin_v) * slot,
        )
