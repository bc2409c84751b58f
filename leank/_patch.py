"""``leank.patch``: make a HuggingFace model answer from a pruned cache, and put it back.

What changes while a model is patched, and all of it goes away again: the name of the attention
implementation in its config, one instance attribute for each method in ``REPLACED`` and ``ADDED``
of ``leank._generate``, and one that holds the handle. Weights, classes and modules are not touched.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import threading
import types
import weakref
from typing import Literal

import numpy as np
import transformers
from torch import nn

from . import _deferred, attention
from ._generate import ADDED, HOOKS, REPLACED
from .cache import HANDLE, LeanKCache, patch_of
from .cache_args import fitted_to, resolve_window
from .cache_layer import LeanKLayer
from .mask_source import load_mask
from .masks import ChannelMask
from .models import PREFIX, Layout, gpus_of, inspect_model

# Where generate() keeps a compiled forward: it was traced with the other attention.
_COMPILED = ("_compiled_call", "_last_compile_config")
# Models may share a config object, and threads may patch them at once: one patch, one unpatch after
# the other, each of which knows of the others in force.
_lock = threading.RLock()
_in_force: weakref.WeakSet[Patch] = weakref.WeakSet()


class Patch:
    """What ``leank.patch`` returns; as a context manager it unpatches at the end of the block."""

    def __init__(
        self,
        model: nn.Module,
        mask: ChannelMask,
        layout: Layout,
        window: dict[str, int],
        prefill: str,
    ) -> None:
        self.model, self.mask, self.layout = model, mask, layout
        self.window, self.prefill = window, prefill
        # Of the longest static cache so far: with shorter ones, generate() would compile again.
        self.max_cache_len: int | None = None
        self._compiled: dict = {}

    def __enter__(self) -> Patch:
        """Return the handle; the model is patched already."""
        if self.model.__dict__.get(HANDLE) is not self:
            raise RuntimeError("patch: this handle was unpatched; call leank.patch again")
        return self

    def __exit__(self, *exception) -> None:
        """Unpatch, unless the block did so already: then the model is not ours to change."""
        if self.model.__dict__.get(HANDLE) is self:
            self._undo()

    def __deepcopy__(self, memo: dict) -> Patch:
        """Copy along with a copy of the model."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        _in_force.add(new)
        return new

    def __reduce_ex__(self, protocol: int):
        """Fail: where it is read, nothing would have registered the attention."""
        raise TypeError(
            "a patched model cannot be pickled: call leank.unpatch(model) before pickling"
        )

    def gpus(self) -> list[int]:
        """Return the numbers of the GPUs that the model is on now; none on the CPU."""
        return gpus_of(self.model)

    def make_cache(self, max_cache_len: int | None = None) -> LeanKCache:
        """Return an empty cache with the patch's mask and window."""
        _refuse_checkpointing(self.model)
        cache = LeanKCache(
            self.mask,
            **self.window,
            config=self.model.config,
            max_cache_len=max_cache_len,
            device="cuda" if self.gpus() else "cpu",
        )
        if not self.layout.interface:
            cache.sdpa = attention.sdpa
        cache.of_patch = weakref.ref(self)
        return cache

    def _apply(self) -> None:
        attention.register()
        _deferred.register()
        state = self.model.__dict__
        self._compiled = {name: state.pop(name) for name in _COMPILED if name in state}
        for name, function in REPLACED.items():
            if hasattr(type(self.model), name):
                state[name] = types.MethodType(function, self.model)
        for name, function in ADDED.items():
            if not hasattr(type(self.model), name):
                state[name] = types.MethodType(function, self.model)
        state[HANDLE] = self
        _in_force.add(self)
        if self.layout.interface:
            for config in self.layout.configs:
                config._attn_implementation = PREFIX + self.layout.base

    def _undo(self) -> None:
        with _lock:
            _in_force.discard(self)
            for config in self.layout.configs:
                # Someone may have chosen another implementation since; that choice stays.
                ours = config._attn_implementation == PREFIX + self.layout.base
                if ours and _patch_with(config) is None:
                    config._attn_implementation = self.layout.name
            state = self.model.__dict__
            for name in (*REPLACED, *ADDED, *_COMPILED, HANDLE):
                state.pop(name, None)
            state.update(self._compiled)

    def check_cache(self, cache: LeanKCache, gpus: list[int]) -> None:
        """Require that a user's cache prunes as this patch does, on these GPUs or the CPU."""
        _refuse_checkpointing(self.model)
        of_patch = cache.of_patch() if cache.of_patch is not None else None
        if of_patch is self and (cache.packed[0].device_type == "cuda") == bool(gpus):
            return
        own = self.make_cache(cache.max_cache_len)
        if len(own) != len(cache):
            _refuse_cache("layers", len(own), len(cache))
        for i, (mine, given) in enumerate(zip(own.layers, cache.layers, strict=True)):
            if type(mine) is not type(given):
                _refuse_cache(f"layer {i}", type(mine).__name__, type(given).__name__)
            if not isinstance(mine, LeanKLayer):
                continue
            if mine.keep.shape != given.keep.shape:
                _refuse_cache("mask [KV heads, head dim]", mine.keep.shape, given.keep.shape)
            if not np.array_equal(mine.keep, given.keep):
                head = int(np.argwhere(mine.keep != given.keep)[0, 0])
                kept = (np.flatnonzero(layer.keep[head]).tolist() for layer in (mine, given))
                _refuse_cache(f"kept channels of layer {i}, head {head}", *kept)
            for name, value in mine.window.items():
                if value != given.window[name]:
                    _refuse_cache(name, value, given.window[name])
        cache.sdpa, cache.of_patch = own.sdpa, weakref.ref(self)


