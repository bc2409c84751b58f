"""The mixed attention of mask learning on a CUDA device: tensors to addresses, one call each way.

``leank.learning.ops`` registers these as the CUDA side of its operators, and checks arguments.
"""

import math

import torch

from leank._cuda_built import _cuda, device_info

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MOST = 2**62  # windows beyond this are the same as this


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as the kernels read it, a copy where a row is not 16-byte words in order."""
    strides = [stride for stride, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    in_order = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    if in_order and all(stride % 8 == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strided(x: torch.Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), *x.stride()[:3]


def check_kind(dtype: torch.dtype, head_dim: int) -> None:
    """Check what CUDA limits of a model; TypeError or ValueError."""
    if dtype not in _DTYPES:
        raise TypeError(f"q: expected bfloat16 or float16 on CUDA, got {dtype}")
    if head_dim not in _cuda.LEARN_HEAD_DIMS:
        raise ValueError(
            f"q: expected a head dim of {_cuda.LEARN_HEAD_DIMS} on CUDA, got {head_dim}"
        )


def _check(q: torch.Tensor, v: torch.Tensor, sink: int, recent: int, scale: float) -> None:
    """Check what does not depend on values on the device, and what only CUDA limits."""
    check_kind(q.dtype, q.shape[3])
    if v.shape[3] != q.shape[3]:
        raise ValueError(f"v: expected the head dim of q, {q.shape[3]}, got {v.shape[3]}")
    if q.numel() == 0:
        raise ValueError(f"q: expected at least one row, head and column, got {tuple(q.shape)}")
    if sink < 0:
        raise ValueError(f"sink: expected at least 0, got {sink}")
    if recent < 1:
        raise ValueError(f"recent: expected at least 1, got {recent}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


class _Call:
    """The arguments that both directions share; it keeps their tensors alive."""

    def __init__(self, tensors, alpha, start, hidden, sink, recent, scale, *, backward):
        q = tensors[0]
        _check(q, tensors[4], sink, recent, scale)
        names = ("q", "k_context", "v_context", "k", "v")
        rows = dict(zip(names, (_rows(x.detach()) for x in tensors), strict=True))
        self.small = [x if x is None else x.contiguous() for x in (alpha, start, hidden)]
        info = device_info(q.device.index)
        n_heads, n_context = tensors[1].shape[1:3]
        n_rows, n_q_heads, n_columns, head_dim = q.shape
        sizes = n_rows, n_q_heads, n_heads, n_context, n_columns, head_dim, head_dim
        n_bytes = _cuda.learn_work_bytes(sizes=sizes, backward=backward, n_blocks=info["n_blocks"])
        work = torch.empty(n_bytes, dtype=torch.uint8, device=q.device)
        self.kept = [*rows.values(), work]
        self.arguments = {
            "dtype": _DTYPES[q.dtype],
            "sizes": sizes,
            **{name: _strided(x) for name, x in rows.items()},
            **{
                name: None if x is None else x.data_ptr()
                for name, x in zip(("alpha", "start", "hidden"), self.small, strict=True)
            },
            "sink": min(sink, _MOST),
            "recent": min(recent, _MOST),
            "scale": scale,
            "work": work.data_ptr(),
            "n_blocks": info["n_blocks"],
            "smem_bytes": info["smem_bytes"],
            "stream": torch.cuda.current_stream(q.device).cuda_stream,
        }


def forward(q, k_context, v_context, k, v, alpha, start, hidden, sink, recent, scale):
    """Return o and lse."""
    tensors = q, k_context, v_context, k, v
    call = _Call(tensors, alpha, start, hidden, sink, recent, scale, backward=False)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        _cuda.learn_forward(**call.arguments, o=o.data_ptr(), lse=lse.data_ptr())
    return o, lse


def backward(d_o, o, lse, q, k_context, v_context, k, v, alpha, start, hidden, sink, recent, scale):
    """Return dq, dk, dv and dalpha."""
    tensors = q, k_context, v_context, k, v
    call = _Call(tensors, alpha, start, hidden, sink, recent, scale, backward=True)
    d_o, o, lse = _rows(d_o), _rows(o), lse.contiguous()
    grads = [torch.empty(x.shape, dtype=x.dtype, device=q.device) for x in (q, k, v, alpha)]
    with torch.cuda.device(q.device):
        _cuda.learn_backward(
            **call.arguments,
            d_o=_strided(d_o),
            o=_strided(o),
            lse=lse.data_ptr(),
            **{
                name: x.data_ptr()
                for name, x in zip(("dq", "dk", "dv", "dalpha"), grads, strict=True)
            },
        )
    return tuple(grads)
