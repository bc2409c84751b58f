"""The HuggingFace cache of a patched model: one packed layer cache per full attention layer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from . import _compiled
from .cache_args import checked_int, fitted, idle_layers, refuse_states, resolve_window
from .cache_layer import LeanKLayer, LeanKStateLayer, NewTokens, cropped, forget_state
from .masks import ChannelMask
from .models import PRUNED
from .static_layer import LeanKStaticLayer

if TYPE_CHECKING:
    from ._patch import Patch

HANDLE = "_leank_patch"  # the attribute of a patched model that holds its handle
_MEMORY = ("k_bytes", "v_bytes", "total_bytes", "slab_bytes", "n_pages", "n_twins")


class LeanKCache(Cache):
    """
    Cache for a patched model: K and V in pages, dropped K channels only inside the window.

    ``generate`` on a patched model makes one by itself; ``leank.make_cache(model)`` makes one for
    plain forwards. Lengths are in columns, as everywhere in transformers: padding counts there, but
    is not stored. It lies where the model computes, is not offloaded from there, and cannot be
    pickled; ``copy.deepcopy`` shares pages on the CPU, and copies them on a GPU.

    With ``max_cache_len`` all pages are reserved at the first token, and compiled models can use
    it; their graphs read lengths when they run, so that no length needs a graph of its own.

    Parameters
    ----------
    mask : ChannelMask
        Which K channels are kept.
    sink, recent : int, optional
        The window, S0 first and W last tokens; default: the mask's own.
    slack : int
        Tokens beyond W whose dropped channels stay, so that a crop of that many changes nothing.
    config : transformers config, optional
        Of the model; layers to which it gives a sliding window, chunks or a state get transformers'
        own cache, keep every channel and are in no figure of `memory`. None: there are no such
        layers.
    max_cache_len : int, optional
        Columns that fit. None: it grows. Not for models whose layers keep a state.
    device : {"cpu", "cuda"}
        What the model computes on. "cuda": NVIDIA GPUs; each layer's pages are reserved on the GPU
        that its K comes from, and `max_cache_len` must be given. What has come of an announced
        prompt is kept dense beside them until it is complete, and is in no figure of `memory`.

    Attributes
    ----------
    packed : list of LeanKLayer
        The layers that are pruned.

    Raises
    ------
    TypeError
        ``mask`` is no ChannelMask, or a number is not an int.
    ValueError
        The mask knows no window and none is given, or does not fit the config, or a number is out
        of range.

    Examples
    --------
    >>> cache = leank.make_cache(model)                                 # doctest: +SKIP
    >>> out = model(ids, past_key_values=cache)                         # doctest: +SKIP
    >>> cache.get_seq_length(), cache.memory()["total_bytes"]           # doctest: +SKIP
    """

    def __init__(
        self,
        mask: ChannelMask,
        *,
        sink: int | None = None,
        recent: int | None = None,
        slack: int = 64,
        config: PretrainedConfig | None = None,
        max_cache_len: int | None = None,
        device: str = "cpu",
    ) -> None:
        if not isinstance(mask, ChannelMask):
            raise TypeError(f"mask: expected a ChannelMask, got {type(mask).__name__}")
        window = resolve_window(mask, sink, recent, slack)
        layer_type, full = LeanKLayer, DynamicLayer
        if device not in ("cpu", "cuda"):
            raise ValueError(f'device: expected "cpu" or "cuda", got {device!r}')
        if max_cache_len is not None:
            max_cache_len = checked_int("max_cache_len", max_cache_len, 1)
            layer_type, full = LeanKStaticLayer, StaticLayer
            if device == "cuda":
                from .cuda_layer import LeanKCudaLayer as layer_type  # where leank._cuda was built
            layer_type = partial(layer_type, max_cache_len=max_cache_len)
        elif device == "cuda":
            raise ValueError(
                "max_cache_len: expected the number of columns to reserve, since a cache on a GPU "
                "does not grow, as in leank.make_cache(model, max_cache_len=...), got None"
            )
        layers = [None] * len(mask.keep)
        if config is not None:
            layers = DynamicCache(config=config).layers
            outside = [i for i, layer in enumerate(layers) if type(layer) not in PRUNED]
            if max_cache_len is not None:
                refuse_states(layers)
                layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
            fitted(mask, len(layers), outside)
        elif mask.outside:
            raise ValueError(
                f"config: expected the model's because layers {list(mask.outside)} of the mask are "
                "outside, got None"
            )
        for i, keep in enumerate(mask.keep):
            if layers[i] is None or type(layers[i]) is full:
                layers[i] = layer_type(keep, **window)
            elif type(layers[i]) in PRUNED:
                layers[i] = LeanKStateLayer(keep, layers[i].number_of_states, **window)
        super().__init__(layers=layers)
        indices = [i for i, layer in enumerate(layers) if isinstance(layer, LeanKLayer)]
        self.packed: list[LeanKLayer] = [layers[i] for i in indices]  # those that are pruned
        self.first_packed, self.last_packed = indices[0], indices[-1]
        self.max_cache_len = max_cache_len
        # What compiled forwards on the CPU know of it.
        is_known = max_cache_len is not None and device == "cpu"
        self.state = _compiled.new_state(self) if is_known else None
        # The mask of a step on a GPU, and how many of its columns are set.
        self._step_mask: torch.Tensor | None = None
        self._step_mask_columns = 0
        self.columns = None  # what leank.attention read from this forward's mask
        self._reached: set[tuple[int, str]] = set()  # layers, and what of them, by this forward
        self._due = 0  # columns after this forward
        self._moved = False  # whether a compiled forward is between a window and what is pruned
        self._idle = idle_layers(config)
        self.sdpa: Callable | None = None  # for a model that does not use the attention interface
        self.of_patch: weakref.ref | None = None  # whose mask and window these are

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args,
        **kwargs,
    ) -> tuple[NewTokens, NewTokens]:
        """Hand new K and V to the attention function; returns the same handle twice."""
        self._reach(layer_idx, "attention", key_states.shape[-2])
        layer = self.layers[layer_idx]
        if not isinstance(layer, LeanKLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        tokens = self.new_tokens(key_states, value_states, layer_idx)
        return tokens, tokens

    def new_tokens(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> NewTokens:
        """Return the handle of new K and V of a pruned layer."""
        if not torch.compiler.is_compiling():  # else the operator does so, when the graph runs
            layer = self.layers[layer_idx]
            if layer_idx == self.first_packed:
                self._due = layer.n_columns + k.shape[-2]
            k, v = layer.update(k, v)
        return NewTokens(self, layer_idx, k, v)

    # Each forward reads a state before it moves it on, by one token in place.
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a state of a layer for a forward to move on, as transformers does."""
        self._reach(layer_idx, f"convolution {state_idx}")
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a state of a layer for a forward to move on, as transformers does."""
        self._reach(layer_idx, f"recurrence {state_idx}")
        return super().get_recurrent_state(layer_idx, state_idx)

    def _reach(self, layer_idx: int, part: str, n_columns: int = 0) -> None:
        """Note how far a forward has come; what it reaches again is the begin of another."""
        if torch.compiler.is_compiling():
            if self.max_cache_len is None:
                _compiled.refuse(
                    "expected a LeanKCache of fixed length, as leank.make_cache(model, "
                    "max_cache_len=) makes it, in a compiled model, got one that grows"
                )
            return
        if not self._reached or (layer_idx, part) in self._reached:
            self.begin(n_columns)
        self._reached.add((layer_idx, part))

    def _stopped(self, lengths: list[int]) -> bool:
        """Whether the last forward did not reach its end, and left something behind."""
        if len(lengths) > 1 or self._moved:
            return True
        if all(part == "attention" for _, part in self._reached):
            return False
        expected = set(range(len(self.layers))) - self._idle
        return {i for i, _ in self._reached} != expected or lengths != [self._due]

    def begin(self, n_columns: int, moved: bool = False) -> None:
        """
        Require that a forward over so many columns can start, and start it.

        `moved` says that sliding windows have moved on before this. A graph tells their length at
        its end alone, so `go_on` must follow, or the forward did not finish.
        """
        self.columns = None
        lengths = self._lengths()
        if self._stopped(lengths):
            remedy = (
                "cache.crop(0) goes back to the last one that did"
                if self._can_undo()
                else "cache.reset() and feed everything again"
            )
            got = f"layers hold {lengths} columns"
            if len(lengths) == 1:
                got = f"{'sliding windows' if self._moved else 'states'} moved on"
            raise RuntimeError(
                f"LeanKCache: {got} because an earlier forward did not finish; {remedy}"
            )
        self._moved = moved
        self.packed[0].tell_columns(self.packed, lengths[0])
        if self.max_cache_len is not None:
            self.layers[self.first_packed].check_room(n_columns)
        self._reached.clear()

    def go_on(self) -> None:
        """Note that the first pruned layer keeps step with the windows before it."""
        self._moved = False

    @property
    def n_columns(self) -> int:
        """Columns of the forwards that reached the last pruned layer."""
        return self.packed[0].counts(self.packed[-1:])[0]

    def counts(self) -> list[int]:
        """Columns that each pruned layer holds; waits for a GPU once."""
        return self.packed[0].counts(self.packed)

    def note_columns(self) -> None:
        """Let compiled forwards know how many columns there are."""
        if self.state is not None:
            self.state[1] = self.n_columns

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """
        Columns stored, padding included.

        A tensor where a graph is being compiled, and on a GPU after a compiled model ran.
        """
        if torch.compiler.is_compiling() and self.max_cache_len is not None:
            return self.packed[0].get_seq_length() if self.state is None else self.state[1]
        return super().get_seq_length(layer_idx)

    def step_mask(self, n_columns: int, mask: torch.Tensor | None) -> torch.Tensor | None:
        """
        Return the mask of a step on a GPU: bool [B, 1, 1, max_cache_len], in the same place always.

        Parameters
        ----------
        n_columns : int
            New columns of the call.
        mask : tensor [B, columns], optional
            Which columns are tokens, the new one included.

        Returns
        -------
        tensor or None
            None where this is no such step, or a layer is not pruned, which may attend otherwise.
        """
        first = self.layers[self.first_packed]
        if not first.can_step(n_columns) or len(self.packed) < len(self.layers):
            return None
        store = first.store
        if mask is None or mask.ndim != 2 or mask.shape[1] > store.max_tokens:
            return None
        shape, n_columns = (len(mask), store.max_tokens), mask.shape[1]
        there = self._step_mask
        if there is None or there.shape != shape or there.device != store.device:
            with torch.inference_mode(False):  # else it could only be changed in that mode
                self._step_mask = torch.zeros(shape, dtype=torch.bool, device=store.device)
        elif n_columns < self._step_mask_columns:
            self._step_mask[:, n_columns:].zero_()
        self._step_mask[:, :n_columns].copy_(mask)
        self._step_mask_columns = n_columns
        return self._step_mask[:, None, None]

    def check(self) -> None:
        """
        Raise if steps of a compiled model on a GPU went wrong, of which the host knows nothing yet.

        ``generate`` does so at its end. Waits for the GPU.

        Raises
        ------
        RuntimeError
            A step went past ``max_cache_len``, or CUDA left a layer half changed.
        ValueError
            A step's mask had other padding than the columns that are stored.
        """
        for layer in self.packed:
            layer.check()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self._change_rows(beam_idx.cpu())  # waits for a GPU once, not in each layer

    def reset(self) -> None:
        """Forget all tokens and the announced prompt; what is reserved stays so."""
        super().reset()
        for layer in self._with_state():
            forget_state(layer)
        self._reached.clear()
        self._moved = False
        self.note_columns()

    def expect_prompt(self, n_columns: int) -> None:
        """
        Announce that the first columns are the prompt, however many calls bring them.

        The prompt attends densely. Without this a row's prompt is its first call that has a token
        of it. ``generate`` announces its prompt by itself, and raises if another length was
        announced; ``reset`` forgets it.

        Parameters
        ----------
        n_columns : int
            Columns of the prompt, padding included.

        Raises
        ------
        TypeError
            ``n_columns`` is not an int.
        ValueError
            The cache has columns already, or ``n_columns`` is not positive.
        """
        n_columns = checked_int("n_columns", n_columns, 1)
        if self.n_columns:
            raise ValueError(f"cache: expected no column yet, got {self.n_columns}")
        for layer in self.packed:
            layer.prompt_columns = n_columns

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last columns.

        Up to ``slack`` columns, what follows is as if they had never been; after
        ``activate_past_recording`` also all columns since then, or since the last crop. Beyond that
        the window's dropped channels are not restored: a token that was left behind by the window
        stays pruned when the window comes back to it; so does the prompt, for columns of it that
        are fed again.

        After a forward that stopped half way, all layers first go back to what they share.

        Parameters
        ----------
        tokens_to_remove : int
            0 or minus the number of columns to remove, as in transformers.

        Raises
        ------
        ValueError
            The number is positive.
        RuntimeError
            A forward stopped half way, and layers that it reached have dropped what the others
            still hold; or a layer's sliding window has dropped what would come back; or a layer's
            state cannot go back. The cache stays as it is, for ``reset``.
        """
        lengths = self._lengths()
        n_columns = cropped(lengths[0], tokens_to_remove)
        if self._stopped(lengths) and not self._can_undo():
            raise RuntimeError(
                f"LeanKCache: layers hold {lengths} columns because a forward did not finish, and "
                "the layers that did have dropped channels of older tokens or moved their state "
                "or window on; cache.reset() and feed everything again"
            )
        if n_columns < lengths[0] and n_columns and not self._can_take_back():
            raise RuntimeError(
                "LeanKCache: a layer has a state (as of Mamba or linear attention) that cannot "
                "go back; work on a copy.deepcopy(cache) made before the forward, or "
                "cache.reset() and feed everything again"
            )
        if n_columns and not self._can_slide_back(n_columns):
            raise RuntimeError(
                "LeanKCache: a layer with a sliding window has dropped the tokens that would be in "
                "its window again; call cache.activate_past_recording() before the forward, if the "
                "cache has no max_cache_len, or cache.reset() and feed everything again"
            )
        # An empty cache stays announced, also if it is empty since its first call did not finish.
        announced = self.packed[0].prompt_columns if lengths[0] == 0 else None
        if n_columns == 0:
            self.reset()
        for layer in self.packed:
            layer.crop_to(n_columns)
            layer.prompt_columns = layer.prompt_columns or announced
        for layer in self._sliding():
            if layer.is_initialized and (_records(layer) or layer.get_seq_length() > n_columns):
                layer.crop(n_columns - layer.get_seq_length())
        for layer in self._with_state():
            if n_columns and layer.record_past and any(layer.is_conv_states_initialized.values()):
                LinearAttentionCacheLayerMixin.crop(layer, n_columns - lengths[0])
        self._reached.clear()
        self.note_columns()

    def stop_past_recording(self) -> None:
        """
        End what ``activate_past_recording`` began, and free what it kept.

        ``generate`` does so when it gives a cache back, and before it takes one.

        Raises
        ------
        RuntimeError
            As `crop`.
        """
        recording = [layer for layer in self.layers if _records(layer)]
        if recording:
            self.crop(0)  # sliding windows shrink by a crop alone
        for layer in recording:
            layer.record_past = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; on the CPU the copies share pages."""
        if self.n_columns:
            rows = torch.arange(self.packed[0].store.n_rows)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """
        Keep the rows that an index tensor or a boolean tensor names, in its order.

        On a GPU another number of rows needs room for the pages of both while it runs; without it
        all layers stay as they were.
        """
        if self.n_columns:
            rows = torch.arange(self.packed[0].store.n_rows)[torch.as_tensor(indices).cpu()]
            self._change_rows(rows)

    def _change_rows(self, rows: torch.Tensor) -> None:
        """Make row i of each layer the former row rows[i]; what may not fit comes first."""
        changes = []
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                changes.append(partial(layer.reorder_cache, rows))
            elif isinstance(layer, LeanKLayer):
                changes.append(layer.prepare_rows(rows))
            else:  # transformers' own, which put new tensors in the place of others
                new = copy.copy(layer)
                new.reorder_cache(rows)
                changes.append(partial(layer.__dict__.update, new.__dict__))
        for change in changes:
            change()

    def _sliding(self) -> list:
        return [layer for layer in self.layers if getattr(layer, "is_sliding", False)]

    def _with_state(self) -> list:
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def _can_take_back(self) -> bool:
        """Whether the layers with a state, if any, recorded what they need to go back."""
        return all(layer.record_past and layer.is_croppable for layer in self._with_state())

    def _can_slide_back(self, n_columns: int) -> bool:
        """Whether the layers with a sliding window can go back to so many columns."""
        return all(
            layer.get_seq_length() in (0, n_columns)
            or _records(layer)
            # Those of fixed length cannot crop.
            or (self.max_cache_len is None and layer.get_seq_length() < layer.sliding_window)
            for layer in self._sliding()
        )

    def _lengths(self) -> list[int]:
        """Return the numbers of columns that layers hold: one, unless a forward stopped."""
        lengths = set(self.counts())
        return sorted(lengths | {layer.get_seq_length() for layer in self._sliding()})

    def _can_undo(self) -> bool:
        """Whether layers that are ahead lose nothing but columns when they go back to the others.

        A call of at most `slack` columns frees no channel that is needed without it, nor does any
        call while the past is recorded; the one that completes a prompt may, since until then the
        whole prompt was kept.
        """
        lengths = self._lengths()
        if lengths[0] == 0:
            return True  # all layers begin again
        if self.max_cache_len is not None and self._sliding():
            return False  # windows of fixed length cannot go back, and a graph may have moved them
        first = self.packed[0].store
        return (
            not self._with_state()
            and (self.packed[0].record_past or lengths[-1] - lengths[0] <= first.slack)
            and self._can_slide_back(lengths[0])
            and all(
                np.array_equal(layer.store.prompt_lengths, first.prompt_lengths)
                for layer in self.packed
            )
        )

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Do nothing on the CPU, where pages are read; fail on a GPU."""
        if self.packed[0].counts_on_device:
            raise NotImplementedError("offload: expected a cache on the CPU, got one on a GPU")

    prefetch = offload

    def memory(self) -> dict[str, int]:
        """
        Sum the live buffers of the pruned layers; pages that rows share count once.

        Under tensor parallelism it is what this process has; others may have more or less.
        Of copies, each counts the pages that they share; ``slab_bytes`` is one and the same figure
        for all of them together.

        Returns
        -------
        dict
            ``k_bytes``, ``v_bytes``, ``total_bytes``, ``slab_bytes`` (taken from the allocator),
            ``n_pages``, ``n_twins``.
        """
        total = dict.fromkeys(_MEMORY, 0)
        for layer in self.packed:
            if layer.store is not None:
                for name, value in layer.store.memory().items():
                    total[name] += value
        return total

    def __iter__(self):
        """Fail: there are no dense K and V."""
        raise TypeError(
            "LeanKCache has no dense K and V to iterate over; "
            "cache.layers[i].store.gather(row) unpacks a row"
        )

    def __deepcopy__(self, memo: dict) -> LeanKCache:
        """Copy with shared pages, and with the attributes that generate() adds."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        new._step_mask = None  # made at the next step, so that it can be changed in any mode
        if self.state is not None:
            new.state = _compiled.new_state(new)
            new.note_columns()
        return new

    def __copy__(self) -> LeanKCache:
        """Copy deeply: two caches over one set of layers would both append to it."""
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: int):
        """Fail: what was dropped cannot be written."""
        raise TypeError("LeanKCache cannot be pickled; copy.deepcopy works")


def _records(layer) -> bool:
    """Whether a layer keeps what the next crop may need."""
    return getattr(layer, "record_past", False)


def patch_of(model: nn.Module) -> Patch:
    """Return the handle of a patched model."""
    handle = getattr(model, "__dict__", {}).get(HANDLE)
    if handle is None:
        raise ValueError(
            "model: expected a patched model, got one that is not; "
            "call leank.patch(model, mask) first"
        )
    return handle
