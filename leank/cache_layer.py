"""One layer of the HuggingFace cache: columns, rows and crops over one packed store.

``update`` stores nothing: it hands the new K and V on to the attention function of
``leank.attention``, because several new tokens must be attended to before the dropped channels of
older ones are freed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from . import _C
from ._arrays import as_array
from .models import DTYPES

if TYPE_CHECKING:
    from .cache import LeanKCache

_UNPATCHED = (
    "LeanKCache was given to a model that is not patched: call leank.patch(model, mask) first, "
    "and keep the attn_implementation that it sets"
)


class NewTokens:
    """New K and V on their way from ``update`` to the attention function, in place of tensors."""

    def __init__(self, cache: LeanKCache, index: int, k: torch.Tensor, v: torch.Tensor):
        self.cache, self.index, self.k, self.v = cache, index, k, v

    @property
    def layer(self) -> LeanKLayer:
        """The layer that they are for."""
        return self.cache.layers[self.index]

    def __getattr__(self, name: str):
        """Fail: only another attention function asks for what a tensor has."""
        raise RuntimeError(_UNPATCHED)

    @property
    def shape(self) -> torch.Size:
        """Shape of K, with all columns of the mask, for models that attend by themselves."""
        if self.cache.sdpa is None:
            raise RuntimeError(_UNPATCHED)
        n_rows, n_heads, n_columns, head_dim = self.k.shape
        return torch.Size((n_rows, n_heads, self.layer.get_mask_sizes(n_columns)[0], head_dim))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Attend for models that do it by themselves; fail if anything else computes with this."""
        tokens = next((x for x in args if isinstance(x, cls)), None)
        if func is not F.scaled_dot_product_attention or tokens is None or not tokens.cache.sdpa:
            raise RuntimeError(_UNPATCHED)
        return tokens.cache.sdpa(*args, **(kwargs or {}))