def _refuse_checkpointing(model: nn.Module) -> None:
    if model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        raise ValueError(
            "model: expected no gradient checkpointing in training mode, in which transformers "
            "drops every cache; call model.eval() first"
        )


def patch(
    model: nn.Module,
    mask: ChannelMask | str | os.PathLike,
    *,
    sink: int | None = None,
    recent: int | None = None,
    slack: int = 64,
    prefill: Literal["dense", "pruned"] = "dense",
    revision: str | None = None,
) -> Patch:
    """
    Make ``model.generate`` keep a pruned K cache, until ``unpatch`` or the end of a ``with`` block.

    Plain forwards prune when they are given ``leank.make_cache(model)``; without a cache, and with
    any other cache, they compute what they always did, and ``generate`` then warns. Guidance,
    quantized caches, attention weights as output, continuous batching and pickling are refused; so
    is drafting with layers of the model itself. ``torch.compile``, also by ``generate`` itself,
    needs a cache of fixed length: ``cache_implementation="static"``, or ``make_cache`` with
    ``max_cache_len``.

    On NVIDIA GPUs every cache has a fixed length. ``generate`` reserves what the longest call so
    far could need, and compiles its steps, with CUDA graphs. With ``disable_compile=True`` it does
    not, and reserves what the call itself can need; nor does it compile where layers are on several
    GPUs. Chunks of a prompt are kept dense until its last one has come. Drafts of more than
    ``slack`` tokens are refused, as is a patched model as the assistant.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model on the CPU, in float32, bfloat16 or float16, or on NVIDIA GPUs, in
        bfloat16 or float16 and with a head dim of 64, 80, 96, 128 or 256, that attends to stored K
        and V; layers with a sliding window, chunks or a state (as of Mamba, on the CPU) keep
        transformers' own cache. A model that is set to flash or flex attention uses sdpa, or else
        eager attention, until `unpatch`. The model is asked to read two tokens. Of a model that is
        cut between processes by tensor parallelism, each process prunes the KV heads that it has:
        call this in all of them.
    mask : ChannelMask, path or name
        Channels to keep, [layers, KV heads, head dim] of the whole model; or a mask file, a name
        that ``leank masks`` lists, or a Hugging Face Hub repository, as `leank.load_mask` takes
        them.
    sink, recent : int, optional
        The window: first and last tokens whose K stays whole. Default: what the mask was learned
        with; must be given if the mask does not say.
    slack : int
        Tokens beyond ``recent`` that stay whole too, so that taking back so many changes nothing.
    prefill : {"dense", "pruned"}
        "dense": the whole prompt of ``generate`` attends densely, also in chunks. "pruned": only
        its first chunk does, and the rest frees its dropped channels at once; the result depends on
        the chunks.
    revision : str, optional
        Branch, tag or commit, where ``mask`` is a repository.

    Returns
    -------
    Patch
        Context manager, to be ignored where ``unpatch`` is called instead. Patches of several
        models may end in any order. Threads may each patch and run a model of their own.

    Raises
    ------
    TypeError
        The model is no causal language model, ``mask`` is no mask, or a number is not an int.
    ValueError
        The mask cannot be read or does not fit, the window is not known, the model is patched
        already, or its attention is of a kind that cannot be pruned.
    RuntimeError
        This version of transformers has no place to hook into.
    ModuleNotFoundError
        The model is on a GPU, and LeanK was built without CUDA.

    Examples
    --------
    >>> with leank.patch(model, "smollm2-135m-instruct-70"):            # doctest: +SKIP
    ...     tokens = model.generate(**inputs, max_new_tokens=64)
    """
    if isinstance(mask, (str, os.PathLike)):
        mask = load_mask(mask, revision=revision)
    elif revision is not None:
        raise ValueError(f"revision: expected None with a ChannelMask, got {revision!r}")
    if not isinstance(mask, ChannelMask):
        raise TypeError(f"mask: expected a ChannelMask or a name, got {type(mask).__name__}")
    if prefill not in ("dense", "pruned"):
        raise ValueError(f'prefill: expected "dense" or "pruned", got {prefill!r}')
    with _lock:
        _check_free(model)
        sharer = _patch_with(getattr(model, "config", None))
        layout = inspect_model(model, None if sharer is None else sharer.layout.name)
        mask = fitted_to(mask, layout)
        mask = dataclasses.replace(mask, keep=mask.keep[:, layout.own_heads])
        window = resolve_window(mask, sink, recent, slack)
        _check_hooks(type(model))
        handle = Patch(model, mask, layout, window, prefill)
        handle._apply()
    return handle


