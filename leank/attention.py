"""Attention over a ``LeanKCache``, as functions that transformers finds by name.

There is one name per implementation that it builds on (``leank_sdpa``, ``leank_eager``). With any
other cache, or none, they are that implementation, bit for bit. The first call of a cache goes
there as well: a prompt attends densely and nothing is stored yet; then its K and V are packed.
Models that call torch's ``scaled_dot_product_attention`` themselves come in through `sdpa`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import _compiled
from .cache_layer import LeanKLayer, NewTokens
from .models import BASES, PREFIX

# Arguments of the interface that change the attention in a way that the packed one does not know.
_UNKNOWN = ("position_bias", "sliding_window", "cache")
_CHECK_ROWS = 256


def register() -> None:
    """
    Register attention and mask functions under our names.

    They stay registered: a name acts only where a config carries it, and a copy of a patched model
    still carries it after the original was unpatched. The mask function must have the same name, or
    models get no mask at all and padding is attended to.
    """
    for base in BASES:
        AttentionInterface.register(PREFIX + base, _FUNCTIONS[base])
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _attention(base: str, module, query, key, value, attention_mask, *args, **kwargs):
    if not isinstance(key, NewTokens):
        forward = base_forward(base, module)
        return forward(module, query, key, value, attention_mask, *args, **kwargs)
    _refuse(module, query, key, args, kwargs)
    sinks = kwargs.get("s_aux")
    terms = {
        "scale": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "sinks": None if sinks is None else sinks.detach().float(),
    }

    def dense(q, k, v, mask):
        return base_forward(base, module)(module, q, k, v, mask, **kwargs)[0]

    return _attend(query, key, attention_mask, terms, dense), None


def sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    """``scaled_dot_product_attention`` for K and V of a cache; returns [B, Hq, T, Dv]."""
    if attn_mask is None and not is_causal and query.shape[2] > 1:
        raise ValueError("is_causal: expected True with a LeanKCache, got False")
    _refuse_numbers(query, key, dropout_p)

    def dense(q, k, v, mask):
        options = {"dropout_p": dropout_p, "enable_gqa": enable_gqa, "scale": scale}
        options |= {"attn_mask": mask, "is_causal": is_causal and mask is None}
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return _attend(query, key, attn_mask, {"scale": scale}, dense).transpose(1, 2)


def _attend(
    query: torch.Tensor,
    tokens: NewTokens,
    mask: torch.Tensor | None,
    terms: dict,
    dense: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attend and store; `dense` attends for a prompt. Returns [B, T, Hq, Dv]."""
    layer = tokens.layer
    needs_gradient, is_step = _needs_gradient(query, tokens), layer.can_step(query.shape[2])
    if torch.compiler.is_compiling():
        if needs_gradient:
            _compiled.refuse(
                "expected torch.no_grad() or torch.inference_mode() around a compiled model with "
                "a LeanKCache, through which there is no gradient"
            )
        if not layer.counts_on_device:
            return _compiled.attend(query, tokens, mask, terms)
        if not is_step:
            _compiled.refuse(
                "expected one token per row after a prompt outside of the compiled model on a GPU, "
                f"got {query.shape[2] if query.shape[2] > 1 else 'the prompt'}"
            )
    if is_step and not needs_gradient:
        return layer.attend(query, tokens.k, tokens.v, layer.step_columns(tokens, mask), terms)
    out = _packed(query, tokens, mask, terms, dense)
    tokens.cache.note_columns()
    return out


@_compiled.kernel
def _packed(
    query: torch.Tensor,
    tokens: NewTokens,
    mask: torch.Tensor | None,
    terms: dict,
    dense: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    layer, k, v = tokens.layer, tokens.k, tokens.v
    n_columns = k.shape[2]
    valid = _columns(tokens, mask)
    layer.open(k, v)
    n_dense = 0 if dense is None else layer.dense_columns(n_columns)
    outs = []
    if n_dense:
        n_past = layer.n_columns
        # The mask of a cache of fixed length covers columns to come as well.
        mask = None if mask is None else mask[:, :, :n_dense, : n_past + n_dense]
        of_prompt = None if valid is None else valid[:, :n_dense]
        prefill = partial(layer.prefill, valid=of_prompt, mask=mask, dense=dense)
        piece = [x[:, :, :n_dense] for x in (query, k, v)]
        # A first call's own tokens have their gradient.
        outs.append(_without_gradient(prefill, tokens, *piece) if n_past else prefill(*piece))
    if n_dense < n_columns:
        piece = [query, k, v]
        if n_dense:
            piece = [x[:, :, n_dense:] for x in piece]
            valid = None if valid is None else valid[:, n_dense:]
        attend = partial(layer.attend, valid=valid, terms=terms)
        outs.append(_without_gradient(attend, tokens, *piece))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    if torch.is_grad_enabled() and layer.anchor is None and (k.requires_grad or v.requires_grad):
        layer.anchor = torch.zeros((), requires_grad=True)
    return out


def _without_gradient(function: Callable[..., torch.Tensor], tokens: NewTokens, *inputs):
    """Return function(*inputs); a backward pass through it raises."""
    if _needs_gradient(inputs[0], tokens):
        return _Attend.apply(*inputs, tokens.layer.anchor, function)
    return function(*inputs)


def _needs_gradient(query: torch.Tensor, tokens: NewTokens) -> bool:
    return torch.is_grad_enabled() and (
        tokens.layer.anchor is not None
        or query.requires_grad
        or tokens.k.requires_grad
        or tokens.v.requires_grad
    )


_FUNCTIONS = {base: partial(_attention, base) for base in BASES}


def base_forward(base: str, module):
    """Return the attention function that transformers knows by a name, for a module."""
    if base == "eager":
        # Not in the registry: each model file has its own.
        files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
        return next(x for x in (getattr(f, "eager_attention_forward", None) for f in files) if x)
    return ALL_ATTENTION_FUNCTIONS[base]


class _Attend(torch.autograd.Function):
    """A layer's `attend` where autograd looks on: stored tokens have no gradient."""

    @staticmethod
    def forward(ctx, query, k, v, anchor, attend):
        return attend(query, k, v)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "backward: there is no gradient through a pruned cache; train without a cache "
            "(use_cache=False), or on an unpatched model"
        )


