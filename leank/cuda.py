"""Packed K and V of one attention layer on a CUDA device, and attention of one new token per row.

A cache is reserved: its pages are allocated when it is made, its lengths live on the device, and a
step neither allocates nor waits, so that it can be compiled with ``torch.compile(fullgraph=True)``
and captured in a CUDA graph. Kernels are in the extension ``leank._cuda``.
"""

import math

import numpy as np
import torch

from leank import _C
from leank._cuda_ops import _cuda, make_layer, workspace
from leank._cuda_ops import ops as _ops

__all__ = ["LayerCache", "decode"]

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Windows beyond this are the same as this: lengths are int32 on the device.
_MOST_TOKENS = 2**29


class LayerCache:
    """Packed K and V of one attention layer on a CUDA device.

    The rule and the sizes are those of ``leank.LayerCache``. A row's prompt is its first call with
    a token of that row. Caches of one device share a workspace: use them on one stream at a time.

    Parameters
    ----------
    keep : bool array [Hkv, D]
        The mask; each head keeps a multiple of 8 channels. D is 64, 80, 96 or 128, and Dv is D.
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
        if not 1 <= n_rows <= 65535 or n_rows * len(keep) > _cuda.MAX_UNITS:
            raise ValueError(
                f"n_rows: expected 1 to 65535, and at most {_cuda.MAX_UNITS} rows * KV heads, "
                f"got {n_rows} * {len(keep)}"
            )
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
        self.device = torch.device(device)
        if self.device.type != "cuda":
            raise ValueError(f"device: expected a CUDA device, got {self.device}")
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.keep, self.dtype, self.n_rows = keep, dtype, n_rows
        self.n_heads, self.head_dim = keep.shape
        self.sink, self.recent, self.slack, self.max_tokens = sink, recent, slack, max_tokens
        self._limits = [min(x, _MOST_TOKENS) for x in (sink, recent, slack, max_tokens)]
        self._reserve()
        # Once a step was compiled or captured it may be replayed, which only the device counts.
        self._may_be_replayed = False
        self.reset()

    def _reserve(self) -> None:
        """Allocate pages and twins in one slab, and fill the tables that say where they are."""
        memory, n_rows = self._memory, self.n_rows
        geom, page_bytes, twin_bytes = _cuda.geometry(
            self.keep.tobytes(), self.n_heads, self.head_dim
        )
        page_tokens = _C.PAGE_TOKENS
        n_pages = memory["n_pages"] // n_rows
        n_twins = memory["n_twins"] // n_rows
        n_bytes = memory["n_pages"] * page_bytes + memory["n_twins"] * twin_bytes
        assert n_bytes == memory["total_bytes"], (n_bytes, memory)
        # Zeros, so that a kernel that reads a whole page reads nothing that was never written.
        self.slab = torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)
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
        tables = np.stack([page, twin]).astype(np.int64)
        self._table = torch.from_numpy(tables).to(self.device)
        self._geom = torch.frombuffer(bytearray(geom), dtype=torch.uint8).to(self.device)
        self._state = torch.zeros(
            _cuda.STATE_HEADER + 3 * n_rows, dtype=torch.int32, device=self.device
        )
        self._real = torch.zeros(n_rows, self.max_tokens, dtype=torch.uint8, device=self.device)
        self._work = workspace(self.device.index)

    # ------------------------------------------------------------------------------- what is stored

    def _rows(self, index: int) -> torch.Tensor:
        first = _cuda.STATE_HEADER + index * self.n_rows
        return self._state[first : first + self.n_rows]

    @property
    def n_columns(self) -> int:
        """Columns stored, padding included. Waits for the device."""
        return int(self._state[_cuda.STATE_COLUMNS])

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row: int64 [B] on the CPU. Waits for the device."""
        self.check()
        return self._rows(0).cpu().long()

    @property
    def lo(self) -> torch.Tensor:
        """Position after the sink from which dropped channels are stored: int64 [B] on the CPU."""
        return self._rows(1).cpu().long()

    def check(self) -> None:
        """Raise RuntimeError if a compiled or replayed step went past `max_tokens`.

        Such a step stores nothing, and its output is 0. Waits for the device.
        """
        if int(self._state[_cuda.STATE_OVERFLOW]):
            raise RuntimeError(
                f"cache: a compiled or replayed step went past max_tokens = {self.max_tokens}; "
                "its tokens were not stored"
            )

    def memory(self) -> dict[str, int]:
        """Return the bytes of pages and twins, as ``leank.LayerCache.memory``."""
        return {**self._memory, "slab_bytes": self.slab.numel()}

    def reset(self) -> None:
        """Make every row empty; the next call brings a new prompt."""
        self._state.zero_()
        self._rows(1).fill_(min(self.sink, _MOST_TOKENS))
        self._rows(2).fill_(_cuda.STATE_OPEN)
        self._columns = 0

    # ------------------------------------------------------------------------------------- changes

    def _count(self, n_new: int) -> int:
        """Columns before a call of n_new columns, which must fit."""
        before = self.n_columns if self._may_be_replayed else self._columns
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
            A CUDA graph is being captured: where the columns go would be part of it.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("append: expected no capture, got a stream that is being captured")
        n_columns = k.shape[2] if k.dim() == 4 else -1
        self._check_tensor(k, "k", (self.n_rows, self.n_heads, n_columns, self.head_dim))
        self._check_tensor(v, "v", (self.n_rows, self.n_heads, n_columns, self.head_dim))
        if valid is not None:
            valid = self._check_valid(valid, n_columns)
        before = self._count(n_columns)
        _ops.append(
            k,
            v,
            valid,
            self.slab,
            self._state,
            self._real,
            self._table,
            self._geom,
            before,
            self._limits,
        )
        self._columns = before + n_columns

    def crop(self, n_columns: int) -> None:
        """Keep the first `n_columns` columns; 0 makes every row empty."""
        now = self._count(0)
        if not 0 <= n_columns <= now:
            raise ValueError(f"n_columns: expected 0 to {now}, got {n_columns}")
        _ops.crop(
            self.slab,
            self._state,
            self._real,
            self._table,
            self._geom,
            n_columns,
            self._limits,
        )
        self._columns = n_columns

    def gather(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k and v [Hkv, L, D] of one row; NaN where nothing is stored any more."""
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row: expected 0 to {self.n_rows - 1}, got {row}")
        shape = (self.n_heads, int(self.lengths[row]), self.head_dim)
        k, v = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in "kv")
        with torch.cuda.device(self.device):
            tensors = self._state, self._real, self._table, self._geom
            layer = make_layer(tensors, self._limits, self.n_heads, self.head_dim, self.dtype)
            stream = torch.cuda.current_stream().cuda_stream
            _cuda.gather(layer, row, shape[1], k.data_ptr(), v.data_ptr(), stream)
        return k, v

    def __deepcopy__(self, memo: dict) -> "LayerCache":
        """Raise TypeError."""
        raise TypeError("leank.cuda.LayerCache cannot be copied yet: its tables hold addresses")

    def __reduce__(self) -> str:
        """Raise TypeError."""
        raise TypeError("leank.cuda.LayerCache cannot be pickled yet: its tables hold addresses")

    # --------------------------------------------------------------------------------------- checks

    def _check_tensor(self, x: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
        if x.dtype != self.dtype:
            raise TypeError(f"{name}: expected {self.dtype}, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {x.device}")
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(x.shape)}")
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous last axis, got strides {x.stride()}")

    def _check_valid(self, valid: torch.Tensor, n_columns: int) -> torch.Tensor:
        if valid.dtype != torch.bool or valid.device != self.device:
            raise TypeError(
                f"valid: expected torch.bool on {self.device}, got {valid.dtype} on {valid.device}"
            )
        if tuple(valid.shape) != (self.n_rows, n_columns):
            raise ValueError(
                f"valid: expected {(self.n_rows, n_columns)}, got {tuple(valid.shape)}"
            )
        return valid.contiguous()


def decode(
    cache: LayerCache,
    q: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend by LeanK's rule to a cache and to one new token per row, which is stored.

    Parameters
    ----------
    cache : LayerCache
    q : tensor [B, Hq, 1, D]
    k, v : tensors [B, Hkv, 1, D], optional
        K and V of the new token. None: they are stored already, and `q` is that of the last column.
    valid : bool tensor [B, 1], optional
        False where the column is padding of that row.
    scale : float, optional
        1/sqrt(D) if None.
    softcap : float
        Above 0, logits become softcap * tanh(logit / softcap).
    sinks : float32 tensor [Hq], optional
        Logits of one more key per query head that has no value.
    return_lse : bool
        Return the logarithm of the sum of exponentials too.

    Returns
    -------
    tensor [B, Hq, 1, D], or a pair of it and a float32 tensor [B, Hq, 1]
        0 and -inf for padding.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit, or the cache is full; the cache is as it was. A compiled or
        replayed step does not know that the cache is full: see `LayerCache.check`.

    Notes
    -----
    Caches of one device share a workspace: use them on one stream at a time.

    Source: LeanK, arXiv 2508.02215, section 3; online softmax, Milakov 2018.
    """
    n_rows, n_heads, head_dim = cache.n_rows, cache.n_heads, cache.head_dim
    n_q_heads = q.shape[1] if q.dim() == 4 else 0
    cache._check_tensor(q, "q", (n_rows, n_q_heads, 1, head_dim))
    if n_q_heads == 0 or n_q_heads % n_heads or n_q_heads // n_heads > _cuda.MAX_R:
        raise ValueError(
            f"q: expected a multiple of {n_heads} query heads, at most {_cuda.MAX_R} per KV head, "
            f"got {n_q_heads}"
        )
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither")
    if k is None and valid is not None:
        raise ValueError("valid: expected None without k and v: the cache knows its columns")
    if k is not None:
        cache._check_tensor(k, "k", (n_rows, n_heads, 1, head_dim))
        cache._check_tensor(v, "v", (n_rows, n_heads, 1, head_dim))
    if valid is not None:
        valid = cache._check_valid(valid, 1)
    if sinks is not None:
        fits = sinks.dtype == torch.float32 and tuple(sinks.shape) == (n_q_heads,)
        if not (fits and sinks.device == cache.device and sinks.is_contiguous()):
            raise ValueError(
                f"sinks: expected contiguous float32 ({n_q_heads},) on {cache.device}, "
                f"got {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}"
            )
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 or a positive finite number, got {softcap}")
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        cache._may_be_replayed = True
        columns = 0  # is not used any more
    else:
        columns = cache._count(int(k is not None)) + int(k is not None)
    out, lse = _ops.attend(
        q,
        k,
        v,
        valid,
        sinks,
        cache.slab,
        cache._state,
        cache._real,
        cache._work,
        cache._table,
        cache._geom,
        cache._limits,
        scale,
        softcap,
        return_lse,
    )
    cache._columns = columns
    return (out, lse) if return_lse else out
