"""Scores of channels that need no training: for masks to compare with, and to start from.

`leank.ChannelMask.from_scores` makes masks of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from leank.learning.parallel import Alone, World
from leank.learning.span import use_attention
from leank.models import Layout, inspect_learnable

_NAME = "leank_moments"


class _Moments:
    """Sums over tokens of q_c^2, over a group's query heads, and of k_c^2: float64 [N, Hkv, D]."""

    def __init__(self, shape: tuple[int, int, int], last: int | None) -> None:
        self.last = last
        self.q, self.k = (torch.zeros(shape, dtype=torch.float64) for _ in "qk")
        self.real: torch.Tensor | None = None  # [B, L], of the batch that is running

    def add(self, i: int, q: torch.Tensor, k: torch.Tensor) -> None:
        real = self.real[:, None, :, None].to(q.device)
        for total, x, n in ((self.q, q, self.last or 0), (self.k, k, 0)):
            squares = (x.double().square() * real)[:, :, -n:].sum((0, 2)).cpu()
            total[i] += squares.view(len(total[i]), -1, x.shape[-1]).sum(1)


def _attention(module, query, key, value, attention_mask, *, leank_moments: _Moments, **kwargs):
    leank_moments.add(module.layer_idx, query, key)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@torch.no_grad()
def second_moments(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    world: World | None = None,
    *,
    last: int | None = None,
) -> npt.NDArray[np.float32]:
    """Return what each channel adds to the variance of logits: mean of q_c^2 times that of k_c^2.

    Parameters
    ----------
    model : nn.Module
        What `SpanModel` accepts.
    batches : iterable of (int64 [B, L], bool [B, L])
        Left-padded token ids, and which of them are tokens, where the embedding is.
    world : World, optional
        The processes whose batches are taken together; default: this one alone.
    last : int, optional
        Take queries of so many last columns; default: all.

    Returns
    -------
    float32 array [N, Hkv, D]
        Largest 1 in each layer.

    Raises
    ------
    TypeError, ValueError
        As `SpanModel`; or there is no batch.
    """
    layout: Layout = inspect_learnable(model)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    moments, n_batches = _Moments(layout.mask_shape, last), 0
    for ids, real in batches:
        moments.real, n_batches = real, n_batches + 1
        positions = (real.cumsum(1) - 1).clamp(min=0)
        with use_attention(layout, _NAME):
            model.model(
                input_ids=ids,
                attention_mask=real.long(),
                position_ids=positions,
                use_cache=False,
                leank_moments=moments,
            )
    if n_batches == 0:
        raise ValueError("batches: expected at least one, got none")
    world = world or Alone()
    scores = world.sum(moments.q) * world.sum(moments.k)
    return (scores / scores.amax((1, 2), keepdim=True)).float().numpy()


def lowest_frequencies(layout: Layout) -> npt.NDArray[np.float32]:
    """Return scores that prefer channels which rotary embedding turns slowly: float32 [N, Hkv, D].

    Channel c turns with channel c + D/2, as in Llama, Qwen2 and most others, but not in models with
    partial or interleaved rotary embedding.
    """
    half = layout.head_dim // 2
    scores = np.tile((np.arange(half) + 1) / half, 2).astype(np.float32)
    return np.broadcast_to(scores, layout.mask_shape).copy()


def random_scores(layout: Layout, seed: int) -> npt.NDArray[np.float32]:
    """Return uniform scores in [0, 1): float32 [N, Hkv, D]."""
    return np.random.default_rng(seed).random(layout.mask_shape, dtype=np.float32)
