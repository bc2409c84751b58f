"""Which models can be patched, and what their attention layers look like.

Layers are found by structure and checked against the weights; the class names only say what was
tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import _C

# Model class: the class of its attention layers. Both must match, subclasses of the model count.
TESTED = {"LlamaForCausalLM": "LlamaAttention", "Qwen2ForCausalLM": "Qwen2Attention"}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BASES = ("sdpa", "eager")
PREFIX = "leank_"


@dataclass(frozen=True)
class Layout:
    """What ``patch`` needs to know about a model."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    base: str
    configs: tuple

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        """Shape of a mask that fits: layers, KV heads, head dim."""
        return self.n_layers, self.n_kv_heads, self.head_dim


def inspect_model(model: nn.Module) -> Layout:
    """
    Check that a model can be patched, also where it is, and return its layout.

    Parameters and the rest of the exceptions are those of `inspect_structure`.

    Raises
    ------
    ValueError
        As `inspect_structure`; or a weight is not on the CPU.
    """
    layout = inspect_structure(model)
    devices = sorted({str(p.device) for p in model.parameters() if p.device.type != "cpu"})
    if devices:
        raise ValueError(
            f"model: expected all weights on the CPU (this version decodes there), got {devices}"
        )
    return layout


def inspect_structure(model: nn.Module) -> Layout:
    """
    Check that a model's attention is one that LeanK knows, wherever its weights are.

    Parameters
    ----------
    model : nn.Module
        Any object; everything but a tested causal language model is refused. Its weights are not
        read, so they may be on the device "meta".

    Returns
    -------
    Layout
        Sizes, the attention implementation in use, and the configs that name it.

    Raises
    ------
    TypeError
        The class, or the class of an attention layer, is not a tested one.
    ValueError
        The model is of a tested class, but of another dtype, compiled, with sliding windows, or
        otherwise set up in a way that was not tested.
    """
    attention = _tested_attention(model)
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        raise ValueError(
            "model: expected a causal decoder, got one with is_encoder_decoder or not is_causal"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model: expected an uncompiled model, got one after model.compile()")
    layers = _layers(model, attention, config)
    base = _base(layers, config)
    head_dim, n_kv_heads = _sizes(layers[0], config)
    if head_dim % _C.CHANNEL_STEP or head_dim > _C.MAX_HEAD_DIM:
        raise ValueError(
            f"model: expected a head_dim that is a multiple of {_C.CHANNEL_STEP} up to "
            f"{_C.MAX_HEAD_DIM}, got {head_dim}"
        )
    for layer in layers:
        _check_layer(layer, head_dim, n_kv_heads, layers[0].k_proj.weight.dtype)
    configs = tuple({id(c): c for c in (config, *(layer.config for layer in layers))}.values())
    return Layout(len(layers), n_kv_heads, head_dim, base, configs)


def _tested_attention(model: nn.Module) -> str:
    for cls in type(model).__mro__:
        if cls.__name__ in TESTED and cls.__module__.startswith("transformers."):
            return TESTED[cls.__name__]
    raise TypeError(f"model: expected one of {', '.join(TESTED)}, got {type(model).__name__}")


def _layers(model: nn.Module, attention: str, config) -> list[nn.Module]:
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    for m in layers:
        if type(m).__name__ != attention:
            raise TypeError(
                f"model: expected attention layers of class {attention}, got {type(m).__name__}"
            )
    found = [m.layer_idx for m in layers]
    if found != list(range(config.num_hidden_layers)) or not found:
        raise ValueError(
            f"model: expected attention layers 0 to {config.num_hidden_layers - 1}, got {found}"
        )
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    for m, kind in zip(layers, types, strict=True):
        if kind != "full_attention" or getattr(m, "sliding_window", None) is not None:
            raise ValueError(
                f"model: expected full attention in every layer, got {kind} in layer {m.layer_idx} "
                "(sliding-window layers are not supported yet)"
            )
    return layers


def _base(layers: list[nn.Module], config) -> str:
    names = sorted(
        {str(m.config._attn_implementation) for m in layers} | {str(config._attn_implementation)}
    )
    if any(name.startswith(PREFIX) for name in names):
        raise ValueError(
            "model: its config object is shared with a model that is patched already; "
            "unpatch the other one, or give this model a config of its own (copy.deepcopy) and "
            "call model.set_attn_implementation('sdpa')"
        )
    if len(names) != 1 or names[0] not in BASES:
        raise ValueError(
            f"model: expected attn_implementation {' or '.join(BASES)}, got {', '.join(names)}; "
            "call model.set_attn_implementation('sdpa') first"
        )
    return names[0]


def _sizes(layer: nn.Module, config) -> tuple[int, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if layer.head_dim != head_dim:
        raise ValueError(f"model: expected head_dim {head_dim} in layer 0, got {layer.head_dim}")
    return head_dim, config.num_key_value_heads


def _check_layer(layer: nn.Module, head_dim: int, n_kv_heads: int, dtype: torch.dtype) -> None:
    """Require weights of the sizes that the config claims, in a dtype that a cache can hold."""
    n_q_heads = n_kv_heads * layer.num_key_value_groups
    expected = {"q_proj": n_q_heads, "k_proj": n_kv_heads, "v_proj": n_kv_heads}
    for name, n_heads in expected.items():
        weight = getattr(layer, name).weight
        if weight.shape[0] != n_heads * head_dim:
            raise ValueError(
                f"model: layer {layer.layer_idx} {name}: expected {n_heads * head_dim} rows "
                f"for {n_heads} heads, got {weight.shape[0]}"
            )
        if weight.dtype not in DTYPES or weight.dtype != dtype:
            raise ValueError(
                f"model: layer {layer.layer_idx} {name}: expected one of "
                f"{', '.join(DTYPES.values())}, the same in all layers, got {weight.dtype}"
            )
