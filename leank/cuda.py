"""Packed K and V of one attention layer on a CUDA device, and attention of new tokens.

A cache is reserved: its pages are allocated when it is made, its lengths live on the device, and a
step of one token per row neither allocates nor waits, so that it can be compiled with
``torch.compile(fullgraph=True)`` and captured in a CUDA graph. Kernels are in the extension
``leank._cuda``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from leank import _C
from leank._cuda_ops import _cuda, make_layer, register_cache, workspace
from leank._cuda_ops import ops as _ops
from leank._cuda_step import check_tensor, check_valid, decode

__all__ = ["LayerCache", "decode", "read_columns"]

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Windows beyond this are the same as this: lengths are int32 on the device.
_MOST_TOKENS = 2**29


class LayerCache:
    """Packed K and V of one attention layer on a CUDA device.

    The rule and the sizes are those of ``leank.LayerCache``. A row's prompt is its first call with
    a token of that row. Caches that were made on one stream share a workspace: use them on one
    stream at a time.

    Where CUDA refuses a part of a change (RuntimeError), the cache is unusable: what follows
    raises, until `reset`; after replayed steps `check` does. After other errors it is as it was.

    Parameters
    ----------
    keep : bool array [Hkv, D]
        The mask; each head keeps a multiple of 8 channels. D is 64, 80, 96, 128 or 256; Dv is D.
    n_rows : int
        B.
    sink, recent : int
        Tokens at the start and at the end that keep every channel.
    slack : int
        Tokens beyond `recent` that stay whole so that crops lose nothing.
    dtype : torch.dtype
        torch.bfloat16 or torch.float16.
    max_tokens : int
        Columns that fit; the pages for as many tokens of each row are allocated now.
    device : torch.device or str

    Raises
    ------
    ValueError
        An argument does not fit; the message names it.
    torch.OutOfMemoryError
        The pages do not fit on the device.

    Notes
    -----
    Source: LeanK, arXiv 2508.02215, section 3.
    """

    def __init__(
        self,
        keep: np.ndarray,
        *,
        n_rows: int,
        sink: int,
        recent: int,
        max_tokens: int,
        slack: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
        self.n_heads = len(keep)
        self._check_row_count(n_rows, "n_rows")
        if not 1 <= max_tokens <= _MOST_TOKENS:
            raise ValueError(f"max_tokens: expected 1 to {_MOST_TOKENS}, got {max_tokens}")
        keep = np.ascontiguousarray(keep)
        # Checks keep and the window too.
        self._memory = _C.predict_memory(
            keep,
            np.full(n_rows, max_tokens),
            sink=sink,
            recent=recent,
            slack=slack,
            dtype=_DTYPES[dtype],
            max_tokens=max_tokens,
        )
        if keep.shape[1] not in _cuda.HEAD_DIMS:
            raise ValueError(f"keep: expected a head dim of {_cuda.HEAD_DIMS}, got {keep.shape[1]}")
        self.device = _checked_device(device)
        self.keep, self.dtype, self.n_rows = keep, dtype, n_rows
        self.head_dim = self.v_dim = keep.shape[1]
        self.sink, self.recent, self.slack, self.max_tokens = sink, recent, slack, max_tokens
        self._limits = [min(x, _MOST_TOKENS) for x in (sink, recent, slack, max_tokens)]
        self._reserve()
        # Once a step was compiled or captured it may be replayed, which only the device counts.
        self.may_be_replayed = False
        self.reset()

    @torch.inference_mode(False)  # else they could only be changed in that mode
    def _reserve(self) -> None:
        """Allocate pages and twins in one slab, and fill the tables that say where they are."""
        memory, n_rows = self._memory, self.n_rows
        geom, page_bytes, twin_bytes = _cuda.geometry(
            self.keep.tobytes(), self.n_heads, self.head_dim
        )
        self._item_bytes = [page_bytes, twin_bytes]
        page_tokens = _C.PAGE_TOKENS
        n_pages = memory["n_pages"] // n_rows
        n_twins = memory["n_twins"] // n_rows
        n_bytes = memory["n_pages"] * page_bytes + memory["n_twins"] * twin_bytes
        assert n_bytes == memory["total_bytes"], (n_bytes, memory)
        # All but the state is one allocation: its address and sizes tell a graph all addresses.
        sizes = (
            n_bytes,
            2 * n_rows * n_pages * 8,  # where each page and its twin are
            len(geom),
            n_rows * self.max_tokens,  # 1 where a column is a token, anything where none is stored
        )
        starts = np.cumsum([0, *(-(-size // 256) * 256 for size in sizes)])
        # Zeros, so that a kernel that reads a whole page reads nothing that was never written.
        self._allocation = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=self.device)
        self.slab, table, self._geom, real = (
            self._allocation[start : start + size]
            for start, size in zip(starts[:-1], sizes, strict=True)
        )
        self._table = table.view(torch.int64).view(2, n_rows, n_pages)
        self._real = real.view(n_rows, self.max_tokens)
        page = self.slab.data_ptr() + np.arange(n_rows * n_pages).reshape(n_rows, -1) * page_bytes
        twin = np.zeros_like(page)
        if n_twins:
            # Page i's twin: one of its own in the sink, then a ring that holds the recent window.
            n_sink = min(n_pages, -(-self.sink // page_tokens))
            i = np.arange(n_pages)
            ring = max(n_twins - n_sink, 1)
            slot = np.where(i < n_sink, i, n_sink + (i - n_sink) % ring)
            first = self.slab.data_ptr() + n_rows * n_pages * page_bytes
            twin = first + (np.arange(n_rows)[:, None] * n_twins + slot) * twin_bytes
        self._table.copy_(torch.from_numpy(np.stack([page, twin]).astype(np.int64)))
        self._geom.copy_(torch.frombuffer(bytearray(geom), dtype=torch.uint8))
        self._state = torch.zeros(
            _cuda.STATE_HEADER + 3 * n_rows, dtype=torch.int32, device=self.device
        )
        self._buffers = self.slab, self._state, self._real, self._table, self._geom
        self._work = workspace(self.device.index)
        self._layer = self._layer_with(self._state)
        register_cache(self, self._allocation)
        for x in (self._allocation, self._state):
            # A graph that torch captures takes them where they are, instead of copying them.
            torch._dynamo.mark_static_address(x, guard=False)

    def layer_at(self, state: torch.Tensor) -> _cuda.Layer:
        """Return addresses and sizes for the kernels, with the state where a graph has it."""
        here = state.data_ptr() == self._state.data_ptr()
        return self._layer if here else self._layer_with(state)

    def _layer_with(self, state: torch.Tensor) -> _cuda.Layer:
        buffers = state, self._real, self._table, self._geom
        return make_layer(buffers, self._limits, self.n_heads, self.head_dim, self.dtype)

    def _check_row_count(self, n_rows: int, name: str) -> None:
        if not 1 <= n_rows <= 65535 or n_rows * self.n_heads > _cuda.MAX_UNITS:
            raise ValueError(
                f"{name}: expected 1 to 65535 rows, and at most {_cuda.MAX_UNITS} rows * KV heads, "
                f"got {n_rows} * {self.n_heads}"
            )

    # ------------------------------------------------------------------------------- what is stored

    def _rows(self, index: int) -> torch.Tensor:
        first = _cuda.STATE_HEADER + index * self.n_rows
        return self._state[first : first + self.n_rows]

    @property
    def columns(self) -> torch.Tensor:
        """Columns stored, padding included: int64 [] on the device."""
        return _ops.columns(self._state)

    @property
    def n_columns(self) -> int:
        """The same as an int. Waits for the device once a step was compiled or captured."""
        if self.may_be_replayed:
            self._refuse_half_changed()
            return int(self.columns)
        return self._columns

    @property
    def columns_of_call(self) -> int:
        """The same for a call that begins: if `tell_columns` said so before it, nothing waits.

        At other times it may be old: that call was refused, and steps were replayed since.
        """
        return self._columns if self._is_told else self.n_columns

    def tell_columns(self, n_columns: int) -> None:
        """Say how many columns are stored, so that the next call need not wait to read it."""
        self._columns, self._is_told = n_columns, True

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row: int64 [B] on the CPU. Waits for the device."""
        self.check()
        return self._rows(0).cpu().long()

    @property
    def lo(self) -> torch.Tensor:
        """Position after the sink from which dropped channels are stored: int64 [B] on the CPU."""
        return self._rows(1).cpu().long()

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """Tokens of each row's prompt, -1 without one: int64 [B] on the CPU. Waits."""
        n0 = self._rows(2).cpu().long()
        return n0.where(n0 != _cuda.STATE_OPEN, -1)

    @property
    def real(self) -> np.ndarray:
        """Which columns are tokens of a row: bool array [B, columns]. Waits for the device."""
        return self._real[:, : self.n_columns].cpu().numpy() != 0

    def check(self) -> None:
        """Raise RuntimeError if a compiled or replayed step went past `max_tokens`.

        Such a step stores nothing, and its output is 0. Waits for the device. Also raises for a
        cache that is unusable.
        """
        self._refuse_half_changed()
        if int(self._state[_cuda.STATE_OVERFLOW]):
            raise RuntimeError(
                f"cache: a compiled or replayed step went past max_tokens = {self.max_tokens}; "
                "its tokens were not stored"
            )

    def step_columns(self, mask: torch.Tensor | None, misfit: torch.Tensor) -> torch.Tensor:
        """Return `valid` for the next column from an attention mask, without waiting.

        Parameters
        ----------
        mask : tensor [B or 1, 1, 1, max_tokens], optional
            Where the column's query may attend: True, or 0 if it is of floating point. None: to
            everything.
        misfit : int32 tensor []
            Becomes the number of the new column, if that is less, where the mask hides a token that
            is stored, or shows anything else but the new column.

        Returns
        -------
        bool tensor [B, 1]
            For `decode`.

        Raises
        ------
        ValueError
            The mask or `misfit` is elsewhere, or has another shape or dtype.
        """
        if mask is not None:
            if mask.device != self.device:
                raise ValueError(f"attention_mask: expected {self.device}, got {mask.device}")
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(
                    f"attention_mask: expected torch.bool or floating point, got {mask.dtype}"
                )
            shape = (self.n_rows, 1, 1, self.max_tokens)
            if tuple(mask.shape) not in (shape, (1, *shape[1:])):
                raise ValueError(
                    f"attention_mask: expected {shape}, the same for all heads, "
                    f"got {tuple(mask.shape)}"
                )
        if misfit.dtype != torch.int32 or misfit.dim() or misfit.device != self.device:
            raise ValueError(
                f"misfit: expected torch.int32 [] on {self.device}, "
                f"got {misfit.dtype} {list(misfit.shape)} on {misfit.device}"
            )
        return _ops.step_columns(mask, self._allocation, self._state, misfit)

    def memory(self) -> dict[str, int]:
        """Return the bytes of pages and twins, as ``leank.LayerCache.memory``."""
        return {**self._memory, "slab_bytes": self.slab.numel()}

    def reset(self) -> None:
        """Make every row empty; the next call brings a new prompt."""
        with self._changing("reset"):
            self._state.zero_()
            self._rows(1).fill_(min(self.sink, _MOST_TOKENS))
            self._rows(2).fill_(_cuda.STATE_OPEN)
        self._half_changed: str | None = None  # by what
        self._columns, self._is_told, self.is_empty = 0, False, True
        # So many columns hold every row's prompt; None: not known.
        self._prompt_end: int | None = None

    # ------------------------------------------------------------------------------------- changes

    @contextlib.contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Make the cache unusable where CUDA refuses one of several launches."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # what is allocated comes before the first launch
        except RuntimeError:
            # It looks like one that the host cannot count: so no step pays for being asked.
            self._half_changed, self.may_be_replayed, self._is_told = what, True, False
            raise

    def _refuse_half_changed(self) -> None:
        if self._half_changed is not None:
            raise RuntimeError(
                f"cache: expected one that is whole, got one that {self._half_changed} left half "
                "changed when CUDA refused a launch; reset() it and feed everything again"
            )

    def _count(self, n_new: int) -> int:
        """Columns before a call of n_new columns, which must fit."""
        before, self._is_told = self.columns_of_call, False
        if before + n_new > self.max_tokens:
            raise ValueError(
                f"cache: expected at most max_tokens = {self.max_tokens} columns, "
                f"got {before} + {n_new}"
            )
        return before

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Store K and V [B, Hkv, T, D] of T new columns that attend elsewhere (a prompt).

        Parameters
        ----------
        k, v : tensors [B, Hkv, T, D]
            Last axis contiguous.
        valid : bool tensor [B, T], optional
            False where a column is padding of that row.

        Raises
        ------
        ValueError
            A tensor does not fit, or the columns are more than `max_tokens`; nothing is stored.
        RuntimeError
            A CUDA graph is being captured: where the columns go would be part of it. Or CUDA
            refused a launch.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("append: expected no capture, got a stream that is being captured")
        n_columns = k.shape[2] if k.dim() == 4 else -1
        check_tensor(self, k, "k", (self.n_rows, self.n_heads, n_columns, self.head_dim))
        check_tensor(self, v, "v", (self.n_rows, self.n_heads, n_columns, self.head_dim))
        if valid is not None:
            valid = check_valid(self, valid, n_columns)
        before = self._count(n_columns)
        with self._changing("append"):
            _ops.append(k, v, valid, *self._buffers, before, self._limits)
        self._columns, self.is_empty = before + n_columns, before + n_columns == 0
        if before == 0 and valid is None and n_columns:
            self._prompt_end = n_columns

    def crop(self, n_columns: int) -> None:
        """Keep the first `n_columns` columns; 0 makes every row empty."""
        self._is_told = False
        now = self.n_columns
        if not 0 <= n_columns <= now:
            raise ValueError(f"n_columns: expected 0 to {now}, got {n_columns}")
        _ops.crop(*self._buffers, n_columns, self._limits)
        self._columns, self.is_empty = n_columns, n_columns == 0
        if self._prompt_end is not None and n_columns < self._prompt_end:
            self._prompt_end = None

    def gather(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k and v [Hkv, L, D] of one row; NaN where nothing is stored any more."""
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row: expected 0 to {self.n_rows - 1}, got {row}")
        n_tokens = int(self.lengths[row])
        return _ops.gather(*self._buffers, row, n_tokens, self.head_dim, self.dtype, self._limits)

    def select(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Make row i the former row rows[i]: reorder, drop and repeat rows.

        With as many rows as before, tables are changed in place, so that captured steps stay valid;
        only repeated rows are copied. With another number of rows, pages are allocated anew and all
        rows are copied, and steps that were compiled or captured must be made again.

        Parameters
        ----------
        rows : int [n]
            Former rows, 1 to 65535 of them. A tensor on the device is waited for.

        Raises
        ------
        TypeError, ValueError, IndexError
            `rows` are not integers in one dimension, are none or too many, or there is no such row.
        torch.OutOfMemoryError
            Pages for another number of rows do not fit; the cache is as it was.
        RuntimeError
            CUDA refused a launch.
        """
        self.prepare_select(rows)()

    def prepare_select(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> Callable[[], None]:
        """Return what does the rest of `select`, for which nothing is left to be allocated.

        The cache is as it was until that is called, and must not be changed before. So the caches
        of several layers change all, or none.
        """
        if isinstance(rows, torch.Tensor):
            rows = rows.cpu().numpy()
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(f"rows: expected integers [n], got {rows.dtype} {list(rows.shape)}")
        self._check_row_count(len(rows), "rows")
        if rows.min() < 0 or rows.max() >= self.n_rows:
            bad = rows[(rows < 0) | (rows >= self.n_rows)][0]
            raise IndexError(f"rows: expected 0 to {self.n_rows - 1}, got {bad}")
        rows = rows.astype(np.int64)
        if len(rows) != self.n_rows:
            other = self._like(len(rows))
            other._copy_from(self, rows)
            return partial(self._become, other)
        # The first to ask for a former row gets its pages, others those that nobody asked for.
        former, first, place = np.unique(rows, return_index=True, return_inverse=True)
        unused = np.setdiff1d(np.arange(self.n_rows), former)
        repeats = np.setdiff1d(np.arange(self.n_rows), first)
        pages_of = rows.copy()
        pages_of[repeats] = unused
        table = self._table[:, self._on_device(pages_of)]
        move = self._prepare_move(self, rows, np.stack([repeats, first[place][repeats]], 1))

        def change() -> None:
            with self._changing("select"):
                self._table.copy_(table)
                move()

        return change

    def _become(self, other: "LayerCache") -> None:
        """Take everything from another cache, which nobody else has."""
        self.__dict__.update(other.__dict__)
        register_cache(self, self._allocation)

    def copy(self) -> "LayerCache":
        """Return a cache with the same rows and pages of its own."""
        other = self._like(self.n_rows)
        other._copy_from(self, np.arange(self.n_rows))
        return other

    def __deepcopy__(self, memo: dict) -> "LayerCache":
        """Return `copy()`."""
        return self.copy()

    def _like(self, n_rows: int) -> "LayerCache":
        """Return an empty cache that differs in the number of rows only."""
        return LayerCache(
            self.keep,
            n_rows=n_rows,
            sink=self.sink,
            recent=self.recent,
            slack=self.slack,
            dtype=self.dtype,
            max_tokens=self.max_tokens,
            device=self.device,
        )

    def _on_device(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.int64)).to(self.device)

    def _copy_from(self, other: "LayerCache", rows: np.ndarray) -> None:
        self._prepare_move(other, rows, np.stack([np.arange(len(rows)), rows], 1))()

    def _prepare_move(
        self, other: "LayerCache", rows: np.ndarray, pairs: np.ndarray
    ) -> Callable[[], None]:
        """Return what takes lengths, real columns and pages of rows of another cache, or this one.

        rows [B]: whose lengths and columns; pairs [n, 2]: to and from which row pages are copied.
        """
        index, pairs = self._on_device(rows), self._on_device(pairs).int()
        header, n_columns = _cuda.STATE_HEADER, other.n_columns
        real, state = other._real[index], other._state[header:].view(3, -1)[:, index]

        def move() -> None:
            self._real.copy_(real)
            self._state[header:].view(3, -1).copy_(state)
            self._state[:header].copy_(other._state[:header])
            self._columns, self._is_told = n_columns, False
            self._prompt_end = other._prompt_end
            self.is_empty = other.is_empty
            _ops.copy_pages(
                self.slab,
                self._state,
                self._table,
                None if other is self else other.slab,
                other._state,
                other._table,
                self._geom,
                pairs,
                self._item_bytes,
                self._limits,
            )

        return move

    def __reduce__(self) -> str:
        """Raise TypeError."""
        raise TypeError("leank.cuda.LayerCache cannot be pickled yet: its tables hold addresses")


def read_columns(caches: Sequence[LayerCache]) -> list[int]:
    """Return the columns stored in each cache; waits for the device once, not for each of them."""
    counts = [cache._columns for cache in caches]
    unknown = [i for i, cache in enumerate(caches) if cache.may_be_replayed]
    if unknown:
        for i in unknown:
            caches[i]._refuse_half_changed()
        there = [caches[i]._state[_cuda.STATE_COLUMNS] for i in unknown]
        read = torch.stack([x.to(there[0].device) for x in there]).tolist()
        for i, n_columns in zip(unknown, read, strict=True):
            counts[i] = n_columns
    return counts


def _checked_device(device: torch.device | str) -> torch.device:
    """Return a CUDA device with its number."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}")
    n_devices = torch.cuda.device_count()
    if (device.index or 0) >= n_devices:
        raise ValueError(
            f"device: expected one of the {n_devices} GPUs that torch sees (CUDA_VISIBLE_DEVICES "
            f"hides others), got {device}"
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
