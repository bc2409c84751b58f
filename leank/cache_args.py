"""What a cache is made from: whether its numbers, its mask and its model's layers fit together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .masks import ChannelMask
from .models import Layout


def refuse_states(layers: Sequence) -> None:
    """Raise if a layer of a cache of fixed length would keep a state."""
    for i, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                "max_cache_len: expected None for a model whose layers keep a state (as of Mamba), "
                f"which compiled steps do not know of, got a number, and a state in layer {i}"
            )


def idle_layers(config: PretrainedConfig | None) -> set[int]:
    """Return the layers that no forward reaches: experts or an MLP alone, as in Nemotron-H."""
    if config is None:
        return set()
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return {i for i, name in enumerate(types) if name in ("moe", "mlp")}


def fitted_to(mask: ChannelMask, layout: Layout) -> ChannelMask:
    """Return the mask for a model of this layout, or raise."""
    if mask.keep.shape != layout.mask_shape:
        raise ValueError(
            f"mask: expected {layout.mask_shape} [layers, kv_heads, head_dim], "
            f"got {mask.keep.shape}"
        )
    return fitted(mask, layout.n_layers, layout.outside)


def fitted(mask: ChannelMask, n_layers: int, outside: Sequence[int]) -> ChannelMask:
    """Return the mask for a model without full attention in the layers `outside`, or raise."""
    if len(mask.keep) != n_layers:
        raise ValueError(f"mask: expected {n_layers} layers, got {len(mask.keep)}")
    wrong = [i for i in outside if not mask.keep[i].all()]
    if wrong:
        raise ValueError(
            f"mask: expected every channel in layer {wrong[0]}, whose sliding window, chunks or "
            f"state stay with transformers' own cache, got {mask.keep[wrong[0]].mean():.1%} of them"
        )
    if mask.outside and mask.outside != tuple(outside):
        raise ValueError(
            f"mask: expected layers {list(outside)} outside, where the model has no full "
            f"attention, got {list(mask.outside)}"
        )
    return dataclasses.replace(mask, outside=tuple(outside)) if outside else mask


def resolve_window(
    mask: ChannelMask, sink: int | None, recent: int | None, slack: int
) -> dict[str, int]:
    """Return the window: what is given, else what the mask was learned with."""
    window = {}
    for name, value, known, least in (
        ("sink", sink, mask.sink, 0),
        ("recent", recent, mask.recent, 1),
        ("slack", slack, None, 0),
    ):
        value = known if value is None else value
        if value is None:
            raise ValueError(
                f"{name}: expected a number because the mask does not know its window, got None"
            )
        window[name] = checked_int(name, value, least)
    return window


def checked_int(name: str, value: object, least: int) -> int:
    """Return an int of Python or NumPy as one of Python; a bool is a slip of the caller."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, got {value}")
    return int(value)
