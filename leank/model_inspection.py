"""What a model tells about its heads: which channels turn together, and what heads attend to."""

from __future__ import annotations

import re
import sys
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from . import _probe
from .attention import base_forward
from .cache_args import fitted_to
from .inspection import Inspection, Rotary
from .masks import ChannelMask
from .models import BASES, Layout, inspect_structure, text_config

_NAME = "leank_mass_"
_SCORES = 1 << 24  # of one chunk of queries; bounds memory whatever the length
# Their layers with full attention turn nothing if there are sliding ones, which the code decides.
_FULL_UNTURNED = ("cohere2", "exaone4", "exaone4_5", "exaone_moe")
_here = threading.local()  # has `run` in a thread while it sends tokens through a model


def inspect_mask(
    mask: ChannelMask, model: nn.Module, ids: torch.Tensor | None = None
) -> Inspection:
    """
    Return what a mask keeps of a model and, given a text, what the model's heads attend to.

    Parameters
    ----------
    mask : ChannelMask
        Its window must be known if there are `ids`.
    model : nn.Module
        As `leank.models.inspect_structure` takes it; without `ids` also on the device "meta".
    ids : int tensor [B, L], optional
        As in `middle_mass`.

    Raises
    ------
    ValueError
        The mask does not fit the model; or as in `rotary_of` and `middle_mass`.
    """
    layout = inspect_structure(model)
    mask = fitted_to(mask, layout)
    mass = None
    if ids is not None:
        if mask.sink is None or mask.recent is None:
            raise ValueError(f"mask: expected a known window beside ids, got {mask!r}")
        mass = middle_mass(model, ids, sink=mask.sink, recent=mask.recent)
    return Inspection(mask, rotary_of(model, layout), mass)


def rotary_of(model: nn.Module, layout: Layout | None = None) -> Rotary:
    """
    Return which channels of K a model's rotary embedding turns together.

    Parameters
    ----------
    model : nn.Module
        As `leank.models.inspect_structure` takes it, also on the device "meta".
    layout : Layout, optional
        What that returned, where it is known.

    Returns
    -------
    Rotary
        Without pairs if the model has no rotary embedding.

    Raises
    ------
    ValueError
        The embedding is of a kind that is not known.
    """
    layout = layout or inspect_structure(model)
    config = text_config(model)
    sizes = {
        buffer.numel()
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
        for key, buffer in module.named_buffers(recurse=False)
        if re.fullmatch(r"(full_attention_)?inv_freq", key)
    }
    if not sizes:
        return Rotary.halves(0)
    n_pairs = sizes.pop()
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if sizes or 2 * n_pairs > layout.head_dim or rope.get("rope_type") == "proportional":
        raise ValueError(
            f"model: expected one rotary embedding, of {layout.head_dim} channels of K at most, "
            f"got {type(model).__name__} with {sorted({n_pairs, *sizes})} pairs"
        )
    turns = getattr(config, "no_rope_layers", None)  # 1 where a layer does turn
    without = [i for i, turn in enumerate(turns or ()) if not turn]
    if config.model_type in _FULL_UNTURNED and layout.outside:
        without = [i for i in range(layout.n_layers) if i not in layout.outside]
    partners = _partners(model, 2 * n_pairs)
    first = np.flatnonzero(partners > np.arange(2 * n_pairs))
    return Rotary(np.stack([first, partners[first]], 1), tuple(without))


def _partners(model: nn.Module, n: int) -> npt.NDArray[np.int64]:
    """Return the partner of each of n channels, from the function that the model turns them by.

    A turn by 90 degrees puts each channel in the place of its partner.
    """
    files = [sys.modules.get(cls.__module__) for cls in type(model).__mro__]
    file = next((x for x in files if hasattr(x, "apply_rotary_pos_emb")), None)
    turn = getattr(file, "apply_rotary_pos_emb", None)
    # One number for each channel or, where both of a pair are turned at once, for each pair.
    width = n if hasattr(file, "rotate_half") else n // 2
    x, angles = torch.arange(1.0, n + 1).view(1, 1, 1, n), torch.ones(1, 1, width)
    try:
        found = turn(x, x, torch.zeros_like(angles), angles)[1].abs().flatten().long().numpy() - 1
        known = (np.sort(found) == np.arange(n)).all() and (found[found] == np.arange(n)).all()
    except (TypeError, ValueError, RuntimeError):
        known = False
    if not known:
        raise ValueError(
            "model: expected a function apply_rotary_pos_emb(q, k, cos, sin) that turns pairs of "
            f"channels, got another rotary embedding in {type(model).__name__}"
        )
    return found


# ---------------------------------------------------------------- attention to the middle


