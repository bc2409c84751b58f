"""The operators of ``leank.cuda`` for CPU tensors: what the kernels do, in short loops over memory.

Inside `emulated()` the host code of leank.cuda and of patched models takes the CPU for a GPU. Pages
lie where the tables say, so that an operator that works on a copy of the slab gives wrong results.
The order of elements inside a page is not that of the kernels.
"""

import contextlib
import ctypes
import importlib
import math
import sys
import types

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from leank import _C

P = _C.PAGE_TOKENS
N_HEADER, OPEN = 8, 2**31 - 1
COLUMNS, OVERFLOW = 0, 1
_FAKED = (
    "leank._cuda",
    "leank._cuda_built",
    "leank._cuda_ops",
    "leank._cuda_step",
    "leank.cuda",
    "leank.cuda_layer",
)


def _module():
    """Stand in for the extension; numbers are those of kernels/leank_cuda.h."""
    module = types.ModuleType("leank._cuda")
    module.HEAD_DIMS, module.LEARN_HEAD_DIMS = (64, 80, 96, 128, 256), (64, 80, 96, 128)
    module.MAX_R, module.MAX_UNITS, module.MOST_PIECE = 16, 262144, 64
    module.STATE_COLUMNS, module.STATE_OVERFLOW = COLUMNS, OVERFLOW
    module.STATE_HEADER, module.STATE_OPEN = N_HEADER, OPEN
    module.geometry, module.Layer = _geometry, None
    return module


def _geometry(keep, n_heads, head_dim):
    """As lk_cuda_geom: n_kept and offsets of kept K, dropped K, V of each head, then channels."""
    keep = np.frombuffer(keep, bool).reshape(n_heads, head_dim)
    numbers, page, twin = np.zeros((4, n_heads), np.int32), 0, 0
    for g, n_kept in enumerate(keep.sum(1)):
        numbers[:3, g] = n_kept, page, twin
        page += 2 * P * n_kept
        twin += 2 * P * (head_dim - n_kept)
        if n_kept:
            numbers[3, g] = page
            page += 2 * P * head_dim
        else:
            numbers[3, g] = twin
            twin += 2 * P * head_dim
    order = np.concatenate([np.r_[np.flatnonzero(x), np.flatnonzero(~x)] for x in keep])
    return numbers.tobytes() + order.astype(np.uint8).tobytes(), int(page), int(twin)


