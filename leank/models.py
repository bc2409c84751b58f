"""Which models can be patched, and what their attention layers look like.

No class is listed: what decides is the kind of cache layer that transformers gives each layer, and
a forward of two tokens that shows what reaches the attention function (`leank._probe`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from . import _C, _probe
from ._probe import layers_text
from ._versions import old_transformers

if problem := old_transformers():
    raise ImportError(problem, name="transformers")

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BASES = ("sdpa", "eager")
PREFIX = "leank_"
# Kinds of cache layers, by exact type. One with full attention beside a state is pruned as well.
PRUNED = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
_LEFT = (DynamicSlidingWindowLayer, LinearAttentionLayer)
if hasattr(cache_utils, "DummyLayer"):  # since 5.23
    _LEFT += (cache_utils.DummyLayer,)
_TERMS = ("softcap", "sinks")  # each is an argument of `_C.decode`
# Config entries by which logits are more than the product of hidden states and weights.
_LOGITS = ("logit_scale", "logits_scaling", "final_logit_softcapping")


@dataclass(frozen=True)
class Layout:
    """What ``patch`` needs to know about a model.

    Attributes
    ----------
    n_layers, n_kv_heads, head_dim : int
        Of the whole model.
    base : str
        The implementation by which a patched model attends where nothing is packed.
    configs : tuple
        The configs that name an implementation.
    name : str
        The implementation that they name; a patched model uses `base` instead of flash and flex.
    outside : tuple of int
        Layers without full attention (a sliding window, chunks, a state as of Mamba, no cache at
        all), whose cache is the framework's.
    terms : tuple of str
        What changes the logits in the other layers: "softcap", "sinks".
    interface : bool
        Whether the model attends through transformers' attention interface; else it calls
        ``scaled_dot_product_attention`` itself.
    group : int
        Query heads per KV head, the most in any of these layers.
    dtype : torch.dtype
        Of K.
    rank, n_ranks : int
        This process's place among those that tensor parallelism cuts the KV heads between; 0 of 1
        where every process has all heads.
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    base: str
    configs: tuple
    name: str = field(default="sdpa", kw_only=True)
    outside: tuple[int, ...] = field(default=(), kw_only=True)
    terms: tuple[str, ...] = field(default=(), kw_only=True)
    interface: bool = field(default=True, kw_only=True)
    group: int = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    rank: int = field(default=0, kw_only=True)
    n_ranks: int = field(default=1, kw_only=True)

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        """Shape of a mask that fits: layers, KV heads, head dim."""
        return self.n_layers, self.n_kv_heads, self.head_dim

    @property
    def own_heads(self) -> slice:
        """The KV heads that this process has."""
        n_own = self.n_kv_heads // self.n_ranks
        return slice(self.rank * n_own, (self.rank + 1) * n_own)


def inspect_model(model: nn.Module, beneath: str | None = None) -> Layout:
    """
    Check that a model can be patched where it computes, and return its layout.

    Parameters and the rest of the exceptions are those of `inspect_structure`.

    Raises
    ------
    ValueError
        As `inspect_structure`, or as `gpus_of`; or the kernels on GPUs do not take its K.
    ModuleNotFoundError
        The model is on a GPU, and LeanK was built without CUDA.
    """
    _check_class(model)
    gpus = gpus_of(model)
    layout = inspect_structure(model, beneath)
    if gpus:
        _check_kernels(model, layout)
    return layout


def gpus_of(model: nn.Module) -> list[int]:
    """
    Return the numbers of the NVIDIA GPUs that a model computes on; none if it does on the CPU.

    Raises
    ------
    ValueError
        It computes on both, or elsewhere.
    """
    devices = {_probe.device_of(module) for module in model.modules() if _has_weights(module)}
    kinds = {device.type for device in devices}
    if kinds <= {"cpu"}:
        return []
    if kinds == {"cuda"}:
        return sorted({device.index or 0 for device in devices})
    raise ValueError(
        "model: expected all weights on the CPU, or all on NVIDIA GPUs, "
        f"got {sorted(map(str, devices))}"
    )