@torch.no_grad()
def middle_mass(
    model: nn.Module, ids: torch.Tensor, *, sink: int, recent: int
) -> npt.NDArray[np.float64]:
    """
    Return how much of its attention each query head of the dense model gives to the middle.

    The middle of a query at position p are the keys from `sink` to p - `recent`, which a mask is
    about. A head with little mass there is a streaming head; one with much of it needs old tokens.
    Memory grows with the length, not with its square.

    Parameters
    ----------
    model : PreTrainedModel
        Not patched; it is left as it was.
    ids : int tensor [B, L]
        Tokens of rows without padding.
    sink, recent : int
        S0 and W.

    Returns
    -------
    float array [N, Hq]
        Mean over the queries that have a middle; a row for each layer with full attention.

    Raises
    ------
    ValueError
        No query has a middle, or the model is of a kind that cannot be pruned, does not attend
        through transformers' attention interface, or reports attention that is not a number.
    """
    for name, value, least in (("sink", sink, 0), ("recent", recent, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if ids.ndim != 2 or ids.shape[1] <= sink + recent:
        raise ValueError(
            f"ids: expected (B, L) of more tokens than the window of {sink} + {recent}, "
            f"got {tuple(ids.shape)}"
        )
    layout = inspect_structure(model)
    if not layout.interface or layout.n_ranks > 1:
        what = "torch's function itself" if not layout.interface else "heads in several processes"
        raise ValueError(
            "model: expected attention through transformers' attention interface in one process, "
            f"got {type(model).__name__} with {what}"
        )
    for base in BASES:
        AttentionInterface.register(_NAME + base, _FUNCTIONS[base])
        AttentionMaskInterface.register(_NAME + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    inside = [i for i in range(layout.n_layers) if i not in layout.outside]
    device = _probe.device_of(model.get_input_embeddings())
    _here.run = SimpleNamespace(layers=set(inside), sink=sink, recent=recent, mass={})
    try:
        with _probe.attending(model, _NAME + layout.base), _probe.evaluating(model):
            model.base_model(input_ids=ids.to(device), use_cache=False)
        mass = _here.run.mass
    finally:
        del _here.run
    if sorted(mass) != inside:
        raise ValueError(
            f"model: expected attention in {_probe.layers_text(inside)}, got it in "
            f"{_probe.layers_text(sorted(mass))} of {type(model).__name__}"
        )
    found = np.stack([mass[i] for i in inside])
    if not np.isfinite(found).all():
        raise ValueError(f"model: expected finite attention, got NaN in {type(model).__name__}")
    return found


def _attention(base: str, module, query, key, value, attention_mask, *args, **kwargs):
    """Attend as `base` does, and note the mass, as transformers' attention interface calls it."""
    run = getattr(_here, "run", None)
    if run is None:
        raise RuntimeError(
            "attention: another thread measures a model that shares this one's config object; "
            "models of several threads need a config each (copy.deepcopy)"
        )
    if module.layer_idx in run.layers:
        if module.layer_idx in run.mass:
            raise ValueError(f"model: expected one attention in layer {module.layer_idx}, got two")
        run.mass[module.layer_idx] = _mass(run.sink, run.recent, query, key, **kwargs)
    return base_forward(base, module)(module, query, key, value, attention_mask, *args, **kwargs)


_FUNCTIONS = {base: partial(_attention, base) for base in BASES}


def _mass(
    sink: int, recent: int, query, key, scaling=None, softcap=None, s_aux=None, **kwargs
) -> npt.NDArray[np.float64]:
    """Return the mean mass of each query head, [Hq]."""
    n_rows, n_heads, n_tokens, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    grouped = (query.float() * scale).view(n_rows, key.shape[1], -1, n_tokens, head_dim)
    key = key.float()
    total = torch.zeros(n_heads, dtype=torch.float64, device=query.device)
    size = max(1, _SCORES // (n_rows * n_heads * n_tokens))
    first = sink + recent  # no query before it has a middle
    for start in range(first, n_tokens, size):
        at = torch.arange(start, min(start + size, n_tokens), device=query.device)[:, None]
        j = torch.arange(int(at[-1]) + 1, device=query.device)
        part = grouped[..., at[:, 0], :].flatten(2, 3)  # query heads of a KV head as its rows
        scores = (part @ key[..., : len(j), :].mT).view(n_rows, n_heads, len(at), len(j))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill_(j > at, -torch.inf)
        if s_aux is not None:  # a sink takes its share of the attention
            sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores, -1)[..., : len(j)]
        middle = (j >= sink) & (at - j >= recent)
        total += (weights * middle).sum((0, 2, 3), dtype=torch.float64)
    return (total / (n_rows * (n_tokens - first))).cpu().numpy()
