"""``leank.memory_report``: what a cache of a patched or a dense model holds, in bytes, by layer."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticSlidingWindowLayer,
)

from .cache import LeanKCache
from .cache_layer import LeanKLayer
from .models import DTYPES
from .static_layer import LeanKStaticLayer

_SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}
_WINDOWS = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)
_SUMS = ("k_bytes", "v_bytes", "allocated_bytes", "dense_bytes", "n_pages", "n_twins")


@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """
    What one layer holds.

    Attributes
    ----------
    kind : str
        "pruned"; "dense", of a ``DynamicCache``; or what is in no total: "window", "state", "none".
    k_bytes, v_bytes : int
        In use for K and for V.
    allocated_bytes : int
        Taken from the allocator for them.
    dense_bytes : int
        That K and V of the same tokens take in the same dtype without pruning; in a cache of fixed
        length, of all tokens that fit, as its pages are in use from the first one on.
    state_bytes : int
        Of a state, as of Mamba; it is not pruned and in no total.
    n_pages, n_twins : int
        In use: of the kept channels, and of the dropped ones in the window.
    """

    kind: str
    k_bytes: int = 0
    v_bytes: int = 0
    allocated_bytes: int = 0
    dense_bytes: int = 0
    state_bytes: int = 0
    n_pages: int = 0
    n_twins: int = 0

    @property
    def total_bytes(self) -> int:
        """K and V in use."""
        return self.k_bytes + self.v_bytes

    @property
    def saved(self) -> float:
        """Share of the dense bytes that is not in use; negative where the window costs more."""
        return 1 - self.total_bytes / self.dense_bytes if self.dense_bytes else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, for programs."""
        figures = dataclasses.asdict(self)
        return figures | {"total_bytes": self.total_bytes, "saved": self.saved}


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryReport:
    """
    What a cache holds; its text and its HTML are tables.

    Attributes
    ----------
    cache : str
        The cache's class.
    dtype : str or None
        Of K and V; None while the cache is empty.
    lengths : tuple of int
        Tokens of each row; in a ``DynamicCache``, which stores padding too, columns.
    window : dict or None
        sink, recent and slack of a ``LeanKCache``.
    layers : tuple of LayerMemory
    """

    cache: str
    dtype: str | None
    lengths: tuple[int, ...]
    window: dict[str, int] | None
    layers: tuple[LayerMemory, ...]

    @property
    def total(self) -> LayerMemory:
        """Sum of the pruned, or of the dense layers."""
        counted = [layer for layer in self.layers if layer.kind in ("pruned", "dense")]
        sums = {name: sum(getattr(layer, name) for layer in counted) for name in _SUMS}
        return LayerMemory("total", **sums)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as numbers, strings, lists and dicts."""
        return {
            "cache": self.cache,
            "dtype": self.dtype,
            "lengths": list(self.lengths),
            "window": self.window,
            "total": self.total.as_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def __repr__(self) -> str:
        """Return the heading and the table as text."""
        rows = [_HEADER, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = [self._heading()]
        for row in rows:
            cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
            lines.append("  ".join([cells[0], row[1].ljust(widths[1]), *cells[2:]]))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in _HEADER)
        rows = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in self._rows())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return (
            f"<p>{html.escape(self._heading())}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def _heading(self) -> str:
        n_rows, n_tokens = len(self.lengths), sum(self.lengths)
        what = f"{n_tokens:,} tokens in {n_rows} row{'s' * (n_rows != 1)}" if n_rows else "empty"
        parts = [f"{self.cache}: {what}"]
        if self.dtype is not None:
            parts.append(self.dtype)
        if self.window is not None:
            parts.append("window {sink:,} + {recent:,}, slack {slack:,}".format(**self.window))
        return ", ".join(parts)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for i, layer in enumerate(self.layers):
            yield _row(str(i), layer)
        yield _row("all", self.total)


_HEADER = ("layer", "", "K", "V", "K and V", "allocated", "dense", "saved", "pages", "twins")


def _row(name: str, layer: LayerMemory) -> tuple[str, ...]:
    kind = f"{layer.kind}, state {layer.state_bytes:,}" if layer.state_bytes else layer.kind
    numbers = (layer.k_bytes, layer.v_bytes, layer.total_bytes, layer.allocated_bytes)
    return (
        name,
        kind.removeprefix("state, "),
        *(f"{number:,}" for number in (*numbers, layer.dense_bytes)),
        f"{layer.saved:.1%}",
        f"{layer.n_pages:,}",
        f"{layer.n_twins:,}",
    )


def memory_report(cache: Cache) -> MemoryReport:
    """
    Tell what a cache holds, layer by layer, beside what a dense one would.

    Parameters
    ----------
    cache : LeanKCache or DynamicCache
        As ``generate`` returns it in ``past_key_values``. Rows that share pages count them once.

    Returns
    -------
    MemoryReport
        ``print`` it; in a notebook it is a table; ``as_dict()`` is for programs.

    Raises
    ------
    TypeError
        It is another cache.

    Examples
    --------
    >>> out = model.generate(**inputs, return_dict_in_generate=True)    # doctest: +SKIP
    >>> leank.memory_report(out.past_key_values).total.saved            # doctest: +SKIP
    0.412
    """
    if not isinstance(cache, (LeanKCache, DynamicCache)):
        raise TypeError(
            f"cache: expected a LeanKCache or a DynamicCache, got {type(cache).__name__}"
        )
    dtype, lengths, window = _facts(cache)
    layers = tuple(_layer(layer) for layer in cache.layers)
    return MemoryReport(type(cache).__name__, dtype, lengths, window, layers)


def _facts(cache: Cache) -> tuple[str | None, tuple[int, ...], dict[str, int] | None]:
    if isinstance(cache, LeanKCache):
        first = cache.packed[0]
        if first.store is None:
            return None, (), dict(first.window)
        lengths = tuple(int(n) for n in first.store.lengths)
        return first.stored_dtype, lengths, dict(first.window)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys is not None:
            n_rows, dtype = layer.keys.shape[0], str(layer.keys.dtype).removeprefix("torch.")
            return dtype, (layer.get_seq_length(),) * n_rows, None
    return None, (), None


def _layer(layer: object) -> LayerMemory:
    state_bytes = 0
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
        state_bytes = sum(state.nbytes for state in states if state is not None)
    if isinstance(layer, LeanKLayer):
        return _pruned(layer, state_bytes)
    if not isinstance(layer, (DynamicLayer, *_WINDOWS)):
        return LayerMemory("state" if state_bytes else "none", state_bytes=state_bytes)
    kind = "window" if isinstance(layer, _WINDOWS) else "dense"
    if layer.keys is None:
        return LayerMemory(kind, state_bytes=state_bytes)
    k_bytes, v_bytes = layer.keys.nbytes, layer.values.nbytes
    return LayerMemory(
        kind,
        k_bytes,
        v_bytes,
        _allocated(layer.keys, layer.values),
        k_bytes + v_bytes,
        state_bytes,
    )


def _pruned(layer: LeanKLayer, state_bytes: int) -> LayerMemory:
    store = layer.store
    if store is None:
        return LayerMemory("pruned", state_bytes=state_bytes)
    used, n_tokens = store.memory(), int(store.lengths.sum())
    if isinstance(layer, LeanKStaticLayer):
        n_tokens = store.n_rows * layer.max_cache_len
    channels = store.n_heads * (store.head_dim + store.v_dim)
    return LayerMemory(
        "pruned",
        used["k_bytes"],
        used["v_bytes"],
        used["slab_bytes"],
        n_tokens * channels * _SIZES[layer.stored_dtype],
        state_bytes,
        used["n_pages"],
        used["n_twins"],
    )


def _allocated(*tensors: torch.Tensor) -> int:
    """Bytes of the storages behind tensors, which may be views of more."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