class LeanKLayer(CacheLayerMixin):
    """One layer of ``LeanKCache``; ``store`` is its ``leank.LayerCache``, None before any token."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    device_type = "cpu"  # of K and V
    dtypes = tuple(DTYPES.values())
    counts_on_device = False  # steps change lengths where the host does not see them

    def __init__(self, keep: np.ndarray, *, sink: int, recent: int, slack: int) -> None:
        self.keep = keep
        self.window = {"sink": sink, "recent": recent, "slack": slack}
        self.store: _C.LayerCache | None = None
        self.prompt_columns: int | None = None
        # Requires a gradient once tokens that do were stored, so that a later backward pass raises.
        self.anchor: torch.Tensor | None = None
        self._records_past = False
        super().__init__()  # last: that of a layer with a state sets record_past

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the store, for as many rows as K has."""
        self.store = self.make_store(
            n_rows=key_states.shape[0],
            dtype=DTYPES[key_states.dtype],
            v_dim=value_states.shape[-1],
        )
        if self.prompt_columns is not None:
            self.store.expect_prompt(self.prompt_columns)
        if self.record_past:
            self.hold_past(True)
        self.is_initialized = True

    def make_store(self, **sizes) -> _C.LayerCache:
        """Return an empty store."""
        return _C.LayerCache(self.keep, **self.window, **sizes)

    def piece_columns(self, n_columns: int) -> int:
        """Columns of a call that are attended to and stored together."""
        return n_columns

    @staticmethod
    def counts(layers: list[LeanKLayer]) -> list[int]:
        """Columns that each layer holds."""
        return [layer.n_columns for layer in layers]

    @staticmethod
    def tell_columns(layers: list[LeanKLayer], n_columns: int) -> None:
        """Let the next call of each layer go without asking a GPU how many columns there are."""

    def open(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Have a store that takes K and V next; while it is empty it is made to fit them."""
        if self.n_columns == 0:
            self.lazy_initialization(k, v)

    def can_step(self, n_columns: int) -> bool:
        """Whether a next call of so many columns is a step whose lengths the host need not know."""
        return False

    def dense_columns(self, n_columns: int) -> int:
        """How many of a next call's columns attend by the framework's attention: the first ones.

        On the CPU all or none: those of a prompt that comes in one call.
        """
        announced = self.prompt_columns is None or n_columns <= self.prompt_columns
        return n_columns if self.n_columns == 0 and announced else 0

    def prefill(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        mask: torch.Tensor | None,
        dense: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Attend with such columns by `dense(query, k, v, mask)`, and store them."""
        out = dense(query, k, v, mask)
        self.append(k.detach(), v.detach(), valid)
        return out

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Store a prompt, which attends by the framework's attention; valid: bool [B, T]."""
        self.store.append(as_array(k), as_array(v), None if valid is None else valid.numpy())

    def attend(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        terms: dict,
    ) -> torch.Tensor:
        """Put K and V, attend, settle; returns [B, T, Hq, Dv] contiguous."""
        # A build of the extension that knows no such term is not asked about it.
        terms = {name: x for name, x in terms.items() if x is not None}
        if "sinks" in terms:
            terms["sinks"] = as_array(terms["sinks"])
        n_rows, n_heads, n_columns, _ = query.shape
        out = torch.empty(n_rows, n_columns, n_heads, v.shape[-1], dtype=query.dtype)
        size = self.piece_columns(n_columns)
        for start in range(0, n_columns, size):
            piece = slice(start, start + size)
            _C.decode(
                self.store,
                *(as_array(x[:, :, piece]) for x in (query, k, v)),
                valid=None if valid is None else np.ascontiguousarray(valid[:, piece]),
                out=as_array(out[:, piece].transpose(1, 2)),
                n_threads=torch.get_num_threads(),
                **terms,
            )
        return out

    def check(self) -> None:
        """Raise if steps went wrong that the host did not see."""

    @property
    def real(self) -> np.ndarray:
        """Which columns are tokens: bool [B, columns]."""
        return self.store.real

    def has_padding(self) -> bool:
        """Whether some column is no token of some row."""
        return int(self.store.lengths.sum()) != self.store.n_rows * self.n_columns

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Check K and V and return them; storing is the attention function's part."""
        n_heads, head_dim = self.keep.shape
        n_rows, dtypes = key_states.shape[0], self.dtypes
        if self.n_columns:
            n_rows, dtypes = self.store.n_rows, (self.stored_dtype,)
        expected = (n_rows, n_heads, key_states.shape[-2], head_dim)
        for name, tensor in (("k", key_states), ("v", value_states)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
            if tensor.device.type != self.device_type:
                raise ValueError(
                    f"{name}: expected a tensor on {self.device_type}, where this cache is, got "
                    f"one on {tensor.device}"
                )
            if DTYPES.get(tensor.dtype) not in dtypes:
                raise ValueError(f"{name}: expected {' or '.join(dtypes)}, got {tensor.dtype}")
        if value_states.dtype != key_states.dtype:  # under autocast, where only K is rotated
            raise ValueError(
                f"v: expected {key_states.dtype} as K has, got {value_states.dtype}; "
                "load the model in one dtype instead of using autocast"
            )
        return key_states, value_states

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype of what is stored."""
        return DTYPES.get(self.store.dtype, self.store.dtype)

    @property
    def n_columns(self) -> int:
        """Columns stored, padding included."""
        return 0 if self.store is None else self.store.n_columns

    def get_seq_length(self) -> int | torch.Tensor:
        """Columns stored, as transformers asks for them."""
        return self.n_columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next call's mask covers."""
        return self.n_columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows without a limit."""
        return -1

    def crop_to(self, n_columns: int) -> None:
        """Keep the first ``n_columns`` columns; with none left, a new prompt is to come."""
        if n_columns == 0:
            self.reset()
        elif self.store is not None:
            self.store.crop(min(n_columns, self.store.n_columns))
            if self.record_past:
                self.hold_past(True)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns, as ``LeanKCache.crop``."""
        self.crop_to(cropped(self.n_columns, tokens_to_remove))

    @property
    def record_past(self) -> bool:
        """Whether a crop to where the last one left off loses nothing, beyond `slack` too."""
        return self._records_past

    @record_past.setter
    def record_past(self, on: bool) -> None:
        if self.store is not None and on != self._records_past:
            self.hold_past(on)
        self._records_past = on

    def hold_past(self, on: bool) -> None:
        """Keep what a crop to the columns of now needs, or nothing any more."""
        self.store.hold(on)

    def activate_past_recording(self) -> None:
        """From now on, keep what the next crop may need."""
        self.record_past = True

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; on the CPU the copies share pages."""
        if self.n_columns:
            rows = np.arange(self.store.n_rows, dtype=np.int64)
            self.store.select(np.repeat(rows, repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that an index tensor or a boolean tensor names, in its order."""
        if self.n_columns:
            rows = np.arange(self.store.n_rows, dtype=np.int64)
            self.store.select(np.ascontiguousarray(rows[torch.as_tensor(indices).cpu().numpy()]))

    def prepare_rows(self, indices: torch.Tensor) -> Callable[[], None]:
        """Return what does `batch_select_indices`, or the rest of it."""
        return partial(self.batch_select_indices, indices)

    def reset(self) -> None:
        """Forget all tokens and the announced prompt."""
        self.store = self.prompt_columns = self.anchor = None
        self.is_initialized = False

    def offload(self) -> None:
        """Do nothing: the pages lie in CPU memory, and are read there."""

    prefetch = offload

    def __deepcopy__(self, memo: dict) -> LeanKLayer:
        """Copy; on the CPU with shared pages, copied when one of the owners writes to them."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        if self.store is not None:
            new.store = self.store.copy()
        return new


class LeanKStateLayer(LeanKLayer, LinearAttentionAndFullAttentionLayer):
    """A ``LeanKLayer`` that also holds a state, as those of Falcon-H1 and Zamba; theirs is kept."""

    is_croppable = False

    def __init__(self, keep: np.ndarray, number_of_states: int, **window: int) -> None:
        LeanKLayer.__init__(self, keep, **window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Make the store for K and V, or a state, which transformers names by keyword."""
        base = LeanKLayer if args else LinearAttentionLayer
        base.lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        LeanKLayer.reorder_cache(self, beam_idx)

    def reset(self) -> None:
        """Forget all tokens, the state and the announced prompt."""
        forget_state(self)
        LeanKLayer.reset(self)

    def __deepcopy__(self, memo: dict) -> LeanKStateLayer:
        """Copy with shared pages and a state of its own, which is changed in place."""
        new = LeanKLayer.__deepcopy__(self, memo)
        for name in self.__dict__.keys() & LinearAttentionLayer().__dict__.keys():
            new.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        return new


def forget_state(layer: LinearAttentionLayer) -> None:
    """Make a layer's state new; transformers' ``reset`` would keep it at its number of rows."""
    records = layer.record_past
    LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
    layer.record_past = records


def cropped(n_columns: int, tokens_to_remove: int) -> int:
    """Return how many columns are left."""
    if tokens_to_remove > 0:
        raise ValueError(
            "tokens_to_remove: expected 0 or minus the number of columns to remove, "
            f"got {tokens_to_remove}"
        )
    return max(0, n_columns + tokens_to_remove)