def _patch_with(config: object) -> Patch | None:
    """Return a patch in force that has renamed the attention in this config object."""
    return next(
        (patch for patch in _in_force if any(own is config for own in patch.layout.configs)), None
    )


def unpatch(model: nn.Module) -> None:
    """
    Undo ``leank.patch``: the model has the attributes and gives the logits that it had before.

    Caches that it filled stay readable, but only a patched model can go on with them. The attention
    functions stay registered in transformers, where they do nothing until a config names them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The patched model, or a copy of it.

    Raises
    ------
    ValueError
        The model is not patched.
    """
    patch_of(model)._undo()


def make_cache(model: nn.Module, *, max_cache_len: int | None = None) -> LeanKCache:
    """
    Return an empty pruned cache for plain forwards of a patched model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The patched model.
    max_cache_len : int, optional
        Columns that fit. Pages for them are reserved at the first token, and a compiled model can
        use the cache. None: it grows, which a cache on a GPU cannot.

    Returns
    -------
    LeanKCache
        To be passed as ``past_key_values``. If a prompt comes in several calls, announce it with
        ``expect_prompt``.

    Raises
    ------
    ValueError
        The model is not patched, or ``max_cache_len`` is not positive, or None on a GPU.
    TypeError
        ``max_cache_len`` is not an int.
    """
    return patch_of(model).make_cache(max_cache_len)


def _refuse_cache(what: str, expected: object, got: object) -> None:
    raise ValueError(
        f"past_key_values: expected a LeanKCache as leank.make_cache(model) makes it: "
        f"{what}: expected {expected}, got {got}"
    )


def _check_free(model: nn.Module) -> None:
    state = getattr(model, "__dict__", {})
    if HANDLE in state:
        raise ValueError(
            "model: expected one that is not patched, got one that is; "
            "call leank.unpatch(model) first"
        )
    taken = [name for name in (*REPLACED, *ADDED) if name in state]
    if taken:
        raise ValueError(
            f"model: expected the methods of its class, got others for {', '.join(taken)}"
        )


def _check_hooks(cls: type) -> None:
    for name, expected in HOOKS.items():
        method = getattr(cls, name, None)
        got = list(inspect.signature(method).parameters)[: len(expected)] if method else None
        if got != expected:
            raise RuntimeError(
                f"transformers {transformers.__version__}: expected {cls.__name__}.{name} to begin "
                f"with {expected}, got {got}; LeanK's hf extra names the versions that work"
            )
