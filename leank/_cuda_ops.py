"""The CUDA kernels as torch operators, so that torch.compile can trace through them.

A graph knows a cache by two tensors: its memory, of which the address tells which cache it is, and
its state (lengths). Only the state is named as changed, so that steps come in order: a graph made
functional would give an operator that changes pages a copy of them, while the table holds addresses
in the original, and the copy would replace what was written.
"""

import functools
import weakref

import torch

from leank._cuda_built import _cuda
from leank._cuda_built import device_info as _device_info

_LIBRARY = torch.library.Library("leank", "DEF")
# What a step asks about lengths is an operator of its own, since it must be known before `attend`
# changes them: inductor computes what it can see through again where it is used, and later.
_LIBRARY.define("columns(Tensor state) -> Tensor")
_LIBRARY.define(
    "step_columns(Tensor? mask, Tensor memory, Tensor state, Tensor(a!) misfit) -> Tensor"
)
_LIBRARY.define(
    "append(Tensor k, Tensor v, Tensor? valid, Tensor slab, Tensor(b!) state, "
    "Tensor(c!) real, Tensor table, Tensor geom, int columns_before, int[] limits) -> ()"
)
_LIBRARY.define(
    "crop(Tensor(a!) slab, Tensor(b!) state, Tensor(c!) real, Tensor table, Tensor geom, "
    "int n_columns, int[] limits) -> ()"
)
_LIBRARY.define(
    "gather(Tensor slab, Tensor state, Tensor real, Tensor table, Tensor geom, int row, "
    "int n_tokens, int head_dim, ScalarType dtype, int[] limits) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "copy_pages(Tensor(a!) slab, Tensor state, Tensor table, Tensor? from_slab, "
    "Tensor from_state, Tensor from_table, Tensor geom, Tensor pairs, int[] n_bytes, "
    "int[] limits) -> ()"
)
ops = torch.ops.leank
# More than any column, and int32 with one added: what `step_columns` notes of masks that fit.
NO_COLUMN = 2**30
# By the address of its memory: the leank.cuda.LayerCache.
_caches: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()


def register_cache(cache: object, memory: torch.Tensor) -> None:
    """Let operators find a cache by its memory."""
    _caches[memory.data_ptr()] = cache


def find_cache(memory: torch.Tensor) -> object:
    """Return the cache whose memory it is."""
    cache = _caches.get(memory.data_ptr())
    if cache is None:
        raise RuntimeError(
            "leank: expected the memory of a leank.cuda.LayerCache that is in use, got a copy of "
            "one, or that of a cache that is gone"
        )
    return cache


def workspace(device: int) -> torch.Tensor:
    """Return the workspace of attend launches on a device's current stream.

    Launches on one stream follow each other, so that they may share it; caches that are used on
    several streams at the same time may not. It stays, since captured graphs have its address.
    """
    return _workspace(device, current_stream(device))


@functools.cache
def _workspace(device: int, stream: int) -> torch.Tensor:
    n_bytes = _cuda.attend_work_bytes(
        max(_cuda.HEAD_DIMS), _cuda.MAX_R, _device_info(device)["n_blocks"]
    )
    return torch.zeros(n_bytes, dtype=torch.uint8, device=torch.device("cuda", device))


def current_stream(device: int) -> int:
    """Return torch's stream; what torch.cuda.current_stream makes around it takes time."""
    return torch._C._cuda_getCurrentRawStream(device)


def make_layer(
    tensors: tuple[torch.Tensor, ...],
    limits: list[int],
    n_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> _cuda.Layer:
    """Return the addresses and sizes of a layer for (state, real, table, geom) and the limits.

    limits : sink, recent, slack, max_tokens
    """
    state, real, table, geom = tensors
    page = table.data_ptr()
    sink, recent, slack, max_tokens = limits
    return _cuda.Layer(
        page=page,
        twin=page + table.stride(0) * 8,
        table_stride=table.stride(1),
        state=state.data_ptr(),
        real=real.data_ptr(),
        real_stride=real.stride(0),
        geom=geom.data_ptr(),
        dtype="bfloat16" if dtype == torch.bfloat16 else "float16",
        n_rows=table.shape[1],
        n_heads=n_heads,
        head_dim=head_dim,
        sink=sink,
        recent=recent,
        slack=slack,
        max_tokens=max_tokens,
    )


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stride(x: torch.Tensor | None, n_axes: int) -> tuple[int, ...]:
    return (0,) * n_axes if x is None else x.stride()[:n_axes]


def _head_count(geom: torch.Tensor, head_dim: int) -> int:
    return geom.numel() // (16 + head_dim)  # 4 numbers and D places of each head


def _rows(name: str, x: torch.Tensor | None, n_axes: int = 2) -> tuple[int | None, tuple[int, ...]]:
    """Address and strides of rows, which n_axes count, and which are copied 16 bytes at a time."""
    if x is None:
        return None, (0,) * n_axes
    address, strides = x.data_ptr(), x.stride()[:n_axes]
    bits = address
    for n in strides:
        bits |= 2 * n
    if bits % 16:
        used = [n for n, size in zip(strides, x.shape, strict=False) if size > 1]
        if address % 16 or any(n % 8 for n in used):
            raise ValueError(
                f"{name}: expected rows that begin at multiples of 16 bytes, got strides "
                f"{x.stride()} from address {address % 16} modulo 16"
            )
    return address, strides


def launch_attend(
    layer: _cuda.Layer,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    valid: torch.Tensor | None,
    sinks: torch.Tensor | None,
    work: torch.Tensor,
    scale: float,
    softcap: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with arguments that were checked; returns out, and lse or None."""
    q_at, q_stride = _rows("q", q)
    k_at, k_stride = _rows("k", k)
    v_at, v_stride = _rows("v", v)
    device = q.device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return launch_attend(layer, q, k, v, valid, sinks, work, scale, softcap, return_lse)
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device) if return_lse else None
    info = _device_info(device.index)
    _cuda.attend(
        layer,
        q=q_at,
        q_stride=q_stride,
        k=k_at,
        k_stride=k_stride,
        v=v_at,
        v_stride=v_stride,
        o=out.data_ptr(),
        lse=_pointer(lse),
        valid=_pointer(valid),
        sinks=_pointer(sinks),
        n_q_heads=q.shape[1],
        scale=scale,
        softcap=softcap,
        work=work.data_ptr(),
        n_blocks=info["n_blocks"],
        smem_bytes=info["smem_bytes"],
        stream=current_stream(device.index),
    )
    return out, lse


def launch_span(
    cache,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    return_lse: bool,
    columns_before: int,
    most: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store columns, at most `most` at a time, and attend with them: arguments were checked."""
    q_at, q_stride = _rows("q", q, 3)
    n_rows, n_q_heads, n_columns, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    position = torch.empty(n_rows * n_columns, dtype=torch.int32, device=q.device)
    info = _device_info(q.device.index)
    piece, n_bytes, twin_bytes = most, 0, cache._item_bytes[1]
    if most is None:
        piece, n_bytes = _cuda.span_piece(
            cache._layer,
            n_q_heads=n_q_heads,
            n_columns=n_columns,
            twin_bytes=twin_bytes,
            smem_bytes=info["smem_bytes"],
        )
    # Zeros, since twins go back whole, with slots that no token has. It may be gone before the
    # kernels ran: what gets its memory next comes after them.
    scratch = torch.zeros(n_bytes, dtype=torch.uint8, device=q.device) if n_bytes else None
    with torch.cuda.device(q.device):
        _cuda.span(
            cache._layer,
            q=q_at,
            q_stride=q_stride,
            k=k.data_ptr(),
            k_stride=_stride(k, 3),
            v=v.data_ptr(),
            v_stride=_stride(v, 3),
            o=out.data_ptr(),
            lse=_pointer(lse),
            valid=_pointer(valid),
            sinks=_pointer(sinks),
            position=position.data_ptr(),
            scratch=_pointer(scratch),
            twin_bytes=twin_bytes,
            n_q_heads=n_q_heads,
            n_columns=n_columns,
            piece=piece,
            columns_before=columns_before,
            scale=scale,
            softcap=softcap,
            work=cache._work.data_ptr(),
            n_blocks=info["n_blocks"],
            smem_bytes=info["smem_bytes"],
            stream=current_stream(q.device.index),
        )
    return out, lse


def _columns(state):
    return state[_cuda.STATE_COLUMNS].long()


def _step_columns(mask, memory, state, misfit):
    cache = find_cache(memory)
    stride = 0
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0]
        mask = mask if mask.stride(1) == 1 else mask.contiguous()
        stride = mask.stride(0) if len(mask) > 1 else 0  # of one mask for all rows
    valid = torch.empty(cache.n_rows, 1, dtype=torch.bool, device=state.device)
    with torch.cuda.device(state.device):
        _cuda.step_columns(
            cache.layer_at(state),
            _pointer(mask),
            stride,
            valid.data_ptr(),
            misfit.data_ptr(),
            current_stream(state.device.index),
        )
    return valid


def _append(k, v, valid, slab, state, real, table, geom, columns_before, limits):
    n_rows, n_heads, n_columns, head_dim = k.shape
    position = torch.empty(n_rows, n_columns, dtype=torch.int32, device=k.device)
    layer = make_layer((state, real, table, geom), limits, n_heads, head_dim, k.dtype)
    with torch.cuda.device(k.device):
        _cuda.append(
            layer,
            k=k.data_ptr(),
            k_stride=_stride(k, 3),
            v=v.data_ptr(),
            v_stride=_stride(v, 3),
            valid=_pointer(valid),
            position=position.data_ptr(),
            n_columns=n_columns,
            columns_before=columns_before,
            stream=current_stream(k.device.index),
        )


def _crop(slab, state, real, table, geom, n_columns, limits):
    # Which channels are kept makes no difference to a crop, nor does their number or type.
    layer = make_layer((state, real, table, geom), limits, 1, 64, torch.bfloat16)
    with torch.cuda.device(state.device):
        _cuda.crop(layer, n_columns, current_stream(state.device.index))


def _gather(slab, state, real, table, geom, row, n_tokens, head_dim, dtype, limits):
    n_heads = _head_count(geom, head_dim)
    shape = n_heads, n_tokens, head_dim
    k, v = (torch.empty(shape, dtype=dtype, device=slab.device) for _ in "kv")
    layer = make_layer((state, real, table, geom), limits, n_heads, head_dim, dtype)
    with torch.cuda.device(slab.device):
        stream = current_stream(slab.device.index)
        _cuda.gather(layer, row, n_tokens, k.data_ptr(), v.data_ptr(), stream)
    return k, v


def _copy_pages(
    slab, state, table, from_slab, from_state, from_table, geom, pairs, n_bytes, limits
):
    # Pages are copied whole, whatever the heads and the dtype; `real` is not read.
    to, source = (
        make_layer((x, x.view(1, -1), t, geom), limits, 1, 64, torch.bfloat16)
        for x, t in ((state, table), (from_state, from_table))
    )
    with torch.cuda.device(slab.device):
        stream = current_stream(slab.device.index)
        _cuda.copy_pages(to, source, pairs.data_ptr(), len(pairs), *n_bytes, stream)


for _name, _function in (
    ("append", _append),
    ("crop", _crop),
    ("gather", _gather),
    ("copy_pages", _copy_pages),
    ("step_columns", _step_columns),
):
    _LIBRARY.impl(_name, _function, "CUDA")


_LIBRARY.impl("columns", _columns, "CompositeExplicitAutograd")


@torch.library.register_fake("leank::columns", lib=_LIBRARY)
def _columns_fake(state):
    return state.new_empty((), dtype=torch.int64)


@torch.library.register_fake("leank::step_columns", lib=_LIBRARY)
def _step_columns_fake(mask, memory, state, misfit):
    n_rows = (state.numel() - _cuda.STATE_HEADER) // 3
    return state.new_empty((n_rows, 1), dtype=torch.bool)


@torch.library.register_fake("leank::append", lib=_LIBRARY)
def _append_fake(k, v, valid, slab, state, real, table, geom, columns_before, limits):
    return None


@torch.library.register_fake("leank::gather", lib=_LIBRARY)
def _gather_fake(slab, state, real, table, geom, row, n_tokens, head_dim, dtype, limits):
    shape = _head_count(geom, head_dim), n_tokens, head_dim
    return slab.new_empty(shape, dtype=dtype), slab.new_empty(shape, dtype=dtype)


@torch.library.register_fake("leank::copy_pages", lib=_LIBRARY)
def _copy_pages_fake(
    slab, state, table, from_slab, from_state, from_table, geom, pairs, n_bytes, limits
):
    return None


@torch.library.register_fake("leank::crop", lib=_LIBRARY)
def _crop_fake(slab, state, real, table, geom, n_columns, limits):
    return None
