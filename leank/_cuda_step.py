"""Attention of new tokens to a ``leank.cuda.LayerCache``: checked, counted, launched.

`decode` is the interface, which ``leank.cuda`` has. In a graph of torch.compile its `step` is the
operator ``leank::attend``, which finds the cache by its memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from leank._cuda_ops import _cuda, find_cache, launch_attend, launch_span
from leank._cuda_ops import ops as _ops

if TYPE_CHECKING:
    from leank.cuda import LayerCache


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
    """Attend by LeanK's rule to a cache and to new tokens, which are stored.

    With one column nothing depends on the host, and it can be compiled and captured. With more, the
    result is that of one column after the other, but for rounding. A call that brings the first
    tokens of some row has at most min(slack + 1, 64) columns; it may wait for the device, as may
    the first one, and one after a crop into a prompt.

    Parameters
    ----------
    cache : LayerCache
    q : tensor [B, Hq, T, D]
        T is 1 without k and v.
    k, v : tensors [B, Hkv, T, D], optional
        K and V of the new tokens. None: they are stored already, and `q` is that of the last
        column.
    valid : bool tensor [B, T], optional
        False where a column is padding of that row.
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
    tensor [B, Hq, T, D], or a pair of it and a float32 tensor [B, Hq, T]
        0 and -inf for padding.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit, or the cache is full; the cache is as it was. A compiled or
        replayed step does not know that the cache is full: see `LayerCache.check`. Rows need shared
        memory: on an H100 up to about 11,000 of them fit.
    RuntimeError
        CUDA refused a launch: of one column, the cache is as it was; of several, it is unusable
        until it is reset. Or several columns are compiled or captured.

    Notes
    -----
    Caches that were made on one stream share a workspace: use them on one stream at a time.

    A call of more than min(slack + 1, 64) columns takes memory while it runs, for the dropped
    channels of its tokens: at most 256 MiB.

    Source: LeanK, arXiv 2508.02215, section 3; online softmax, Milakov 2018.
    """
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both or neither")
    if k is None and valid is not None:
        raise ValueError("valid: expected None without k and v: the cache knows its columns")
    scale = 1 / math.sqrt(cache.head_dim) if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 or a positive finite number, got {softcap}")
    if torch.compiler.is_compiling():
        cache.may_be_replayed = True
        out, lse = _ops.attend(
            q,
            k,
            v,
            valid,
            sinks,
            cache._allocation,
            cache._state,
            cache._limits,
            scale,
            softcap,
            return_lse,
        )
    else:
        out, lse = step(cache, q, k, v, valid, sinks, scale, softcap, return_lse)
    return (out, lse) if return_lse else out


def step(
    cache: LayerCache,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    valid: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    return_lse: bool,
    graph_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check, count and launch what `decode` is asked for; returns out, and lse or None.

    graph_state : int32 tensor, optional
        A compiled graph runs this, and has the state there.
    """
    n_columns = q.shape[2] if k is not None and q.dim() == 4 else 1
    _check_step(cache, q, k, v, sinks, n_columns)
    if valid is not None:
        valid = check_valid(cache, valid, n_columns)
    if n_columns != 1:
        return _span(cache, q, k, v, valid, sinks, scale, softcap, return_lse, graph_state)
    n_new = int(k is not None)
    in_graph = graph_state is not None
    layer = cache.layer_at(graph_state) if in_graph else cache._layer
    if torch.cuda.is_current_stream_capturing():
        cache.may_be_replayed = in_graph = True
    if in_graph and cache.may_be_replayed:
        # The device counts by itself; to ask it is to wait for it.
        columns, cache._is_told = 0, False
    else:
        columns = cache._count(n_new) + n_new
    out = launch_attend(layer, q, k, v, valid, sinks, cache._work, scale, softcap, return_lse)
    cache._columns, cache.is_empty = columns, cache.is_empty and not n_new
    return out


def _span(cache, q, k, v, valid, sinks, scale, softcap, return_lse, graph_state):
    """`step` of several columns, whose number and place the host has to know."""
    n_columns = q.shape[2]
    if graph_state is not None or torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"q: expected one column in a step that is compiled or captured, got {n_columns}"
        )
    before = cache._count(n_columns)
    most = _most_columns(cache, before, n_columns)
    with cache._changing("decode"):
        out = launch_span(cache, q, k, v, valid, sinks, scale, softcap, return_lse, before, most)
    cache._columns, cache.is_empty = before + n_columns, False
    return out