def _check_kernels(model: nn.Module, layout: Layout) -> None:
    from ._cuda_built import _cuda

    layers = enumerate(_layers(model))
    states = [i for i, layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    if states:
        raise ValueError(
            "model: expected layers without a state (as of Mamba) on a GPU, where caches have a "
            f"fixed length so far, got {type(model).__name__} with one in {layers_text(states)}"
        )
    dtype, head_dim, group = layout.dtype, layout.head_dim, layout.group
    for name, fits, got in (
        ("K in bfloat16 or float16", dtype in (torch.bfloat16, torch.float16), dtype),
        (f"a head dim of {_cuda.HEAD_DIMS}", head_dim in _cuda.HEAD_DIMS, head_dim),
        (f"at most {_cuda.MAX_R} query heads per KV head", group <= _cuda.MAX_R, group),
    ):
        if not fits:
            raise ValueError(
                f"model: expected {name} on a GPU, which is what its kernels take so far, got {got}"
            )


def _has_weights(module: nn.Module) -> bool:
    # generate() asks each time, and module.parameters() takes milliseconds for a whole model.
    return any(x is not None for x in module._parameters.values())


def inspect_learnable(model: nn.Module) -> Layout:
    """
    Check that a mask can be learned for a model, and return its layout.

    Parameters and the rest of the exceptions are those of `inspect_structure`.

    Raises
    ------
    ValueError
        As `inspect_structure`; or the model is one that can be patched, but not yet learned for.
    """
    layout = inspect_structure(model)
    reasons = {
        f"no full attention in {layers_text(layout.outside)}": bool(layout.outside),
        "a state beside its attention": any(
            isinstance(layer, LinearAttentionAndFullAttentionLayer) for layer in _layers(model)
        ),
        **{f"{term} in its attention": term in layout.terms for term in _TERMS},
        "attention outside of transformers' attention interface": not layout.interface,
        "its layers elsewhere than in model.model": not hasattr(model, "model"),
        "logits that it scales or caps": any(
            getattr(text_config(model), name, None) not in (None, 1.0) for name in _LOGITS
        ),
        "weights cut by tensor parallelism": tensor_ranks(model)[1] > 1,
    }
    got = [reason for reason, holds in reasons.items() if holds]
    if got:
        raise ValueError(
            "model: learning a mask expects full attention without further terms in every layer, "
            f"got {type(model).__name__} with {got[0]}"
        )
    return layout


def inspect_structure(model: nn.Module, beneath: str | None = None) -> Layout:
    """
    Check that LeanK can stand in for a model's cache, wherever its weights are.

    Runs its layers once, over two tokens.

    Parameters
    ----------
    model : nn.Module
        Any object; everything but a causal language model of transformers is refused. Its weights
        may be on the device "meta".
    beneath : str, optional
        The implementation that stands for ours, if its config is that of a patched model too.

    Returns
    -------
    Layout
        Sizes, the attention implementation in use, and the configs that name it.

    Raises
    ------
    TypeError
        It is no causal language model of transformers.
    ValueError
        Its attention is of a kind that cannot be pruned, of another dtype, or the model is set up
        in a way that does not work; the message says why.
    """
    _check_class(model)
    _check_kind(model)
    outside = _outside(model)
    name, base = _implementation(model, beneath)
    ranks = tensor_ranks(model)
    seen = _probe.run(model, name, set(range(_n_layers(model))) - set(outside))
    n_own_heads, head_dim, dtype = _sizes(seen)
    rank, n_ranks = _head_ranks(model, n_own_heads, *ranks)
    # The outer config of a composite model hands its name on to parts that are none of ours.
    text = text_config(model)
    outer = (model.config, model.base_model.config)
    configs = (*(c for c in outer if c is text or not c.sub_configs), text, *seen.configs)
    return Layout(
        _n_layers(model),
        n_own_heads * n_ranks,
        head_dim,
        base,
        tuple({id(config): config for config in configs}.values()),
        name=name,
        outside=outside,
        terms=tuple(term for term in _TERMS if term in seen.terms),
        interface=seen.interface,
        group=max(seen.groups),
        dtype=dtype,
        rank=rank,
        n_ranks=n_ranks,
    )


def text_config(model: nn.Module):
    """Return the config of the decoder."""
    return model.config.get_text_config(decoder=True)


def _n_layers(model: nn.Module) -> int:
    return text_config(model).num_hidden_layers


def _check_class(model: object) -> None:
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        is_peft = hasattr(model, "get_base_model")
        remedy = "; patch model.get_base_model(), which it runs" if is_peft else ""
        raise TypeError(
            "model: expected a causal language model of transformers, "
            f"got {type(model).__name__}{remedy}"
        )


def _check_kind(model: nn.Module) -> None:
    """Refuse what the configs and modules say about attention that cannot be pruned."""
    name, config = type(model).__name__, text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected a causal decoder, got {name}, an encoder and a decoder with "
            "cross-attention (is_encoder_decoder)"
        )
    if getattr(config, "add_cross_attention", False) or getattr(
        config, "cross_attention_layers", None
    ):
        raise ValueError(f"model: expected a causal decoder, got {name} with cross-attention")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"model: expected a causal decoder, got {name} with is_causal False")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model: expected an uncompiled model, got one after model.compile()")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"model: expected K and V of heads in the cache, got {name} with multi-head latent "
            "attention (MLA), which stores a latent vector and has no K channels to drop"
        )
    is_alibi = getattr(config, "alibi", False) or getattr(
        getattr(config, "attn_config", None), "alibi", False
    )
    if is_alibi or any("alibi" in attribute for attribute in dir(type(model.base_model))):
        raise ValueError(
            f"model: expected attention without a bias on its logits, got {name} with alibi"
        )


def _layers(model: nn.Module) -> list:
    """Return the cache layers that transformers gives a model."""
    return DynamicCache(config=model.config).layers


