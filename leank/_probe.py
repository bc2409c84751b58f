"""A forward of two tokens that shows what reaches a model's attention function.

The model gets a cache whose layers return handles in place of K and V, as a `LeanKCache` does. What
touches them between the cache and the attention function cannot be pruned, and is named.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

_NAME = "leank_probe"
_KNOWN = {"softcap": "softcap", "s_aux": "sinks"}  # argument of the interface: name in a Layout
_UNKNOWN = ("position_bias", "sliding_window")
_here = threading.local()  # has `runs` in a thread while it sends tokens through a model


@dataclass
class Seen:
    """What a probe has seen.

    Attributes
    ----------
    shapes : dict
        Layer: KV heads, K's dim, V's dim, dtype.
    configs : list
        Of the attention modules.
    terms : set of str
        "softcap", "sinks".
    groups : set of int
        Query heads per KV head.
    interface : bool
        Whether the attention interface is looked at, or torch's function.
    reached : bool
        Whether the interface was called.
    """

    interface: bool
    reached: bool = False
    shapes: dict[int, tuple[int, int, int, torch.dtype]] = field(default_factory=dict)
    configs: list = field(default_factory=list)
    terms: set[str] = field(default_factory=set)
    groups: set[int] = field(default_factory=set)

    def record(self, tokens: _Tokens, query: torch.Tensor, value: object) -> torch.Tensor:
        """Note a layer's sizes; returns zeros [B, T, Hq, Dv] in place of its output."""
        k, v = tokens.k, tokens.v
        n_heads, n_kv_heads = query.shape[1], k.shape[1]
        if value is not tokens or n_heads % n_kv_heads or query.shape[-1] != k.shape[-1]:
            other = "another V" if value is not tokens else f"q {tuple(query.shape)}"
            raise _Touched(
                f"giving K {tuple(k.shape)} and {other} to the attention of layer {tokens.index}"
            )
        self.groups.add(n_heads // n_kv_heads)
        self.shapes[tokens.index] = (n_kv_heads, k.shape[-1], v.shape[-1], k.dtype)
        return query.new_zeros(query.shape[0], query.shape[2], n_heads, v.shape[-1])


class _Touched(Exception):
    """The model does something with K or V that an attention function would not know of."""


class _Tokens:
    """K and V of two tokens on their way through a layer."""

    def __init__(self, seen: Seen, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.seen, self.index, self.k, self.v = seen, index, k, v

    @property
    def shape(self) -> torch.Size:
        """Shape of K, for models that do not use the interface."""
        if self.seen.interface:
            raise _Touched(self._what("shape"))
        return self.k.shape

    def __getattr__(self, name: str):
        """Fail: something computes with K."""
        raise _Touched(self._what(name))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Take over the one function that models call themselves and that we can stand in for."""
        tokens = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls))
        if func is not F.scaled_dot_product_attention or tokens.seen.interface:
            raise _Touched(tokens._what(getattr(func, "__name__", str(func))))
        query, _, value = args[:3]
        return tokens.seen.record(tokens, query, value).transpose(1, 2)

    def __getitem__(self, index: object):
        """Fail: something computes with K."""
        raise _Touched(self._what("indexing"))

    def _what(self, name: str) -> str:
        return f"computing with K ({name}) between cache and attention in layer {self.index}"


class _Cache(DynamicCache):
    """A cache that hands out `_Tokens` for the layers that are to be pruned, and stores nothing."""

    def __init__(self, config, seen: Seen, pruned: set[int]) -> None:
        super().__init__(config=config)
        self.seen, self.pruned = seen, pruned

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx not in self.pruned:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        tokens = _Tokens(self.seen, layer_idx, key_states, value_states)
        return tokens, tokens


def run(model: nn.Module, name: str, pruned: set[int]) -> Seen:
    """
    Send two tokens through a model's layers.

    Parameters
    ----------
    model : PreTrainedModel
    name : str
        The attention implementation that it uses.
    pruned : set of int
        Layers whose K and V must arrive.

    Returns
    -------
    Seen
        In whose `shapes` all of `pruned` are.

    Raises
    ------
    ValueError
        They do not arrive, or arrive changed; or the forward fails by itself.
    """
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    seen = Seen(interface=True)
    try:
        return _run(model, _NAME, seen, pruned)
    except _Touched as error:
        touched = error
    refusal = ValueError(
        "model: expected attention through transformers' attention interface or torch's "
        f"scaled_dot_product_attention, got {type(model).__name__} {touched}"
    )
    if seen.reached:
        raise refusal from touched
    # A model that is not on the interface may still call torch's function where it is set to.
    try:
        seen = _run(model, "sdpa", Seen(interface=False), pruned)
    except (_Touched, ValueError):
        raise refusal from touched
    if name != "sdpa":
        raise ValueError(
            f"model: expected attn_implementation sdpa from {type(model).__name__}, which does not "
            f"use transformers' attention interface, got {name}; "
            "call model.set_attn_implementation('sdpa') first"
        )
    return seen


def _run(model: nn.Module, name: str, seen: Seen, pruned: set[int]) -> Seen:
    cache = _Cache(model.config, seen, pruned)
    device = device_of(model.get_input_embeddings())
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), attending(model, name), evaluating(model):
            model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    except _Touched:
        raise
    except Exception as error:  # whatever the model raises says why it does not run
        raise ValueError(
            f"model: expected one that reads two tokens with a cache, got "
            f"{type(error).__name__}: {error}"
        ) from error
    missing = sorted(pruned - set(seen.shapes))
    if missing:
        raise ValueError(
            f"model: expected K and V of each layer in its attention function, got none of "
            f"{layers_text(missing)} in {type(model).__name__}"
        )
    return seen


def _attention(module, query, key, value, attention_mask, *args, **kwargs):
    """Record what arrives, as transformers' attention interface calls it."""
    if not getattr(_here, "runs", False):
        raise RuntimeError(
            "attention: another thread is patching a model that shares this one's config object; "
            "models of several threads need a config each (copy.deepcopy)"
        )
    if not isinstance(key, _Tokens):
        return torch.zeros_like(query).transpose(1, 2), None
    seen = key.seen
    seen.reached = True
    for argument in _UNKNOWN:
        if kwargs.get(argument) is not None:
            raise _Touched(f"giving {argument} to the attention of layer {key.index}")
    if not getattr(module, "is_causal", True):
        raise _Touched(f"attending without causality in layer {key.index}")
    seen.terms |= {name for key, name in _KNOWN.items() if kwargs.get(key) is not None}
    seen.configs.append(module.config)
    return seen.record(key, query, value), None


def layers_text(layers: Iterable[int]) -> str:
    """Name layers in a message: "layers 0-2, 4"."""
    layers, runs = list(layers), []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    names = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer{'s' * (len(layers) > 1)} {names}"


def device_of(module: nn.Module) -> torch.device:
    """Return where a module with weights computes; accelerate's hooks may keep them elsewhere."""
    first = module.__dict__.get("_hf_hook")
    for hook in getattr(first, "hooks", [first]):  # of several, a SequentialHook
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    own = (x for x in module._parameters.values() if x is not None)
    weight = next(own, None)
    return (next(module.parameters()) if weight is None else weight).device


@contextlib.contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """Let a model attend by another implementation."""
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
        and hasattr(config, "_attn_implementation")
    }.values()
    before = [config._attn_implementation for config in configs]
    try:
        _here.runs = True
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        _here.runs = False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradient checkpointing, which drops every cache."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