def _most_columns(cache: LayerCache, before: int, n_columns: int) -> int | None:
    """Columns of a call that may be stored before they attend, None: any; may wait.

    Storing so many frees no channel that one of them needs.
    """
    if cache._prompt_end is not None:
        return None
    most = min(cache.slack + 1, _cuda.MOST_PIECE)
    lengths, _, n0 = cache._state[_cuda.STATE_HEADER :].view(3, -1).cpu()
    is_open = n0 == _cuda.STATE_OPEN
    # After a crop into a prompt, queries inside of it see whole what a longer piece would free.
    is_cut = (lengths < n0) & ~is_open
    if is_cut.any():
        most = 1
    if is_open.any() and n_columns > most:
        row = int(is_open.int().argmax())
        raise ValueError(
            f"k: expected at most {most} columns because row {row} has no token yet, and all "
            f"of its prompt is in this call, got {n_columns}"
        )
    if (is_open | is_cut).any():
        return most
    cache._prompt_end = before
    return None


# -------------------------------------------------------------------------------------- in a graph

_LIBRARY = torch.library.Library("leank", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor q, Tensor? k, Tensor? v, Tensor? valid, Tensor? sinks, Tensor memory, "
    "Tensor(a!) state, int[] limits, float scale, float softcap, bool return_lse) "
    "-> (Tensor, Tensor)"
)


def _attend(q, k, v, valid, sinks, memory, state, limits, scale, softcap, return_lse):
    cache = find_cache(memory)
    # Of the argument: a graph that was made functional runs this on a copy, and copies it back.
    out, lse = step(cache, q, k, v, valid, sinks, scale, softcap, return_lse, graph_state=state)
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


_LIBRARY.impl("attend", _attend, "CUDA")


@torch.library.register_fake("leank::attend", lib=_LIBRARY)
def _attend_fake(q, k, v, valid, sinks, memory, state, limits, scale, softcap, return_lse):
    lse_shape = (q.shape[0], q.shape[1], 1) if return_lse else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        lse_shape, dtype=torch.float32
    )


# --------------------------------------------------------------------------------------- checks


def _check_step(
    cache: LayerCache,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    sinks: torch.Tensor | None,
    n_columns: int,
) -> None:
    n_heads = cache.n_heads
    n_q_heads = q.shape[1] if q.dim() == 4 else 0
    check_tensor(cache, q, "q", (cache.n_rows, n_q_heads, n_columns, cache.head_dim))
    if n_q_heads == 0 or n_q_heads % n_heads or n_q_heads // n_heads > _cuda.MAX_R:
        raise ValueError(
            f"q: expected a multiple of {n_heads} query heads, at most {_cuda.MAX_R} per KV "
            f"head, got {n_q_heads}"
        )
    if k is not None:
        shape = (cache.n_rows, n_heads, n_columns, cache.head_dim)
        check_tensor(cache, k, "k", shape)
        check_tensor(cache, v, "v", shape)
    if sinks is not None:
        fits = sinks.dtype == torch.float32 and tuple(sinks.shape) == (n_q_heads,)
        if not (fits and sinks.device == cache.device and sinks.is_contiguous()):
            raise ValueError(
                f"sinks: expected contiguous float32 ({n_q_heads},) on {cache.device}, "
                f"got {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}"
            )


def check_tensor(cache: LayerCache, x: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Require the cache's dtype and device, a shape, and a contiguous last axis."""
    if (
        x.shape == shape
        and x.dtype == cache.dtype
        and x.device == cache.device
        and x.stride(-1) == 1
    ):
        return
    if x.dtype != cache.dtype:
        raise TypeError(f"{name}: expected {cache.dtype}, got {x.dtype}")
    if x.device != cache.device:
        raise ValueError(f"{name}: expected device {cache.device}, got {x.device}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(x.shape)}")
    if x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last axis, got strides {x.stride()}")


def check_valid(cache: LayerCache, valid: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Return `valid`, which must be bool [B, n_columns] on the cache's device, contiguous."""
    if valid.dtype != torch.bool or valid.device != cache.device:
        raise TypeError(
            f"valid: expected torch.bool on {cache.device}, got {valid.dtype} on {valid.device}"
        )
    if tuple(valid.shape) != (cache.n_rows, n_columns):
        raise ValueError(f"valid: expected {(cache.n_rows, n_columns)}, got {tuple(valid.shape)}")
    return valid.contiguous()