def _outside(model: nn.Module) -> tuple[int, ...]:
    """Return the layers whose cache stays the framework's; refuse those that nobody knows."""
    name, layers, config = type(model).__name__, _layers(model), text_config(model)
    modes = getattr(config, "kv_sharing_modes", None) or ()  # since 5.23
    if "reuse" in modes or getattr(config, "num_kv_shared_layers", None):
        raise ValueError(
            f"model: expected each layer to attend to K and V of its own, got {name}, whose layers "
            "share them"
        )
    for i, layer in enumerate(layers):
        if type(layer) not in PRUNED + _LEFT:
            raise ValueError(
                f"model: expected layers whose cache grows by K and V, slides or is a state, got "
                f"{name} with a {type(layer).__name__} in {layers_text([i])}"
            )
    outside = tuple(i for i, layer in enumerate(layers) if type(layer) in _LEFT)
    if len(outside) == len(layers):
        raise ValueError(
            f"model: expected a layer with full attention, got {name} with a sliding window, "
            "chunks or a state in every layer: their caches do not grow, and nothing is left to "
            "prune"
        )
    return outside


def tensor_ranks(model: nn.Module) -> tuple[int, int]:
    """Return this process's place among those of tensor parallelism, and their number."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return 0, 1
    names = mesh.mesh_dim_names or ("tp",)  # older versions of transformers name nothing
    sizes = dict(zip(names, mesh.shape, strict=True))
    others = [f"{name}={size}" for name, size in sizes.items() if name != "tp" and size > 1]
    if others:
        raise ValueError(
            "model: expected tensor parallelism or none, since processes would have other layers "
            f"(pp) or other batches (fsdp), got {', '.join(others)}"
        )
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return mesh.get_local_rank(), mesh.size()


def _head_ranks(model: nn.Module, n_own_heads: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """Return `rank` of `n_ranks` if KV heads are cut between them, 0 of 1 if each has them all."""
    if n_ranks == 1:
        return 0, 1
    config = text_config(model)
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if n_own_heads == n_heads:
        return 0, 1
    if n_own_heads * n_ranks == n_heads:
        return rank, n_ranks
    raise ValueError(
        f"model: expected all {n_heads} KV heads in each process, or an equal share in each of "
        f"{n_ranks}, got {n_own_heads}"
    )


def _implementation(model: nn.Module, beneath: str | None) -> tuple[str, str]:
    """Return the implementation that the configs name, and the one to use while patched."""
    configs = (model.config, model.base_model.config, text_config(model))
    names = {str(config._attn_implementation) for config in configs}
    if beneath is not None:
        names = {beneath if name.startswith(PREFIX) else name for name in names}
    names = sorted(names)
    if any(name.startswith(PREFIX) for name in names):
        raise ValueError(
            "model: its config is that of a model that is patched already, or a copy of it; "
            "unpatch that model, or call model.set_attn_implementation('sdpa') for a copy"
        )
    name = names[0]
    if len(names) == 1 and name in BASES:
        return name, name
    if len(names) == 1 and name.startswith(("flash_attention_", "flex_attention")):
        return name, "sdpa" if model._supports_sdpa else "eager"
    raise ValueError(
        f"model: expected attn_implementation {', '.join(BASES)}, flash_attention_* or "
        f"flex_attention, got {', '.join(names)}; call model.set_attn_implementation('sdpa') first"
    )


def _sizes(seen: _probe.Seen) -> tuple[int, int, torch.dtype]:
    """Return KV heads, head dim and dtype, which must be those of all layers."""
    shapes = {(n_heads, head_dim, v_dim) for n_heads, head_dim, v_dim, _ in seen.shapes.values()}
    if len(shapes) > 1:
        got = ", ".join(
            f"layer {i}: {heads} x {dim}" for i, (heads, dim, *_) in sorted(seen.shapes.items())
        )
        raise ValueError(
            f"model: expected the same KV heads x head dim in all layers with full attention, "
            f"got {got}"
        )
    ((n_kv_heads, head_dim, v_dim),) = shapes
    dtypes = {dtype for *_, dtype in seen.shapes.values()}
    wrong = sorted(str(dtype) for dtype in dtypes if dtype not in DTYPES)
    if wrong or len(dtypes) > 1:
        raise ValueError(
            f"model: expected K in one of {', '.join(DTYPES.values())}, the same in all layers, "
            f"got {', '.join(sorted(map(str, dtypes)))}"
        )
    if v_dim != head_dim:
        raise ValueError(f"model: expected V as wide as K, {head_dim}, got {v_dim}")
    if head_dim % _C.CHANNEL_STEP or head_dim > _C.MAX_HEAD_DIM:
        raise ValueError(
            f"model: expected a head_dim that is a multiple of {_C.CHANNEL_STEP} up to "
            f"{_C.MAX_HEAD_DIM}, got {head_dim}"
        )
    return n_kv_heads, head_dim, *dtypes