def _refuse(module, query: torch.Tensor, tokens: NewTokens, args: tuple, kwargs: dict) -> None:
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with a LeanKCache, got a value")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError("is_causal: expected True with a LeanKCache, got False")
    # Layers share a config, which transformers makes slow to read.
    config = module.config if tokens.index == tokens.cache.first_packed else None
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions: expected False with a LeanKCache, which never forms the weights"
        )
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache: expected True with a LeanKCache, got False")
    if args:
        raise TypeError(
            f"attention: expected keyword arguments after the mask, got {len(args)} positional ones"
        )
    _refuse_numbers(query, tokens, kwargs.get("dropout"))


def _refuse_numbers(query: torch.Tensor, tokens: NewTokens, dropout: float | None) -> None:
    if dropout:
        raise ValueError(f"dropout: expected 0 with a LeanKCache, got {dropout}; call model.eval()")
    if query.dtype != tokens.k.dtype:
        raise ValueError(f"q: expected {tokens.k.dtype} as K has, got {query.dtype}")


# --------------------------------------------------------------------- which columns are tokens


def _columns(tokens: NewTokens, mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    Return ``valid``, bool [B, T], of this call, None if all are tokens.

    All layers of a forward get the same mask, so it is read once and kept on the cache.
    """
    cache, layer, k = tokens.cache, tokens.layer, tokens.k
    if layer.can_step(k.shape[2]):
        return layer.step_columns(tokens, mask)
    key = (layer.n_columns, k.shape[0], k.shape[2])
    if cache.columns is not None:
        seen, seen_key, valid = cache.columns
        if seen_key == key and (mask is None if seen is None else seen() is mask):
            return valid
    valid = _read_mask(layer, mask, *key)
    cache.columns = (None if mask is None else weakref.ref(mask), key, valid)
    return valid


def _read_mask(
    layer: LeanKLayer, mask: torch.Tensor | None, n_past: int, n_rows: int, n_new: int
) -> torch.Tensor | None:
    if mask is None:
        if n_past and layer.has_padding():
            raise ValueError(
                f"attention_mask: expected {(n_rows, n_past + n_new)} because the cache has "
                "padding in its columns, got None or all ones"
            )
        return None
    n_all = n_past + n_new
    shape = (n_rows, 1, n_new, layer.get_mask_sizes(n_new)[0])
    fits = isinstance(mask, torch.Tensor) and tuple(mask.shape) in (shape, (1, *shape[1:]))
    if not fits:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected {shape}, the same for all heads, got {got}")
    allowed = _allowed(mask).expand(shape)[:, 0]
    if allowed[..., n_all:].any():
        raise ValueError(
            "attention_mask: expected causal attention, got columns that are still to come"
        )
    allowed = allowed[..., :n_all]
    real = allowed[:, -1]
    stored = layer.real if n_past else None
    if n_past and not np.array_equal(real[:, :n_past].cpu(), stored):
        row, column = np.argwhere(real[:, :n_past].cpu().numpy() != stored)[0]
        raise ValueError(
            "attention_mask: expected the padding that the cache was filled with, "
            f"got another value for row {row}, column {column}"
        )
    _check_causal(allowed, real, n_past)
    valid = real[:, n_past:]
    return None if valid.all() else valid.contiguous()


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """Boolean form of a mask that is bool, or 0 and the dtype's least value."""
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not mask.is_floating_point() or not (allowed | (mask <= torch.finfo(mask.dtype).min)).all():
        raise ValueError(
            "attention_mask: expected only 0 and -inf, got other values (a bias such as alibi)"
        )
    return allowed


def _check_causal(allowed: torch.Tensor, tokens: torch.Tensor, n_past: int) -> None:
    """Require that each query token sees the tokens up to itself; padding may see anything."""
    n_new, n_all = allowed.shape[1:]
    column = torch.arange(n_all, device=allowed.device)
    for start in range(0, n_new - 1, _CHECK_ROWS):  # the last query row is where tokens come from
        rows = torch.arange(start, min(start + _CHECK_ROWS, n_new), device=allowed.device)
        expected = tokens[:, None] & (column <= n_past + rows[:, None])
        wrong = (allowed[:, start : start + _CHECK_ROWS] != expected).any(-1) & tokens[
            :, n_past + rows
        ]
        if wrong.any():
            row, query = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                "attention_mask: expected causal attention with padding columns hidden, "
                f"got another pattern for row {row}, query column {start + query}"
            )
