"""What is compared: masks, and other ways to a smaller cache that a mask should beat.

Static baselines drop as much of K as the first mask does, in heads of any width, and have its
window; so has ThinK, whose paper keeps the last tokens whole, but no first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import QuantizedCache

from leank.evaluation.items import CONTINUATION
from leank.learning.data import Samples
from leank.learning.scores import lowest_frequencies, random_scores, second_moments
from leank.masks import ChannelMask, kept_shares
from leank.models import inspect_learnable

STATIC = ("random", "lowest", "moments")
THINK = "think"
QUANTIZED = ("quanto", "hqq", "fp8")  # transformers' names
BASELINES = (*STATIC, THINK, *QUANTIZED)
DENSE = "dense"
_LAST = 32  # queries by which ThinK scores channels: the observation window of its code
_ALIGN = 8  # what a mask's widths are multiples of
_SAMPLES, _LENGTH = 8, 1024  # of the text that moments are taken from


class EvalError(ValueError):
    """A mistake in what the user asked for; its text is one line."""


@dataclass(frozen=True)
class Method:
    """A way to keep a cache: a mask, one for all prompts or one for each, or fewer bits.

    Attributes
    ----------
    name : str
    mask : ChannelMask, optional
        Of all prompts. For ThinK it is the one whose window and share are used.
    backend : str, optional
        Of transformers' QuantizedCache.
    """

    name: str
    mask: ChannelMask | None = None
    backend: str | None = None

    def mask_of(self, model: nn.Module, prompt: np.ndarray) -> ChannelMask | None:
        """Return the mask for a prompt that is read densely; the model must not be patched."""
        return think(model, prompt, self.mask) if self.name == THINK else self.mask

    def shares(self) -> dict[str, float] | None:
        """Return what is kept outside the window, where that does not depend on the prompt."""
        if self.name == THINK or self.mask is None:
            return None
        return kept_shares(self.mask.inside)


def think(model: nn.Module, prompt: np.ndarray, like: ChannelMask) -> ChannelMask:
    """Return the mask of ThinK (arXiv 2407.21018, section 3.2) for one prompt.

    Channel c of a head has the score ||Q_c|| ||K_c||, the Frobenius norm of the outer product of
    the last queries' channel and the prompt's keys' channel; queries of the heads that share keys
    are taken together. Every head keeps equally many channels, those with the largest scores.

    Parameters
    ----------
    model : nn.Module
        What `leank.learning.scores.second_moments` accepts.
    prompt : int64 array [L]
    like : ChannelMask
        Whose share of K is kept, rounded to a multiple of 8 channels per head, and whose window.
    """
    ids = torch.from_numpy(prompt)[None].to(next(model.parameters()).device)
    scores = second_moments(model, [(ids, torch.ones_like(ids, dtype=torch.bool))], last=_LAST)
    n_kept = think_width(like)
    keep = np.zeros(scores.shape, bool)
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :n_kept]
    np.put_along_axis(keep, best, True, axis=-1)
    return ChannelMask(keep, sink=like.sink, recent=like.recent)


def think_width(like: ChannelMask) -> int:
    """Return how many channels ThinK keeps of each head."""
    return int(like.kept_ratio * like.head_dim / _ALIGN + 0.5) * _ALIGN


def make_methods(
    model: nn.Module,
    masks: dict[str, ChannelMask],
    baselines: Sequence[str],
    *,
    text: Samples,
    seed: int,
) -> list[Method]:
    """Return the dense cache, the masks and the baselines.

    Parameters
    ----------
    model : nn.Module
        Not patched.
    masks : dict
        By name; baselines are made like the first.
    baselines : sequence of str
        Some of `BASELINES`.
    text : Samples
        Where second moments are taken from: of the part that masks are learned from.
    seed : int
        Of random scores.

    Raises
    ------
    EvalError
        A baseline does not work with this model, or needs a package.
    """
    like = next(iter(masks.values()))
    methods = [Method(DENSE), *(Method(name, mask) for name, mask in masks.items())]
    for name in baselines:
        if name in QUANTIZED:
            check_quantized(name, model, like)
            methods.append(Method(name, backend=name))
            continue
        try:
            layout = inspect_learnable(model)
        except ValueError as error:
            raise EvalError(f"baseline {name}: {error}") from error
        if name == THINK:
            methods.append(Method(name, like))
            continue
        if name == "random":
            scores = random_scores(layout, seed)
        elif name == "lowest":
            scores = lowest_frequencies(layout)
        else:
            scores = second_moments(model, _batches(model, text))
        fields = {"sink": like.sink, "recent": like.recent, "method": name}
        methods.append(
            Method(name, ChannelMask.from_scores(scores, like.ratio, like.align, **fields))
        )
    return methods


def moments_text(corpus: Any, tokenizer: Any, seed: int) -> Samples:
    """Return the text for second moments: of the part that masks are learned from."""
    options = {"kinds": (CONTINUATION,), "lengths": _LENGTH, "n": _SAMPLES, "seed": seed}
    return Samples(corpus, "train", tokenizer, **options)


def _batches(model: nn.Module, text: Samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    device, batches = next(model.parameters()).device, []
    for sample in text:
        ids = torch.from_numpy(np.concatenate([sample.context, sample.span]))[None].to(device)
        batches.append((ids, torch.ones_like(ids, dtype=torch.bool)))
    return batches


def check_quantized(backend: str, model: nn.Module, mask: ChannelMask) -> None:
    """Require that a quantized cache can be made here, and that it takes K and V of this model."""
    shape = (1, mask.n_heads, 2, mask.head_dim)
    state = torch.zeros(shape, dtype=model.dtype, device=next(model.parameters()).device)
    try:
        QuantizedCache(backend, model.config).update(state, state, 0)
    # Each backend has its own way to say that it, or a compiler, or a GPU is not there.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvalError(f"baseline {backend}: transformers' QuantizedCache: {reason}") from error


def n_bytes(x: Any) -> int:
    """Count the bytes of all tensors in a cache layer's states, quantized or not."""
    if isinstance(x, torch.Tensor):
        # A quantized tensor is made of others; its own size is that of what it stands for.
        parts = getattr(x, "__tensor_flatten__", None) if type(x) is not torch.Tensor else None
        return x.nbytes if parts is None else sum(n_bytes(getattr(x, p)) for p in parts()[0])
    if isinstance(x, dict):
        return sum(map(n_bytes, x.values()))
    return sum(map(n_bytes, x)) if isinstance(x, list | tuple) else 0


def cache_bytes(cache: Any) -> int:
    """Count the bytes of a cache of transformers."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(n_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)
