"""The mixed attention of mask learning as torch operators with gradients.

The operators ``leank::learn_forward`` and ``leank::learn_backward`` are what torch.compile and
checkpointing see; ``mixed_attention`` checks its arguments and calls them.
"""

import math

import torch

from leank import _C
from leank._arrays import as_array, as_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mixed_attention(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    *,
    sink: int,
    recent: int,
    scale: float | None = None,
    start: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attend densely within the window, and through the factors alpha to what is between.

    The T queries are those of a span that follows a context of Lc columns. A query at position p
    sees the keys at positions up to p. Those at positions below `sink`, or nearer than `recent`,
    are window keys: their logit is ``scale * q . k``. The others are middle keys: their logit is
    ``scale * q . (alpha * k)``. One softmax goes over all, times V.

    There are gradients for `q`, for `k` and `v` of the span, and for `alpha`; the context is taken
    as constant. No array of size T x L is formed in either direction. It does not learn anything
    by itself. All tensors are on the CPU, or on one CUDA device, where D is 64, 80, 96 or 128, Dv
    is D, and the dtype is bfloat16 or float16.

    Parameters
    ----------
    q : tensor [B, Hq, T, D]
        float32, bfloat16 or float16, after the rotary embedding.
    k_context, v_context : tensors [B, Hkv, Lc, D] and [B, Hkv, Lc, Dv]
        Of the columns before the span, without gradient; Lc may be 0.
    k, v : tensors [B, Hkv, T, D] and [B, Hkv, T, Dv]
        Of the span.
    alpha : float32 tensor [Hkv, D]
        Factors of the channels of each KV head.
    sink, recent : int
        First and last tokens that are attended to whole.
    scale : float, optional
        1/sqrt(D) if None.
    start : int64 tensor [B], optional
        Rows are padded on the left: columns before it, counted from the start of the context, are
        padding. None: there is none.
    hidden : bool tensor [Hkv], optional
        True where a head attends to no middle key at all. None: nowhere.

    Returns
    -------
    tensor [B, Hq, T, Dv] of q's dtype; 0 for query columns that are padding.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit; the message names it.

    Notes
    -----
    Source: LeanK, arXiv 2508.02215, section 3. Results are the same bit for bit, whatever the
    number of threads is (``torch.get_num_threads()``). On CUDA products are of the tensors' dtype
    with float32 sums, a tensor whose rows are not 16-byte words in order is copied, and `start` is
    not checked, since that would wait for the device: beyond the columns it means their end.

    Examples
    --------
    >>> q, k, v = torch.ones(1, 2, 3, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 4)
    >>> alpha = torch.ones(1, 8, requires_grad=True)
    >>> o = mixed_attention(q, k[:, :, :0], v[:, :, :0], k, v, alpha, sink=0, recent=1)
    >>> o.shape, o.requires_grad
    (torch.Size([1, 2, 3, 4]), True)
    """
    tensors = {"q": q, "k_context": k_context, "v_context": v_context, "k": k, "v": v}
    _check_tensors(tensors)
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    n_rows, n_q_heads, n_columns, head_dim = shapes["q"]
    n_heads, n_context, v_dim = shapes["k"][1], shapes["k_context"][2], shapes["v"][3]
    if n_heads < 1 or n_q_heads % n_heads:
        raise ValueError(f"q: expected a multiple of {n_heads} heads, got {n_q_heads}")
    _check_shape("k", shapes["k"], (n_rows, n_heads, n_columns, head_dim))
    _check_shape("v", shapes["v"], (n_rows, n_heads, n_columns, v_dim))
    _check_shape("k_context", shapes["k_context"], (n_rows, n_heads, n_context, head_dim))
    _check_shape("v_context", shapes["v_context"], (n_rows, n_heads, n_context, v_dim))
    _check_small("alpha", alpha, torch.float32, (n_heads, head_dim), q.device)
    if start is not None:
        _check_small("start", start, torch.int64, (n_rows,), q.device)
    if hidden is not None:
        _check_small("hidden", hidden, torch.bool, (n_heads,), q.device)
    if torch.is_grad_enabled():
        for name in ("k_context", "v_context"):
            if tensors[name].requires_grad:
                raise ValueError(f"{name}: expected a tensor without gradient, got requires_grad")
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    return _forward(q, k_context, v_context, k, v, alpha, start, hidden, sink, recent, scale)[0]


def _check_tensors(tensors: dict[str, torch.Tensor]) -> None:
    dtype, device = tensors["q"].dtype, tensors["q"].device
    if dtype not in _DTYPES:
        raise TypeError(f"q: expected float32, bfloat16 or float16, got {dtype}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"q: expected a tensor on the CPU or a CUDA device, got one on {device}")
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as q has, got {x.dtype}")
        _check_device(name, x, device)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 axes, got shape {tuple(x.shape)}")


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name}: expected {expected}, got {shape}")


def _check_device(name: str, x: torch.Tensor, expected: torch.device) -> None:
    if x.device != expected:
        raise ValueError(f"{name}: expected a tensor on {expected} as q is, got one on {x.device}")


def _check_small(
    name: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    expected: tuple[int, ...],
    device: torch.device,
) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    _check_device(name, x, device)
    _check_shape(name, tuple(x.shape), expected)


# ------------------------------------------------------------------------------------- operators


def _options(
    start: torch.Tensor | None,
    hidden: torch.Tensor | None,
    sink: int,
    recent: int,
    scale: float,
) -> dict:
    return {
        "start": None if start is None else start.contiguous().numpy(),
        "hidden": None if hidden is None else hidden.contiguous().numpy(),
        "sink": sink,
        "recent": recent,
        "scale": scale,
        "n_threads": torch.get_num_threads(),
    }


@torch.library.custom_op("leank::learn_forward", mutates_args=(), device_types="cpu")
def _forward(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    start: torch.Tensor | None,
    hidden: torch.Tensor | None,
    sink: int,
    recent: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = _C.learn_forward(
        *(as_array(x) for x in (q, k_context, v_context, k, v)),
        as_array(alpha.contiguous()),
        **_options(start, hidden, sink, recent, scale),
    )
    return as_tensor(o), as_tensor(lse)


@_forward.register_kernel("cuda")
def _forward_cuda(*args):
    # Imported when it is needed: leank may have been built without CUDA.
    from leank.learning import ops_cuda

    return ops_cuda.forward(*args)


@_forward.register_fake
def _forward_fake(q, k_context, v_context, k, v, alpha, start, hidden, sink, recent, scale):
    shape = q.shape[:3]
    return q.new_empty((*shape, v.shape[3])), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("leank::learn_backward", mutates_args=(), device_types="cpu")
def _backward(
    d_o: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: torch.Tensor,
    start: torch.Tensor | None,
    hidden: torch.Tensor | None,
    sink: int,
    recent: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv, dalpha = _C.learn_backward(
        *(as_array(x) for x in (d_o, o)),
        as_array(lse.contiguous()),
        *(as_array(x) for x in (q, k_context, v_context, k, v)),
        as_array(alpha.contiguous()),
        **_options(start, hidden, sink, recent, scale),
    )
    return as_tensor(dq), as_tensor(dk), as_tensor(dv), as_tensor(dalpha)


@_backward.register_kernel("cuda")
def _backward_cuda(*args):
    from leank.learning import ops_cuda

    return ops_cuda.backward(*args)


@_backward.register_fake
def _backward_fake(d_o, o, lse, q, k_context, v_context, k, v, alpha, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, alpha))


def _setup_context(ctx, inputs, output):
    *tensors, sink, recent, scale = inputs
    o, lse = output
    ctx.save_for_backward(o, lse, *tensors)
    ctx.rule = sink, recent, scale
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_o, _d_lse):
    if d_o is None:
        return (None,) * 11
    dq, dk, dv, dalpha = _backward(d_o, *ctx.saved_tensors, *ctx.rule)
    return dq, None, None, dk, dv, dalpha, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