class Layer:
    """One layer's memory."""

    def __init__(self, state, real, table, geom, limits, head_dim, dtype):
        self.n_rows, self.D, self.dtype = table.shape[1], head_dim, dtype
        self.sink, self.recent, self.slack, self.max_tokens = limits
        self.state, self.real, self.table = state.numpy(), real.numpy(), table.numpy()
        self.len, self.lo, self.n0 = self.state[N_HEADER:].reshape(3, -1)
        geom = geom.numpy().tobytes()
        self.n_heads = len(geom) // (16 + head_dim)
        numbers = np.frombuffer(geom, np.int32, 4 * self.n_heads).reshape(4, -1)
        self.n_kept, self.kept_at, self.dropped_at, self.v_at = numbers.tolist()
        self.order = np.frombuffer(geom, np.uint8, offset=numbers.nbytes).reshape(-1, head_dim)

    def block(self, address, width):
        """[P, width] at an address."""
        n = P * width
        memory = (ctypes.c_char * (2 * n)).from_address(address)
        return torch.frombuffer(memory, dtype=self.dtype, count=n).view(P, width)

    def blocks(self, b, g, i):
        """Kept K, dropped K and V of head g in page i of row b."""
        page, twin = (int(x) for x in self.table[:, b, i])
        n_kept = self.n_kept[g]
        kept = self.block(page + self.kept_at[g], n_kept) if n_kept else None
        has_twin = n_kept < self.D
        dropped = self.block(twin + self.dropped_at[g], self.D - n_kept) if has_twin else None
        return kept, dropped, self.block((page if n_kept else twin) + self.v_at[g], self.D)

    def settle(self, b, length):
        """Let row b have so many tokens."""
        self.len[b] = length
        if length:
            self.n0[b] = length if self.n0[b] == OPEN else self.n0[b]
            old = max(0, length - self.recent - self.slack) // P * P
            self.lo[b] = max(self.lo[b], self.sink, old)

    def twin_stays(self, b, i):
        return i * P < self.sink or (i + 1) * P > self.lo[b]

    def store(self, b, j, k, v):
        """Write token j of row b: k and v [Hkv, D]."""
        i, slot = divmod(j, P)
        for g in range(self.n_heads):
            kept, dropped, values = self.blocks(b, g, i)
            channels = torch.from_numpy(self.order[g].astype(np.int64))
            stays, n_kept = self.twin_stays(b, i), self.n_kept[g]
            if n_kept:
                kept[slot] = k[g, channels[:n_kept]]
            if dropped is not None and stays:
                dropped[slot] = k[g, channels[n_kept:]]
            if n_kept or stays:
                values[slot] = v[g]

    def read(self, b, g, n_tokens):
        """Return k and v [n_tokens, D] of head g in float64; NaN where nothing is stored."""
        k, v = (torch.full((n_tokens, self.D), math.nan, dtype=torch.float64) for _ in "kv")
        channels = torch.from_numpy(self.order[g].astype(np.int64))
        n_kept = self.n_kept[g]
        for i in range(-(-n_tokens // P)):
            rows = slice(i * P, min((i + 1) * P, n_tokens))
            n = rows.stop - rows.start
            kept, dropped, values = self.blocks(b, g, i)
            j = torch.arange(rows.start, rows.stop)
            whole = (j < self.sink) | (j >= int(self.lo[b]))
            if n_kept:
                k[rows, channels[:n_kept]] = kept[:n].double()
                v[rows] = values[:n].double()
            if dropped is not None and whole.any():
                k[j[whole][:, None], channels[n_kept:]] = dropped[:n][whole].double()
                if not n_kept:
                    v[j[whole]] = values[:n][whole].double()
        return k, v


def _make_layer(tensors, limits, n_heads, head_dim, dtype):
    return Layer(*tensors, limits, head_dim, dtype)


def _launch_attend(layer, q, k, v, valid, sinks, work, scale, softcap, return_lse):
    """As decode.cuh and combine.cu."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[1], 1), -math.inf)
    column = int(layer.state[COLUMNS])
    if k is not None and column >= layer.max_tokens:
        layer.state[OVERFLOW] = 1
        return out, lse if return_lse else None
    for b in range(layer.n_rows):
        is_token = valid is None or bool(valid[b, 0])
        if k is not None:
            layer.real[b, column] = is_token
        if not is_token:
            continue
        p = int(layer.len[b]) - (k is None)
        if k is not None:
            layer.store(b, p, k[b, :, 0], v[b, :, 0])
        _attend_row(layer, b, p, q[b, :, 0], sinks, scale, softcap, out[b, :, 0], lse[b, :, 0])
        if k is not None:
            layer.settle(b, p + 1)
    if k is not None:
        layer.state[COLUMNS] = column + 1
    return out, lse if return_lse else None


def _attend_row(layer, b, p, q, sinks, scale, softcap, out, lse):
    """Attend with the query [Hq, D] at position p."""
    j = torch.arange(p + 1)
    whole = j >= max(layer.sink, int(layer.lo[b]))
    window = (j < layer.sink) | whole & ((p - j < layer.recent) | (p < int(layer.n0[b])))
    R = len(q) // layer.n_heads
    for h in range(len(q)):
        g = h // R
        k, v = layer.read(b, g, p + 1)
        kept = torch.from_numpy(layer.order[g][: layer.n_kept[g]].astype(np.int64))
        x = q[h].double()
        logits = torch.where(window, k @ x, k[:, kept] @ x[kept]) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        seen = window if not layer.n_kept[g] else torch.ones_like(window)
        logits, v = logits[seen], v[seen]
        sink = logits.new_full((1,), -math.inf) if sinks is None else sinks[h : h + 1].double()
        total = torch.logsumexp(torch.cat([logits, sink]), 0)
        out[h] = (torch.exp(logits - total) @ v).to(out.dtype)
        lse[h] = total


def _launch_span(cache, q, k, v, valid, sinks, scale, softcap, return_lse, columns_before, most):
    """As span.cu without scratch: a piece is stored before it attends."""
    piece = most or min(cache.slack + 1, 64)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf)
    layer = cache._layer
    for first in range(0, q.shape[2], piece):
        new = slice(first, min(first + piece, q.shape[2]))
        position = layer.len.copy()
        tokens = None if valid is None else valid[:, new]
        before = columns_before + first
        _append(k[:, :, new], v[:, :, new], tokens, *cache._buffers, before, cache._limits)
        for b in range(layer.n_rows):
            for t in range(new.start, new.stop):
                if valid is not None and not valid[b, t]:
                    continue
                p = int(position[b])
                _attend_row(
                    layer, b, p, q[b, :, t], sinks, scale, softcap, out[b, :, t], lse[b, :, t]
                )
                position[b] += 1
    return out, lse if return_lse else None


def _append(k, v, valid, slab, state, real, table, geom, columns_before, limits):
    """As append.cu: dropped channels that would retire at once are not stored."""
    layer = Layer(state, real, table, geom, limits, k.shape[3], k.dtype)
    n_columns = k.shape[2]
    for b in range(layer.n_rows):
        tokens = range(n_columns) if valid is None else valid[b].nonzero()[:, 0].tolist()
        first = int(layer.len[b])
        layer.real[b, columns_before : columns_before + n_columns] = 0
        layer.settle(b, first + len(tokens))
        for j, t in enumerate(tokens):
            layer.real[b, columns_before + t] = 1
            layer.store(b, first + j, k[b, :, t], v[b, :, t])
    layer.state[COLUMNS] = columns_before + n_columns


def _crop(slab, state, real, table, geom, n_columns, limits):
    lengths, lo, n0 = state[N_HEADER:].view(3, -1)
    lengths.copy_(real[:, :n_columns].sum(1))
    lo.copy_(lo.minimum(lengths).clamp(min=limits[0]))
    n0[lengths == 0] = OPEN
    state[COLUMNS], state[OVERFLOW] = n_columns, 0


def _gather(slab, state, real, table, geom, row, n_tokens, head_dim, dtype, limits):
    layer = Layer(state, real, table, geom, limits, head_dim, dtype)
    rows = [layer.read(row, g, n_tokens) for g in range(layer.n_heads)]
    return tuple(torch.stack(x).to(dtype) for x in zip(*rows, strict=True))


def _copy_pages(
    slab, state, table, from_slab, from_state, from_table, geom, pairs, n_bytes, limits
):
    for to, source in pairs.tolist():
        n_pages = -(-int(from_state[N_HEADER + source]) // P)
        for kind, n in enumerate(n_bytes):
            for i in range(n_pages if n else 0):
                ctypes.memmove(int(table[kind, to, i]), int(from_table[kind, source, i]), n)


def _step_columns(mask, memory, state, misfit):
    real = sys.modules["leank._cuda_ops"].find_cache(memory)._real
    n_rows, room = real.shape
    now, column = int(state[COLUMNS]), torch.arange(room)
    if mask is None:
        seen = column <= now
    else:
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0]
    seen = seen.expand(n_rows, room)
    stored = (real != 0) & (column < now)
    if ((seen != stored) & (column != now)).any():
        misfit.clamp_(max=now)
    return seen[:, [min(now, room - 1)]].clone()


class _Event:
    """What it would wait for is done."""

    def __init__(self, device, blocking):
        assert device.type == "cpu", device

    def record(self):
        pass

    synchronize = record


_OPERATORS = {
    "append": _append,
    "crop": _crop,
    "gather": _gather,
    "copy_pages": _copy_pages,
    "step_columns": _step_columns,
}


@contextlib.contextmanager
def emulated(monkeypatch):
    """Let leank.cuda and patched models take the CPU for a GPU; leank was built without CUDA."""
    import leank
    from leank import _patch, models

    leank._cuda = sys.modules["leank._cuda"] = _module()
    library = torch.library.Library("leank", "IMPL")
    try:
        cuda = importlib.import_module("leank.cuda")
        layer = importlib.import_module("leank.cuda_layer").LeanKCudaLayer
        step = sys.modules["leank._cuda_step"]
        for name, function in ({"attend": step._attend} | _OPERATORS).items():
            library.impl(name, _quietly(function), "CPU")
        with monkeypatch.context() as patches:
            patches.setattr(cuda, "_checked_device", torch.device)
            patches.setattr(cuda, "make_layer", _make_layer)
            patches.setattr(step, "launch_attend", _quietly(_launch_attend))
            patches.setattr(step, "launch_span", _quietly(_launch_span))
            patches.setattr(cuda, "workspace", lambda index: torch.zeros(8, dtype=torch.uint8))
            patches.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            patches.setattr(torch, "Event", _Event)
            patches.setattr(layer, "device_type", "cpu")
            for module in (models, _patch):
                patches.setattr(module, "gpus_of", lambda model: [0])
            yield
    finally:
        library._destroy()
        for name in ("leank._cuda_step", "leank._cuda_ops"):
            sys.modules[name]._LIBRARY._destroy()
        for name in _FAKED:
            del sys.modules[name]
            delattr(leank, name.partition(".")[2])


# ------------------------------------------------------------------------------ reads by the host

_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__index__", "__array__")
_allowed = [True]


def _quietly(function):
    """Let an operator read, and allocate unseen: it runs on the device."""

    def run(*args):
        before, _allowed[0] = _allowed[0], True
        try:
            with _disable_current_modes():
                return function(*args)
        finally:
            _allowed[0] = before

    return run


@contextlib.contextmanager
def no_reads(monkeypatch):
    """Raise where the host reads the values of a tensor, for which it would wait for a GPU."""

    def guarded(name):
        read = getattr(torch.Tensor, name)

        def run(self, *args, **kwargs):
            if not _allowed[0]:
                raise AssertionError(f"the host reads a tensor: {name}")
            return read(self, *args, **kwargs)

        return run

    with monkeypatch.context() as patches:
        for name in _READS:
            patches.setattr(torch.Tensor, name, guarded(name))
        _allowed[0] = False
        try:
            yield
        finally:
            _allowed[0] = True
