"""A frozen model over a context and a span: once densely, once with factors on its middle keys.

The dense run gives the hidden states that are to be matched, and the K and V of the context, which
every other run of the same sample uses without a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from leank.learning.data import Batch
from leank.learning.ops import mixed_attention
from leank.models import Layout, inspect_learnable

_NAME = "leank_learn"
# Without cuDNN, which makes a plan for each new shape: that takes longer than the attention.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Dense:
    """What the dense run of a batch leaves.

    Attributes
    ----------
    target : tensor [B, T, hidden]
        Last hidden states of the span.
    keys, values : lists of N tensors [B, Hkv, Lc, D]
        Of the context, after rotary embedding.
    span_keys, span_values : lists of N tensors [B, Hkv, T, D]
        Of the span's columns.
    """

    target: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    span_keys: list[torch.Tensor]
    span_values: list[torch.Tensor]

    @property
    def n_bytes(self) -> int:
        """Memory that it holds."""
        tensors = (self.target, *self.keys, *self.values)  # those of the span share their storage
        return sum(x.untyped_storage().nbytes() for x in tensors)


@dataclass(frozen=True)
class _Run:
    """What the attention of each layer needs to know of a run."""

    dense: Dense
    alpha: torch.Tensor
    hidden: torch.Tensor | None
    start: torch.Tensor
    context: torch.Tensor | None  # [B, 1, T, 1], True where a column of the span is context
    window: dict[str, int]


def _attention(module, query, key, value, attention_mask, *, scaling, leank_run: _Run, **kwargs):
    """Attention of one layer, as transformers calls it; returns [B, T, Hq, D]."""
    i, run = module.layer_idx, leank_run
    if run.context is not None:
        key = torch.where(run.context, run.dense.span_keys[i], key)
        value = torch.where(run.context, run.dense.span_values[i], value)
    out = mixed_attention(
        query,
        run.dense.keys[i],
        run.dense.values[i],
        key,
        value,
        run.alpha[i],
        scale=scaling,
        start=run.start,
        hidden=None if run.hidden is None else run.hidden[i],
        **run.window,
    )
    return out.transpose(1, 2), None


@contextlib.contextmanager
def use_attention(layout: Layout, name: str) -> Iterator[None]:
    """Let the model attend by the function that is registered under a name."""
    before = [config._attn_implementation for config in layout.configs]
    try:
        for config in layout.configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(layout.configs, before, strict=True):
            config._attn_implementation = implementation


class SpanModel:
    """A causal language model that is not trained, and the window that a mask is learned for.

    Parameters
    ----------
    model : nn.Module
        What `leank.patch` accepts, on the CPU or on one GPU; its weights get no gradient any more.
    sink, recent : int
        Tokens at the start and at the end that keep every channel.
    chunk : int
        Columns of the context that are prefilled at once, so that memory is linear in Lc.

    Attributes
    ----------
    device : torch.device
        Where the weights are, and where batches and factors have to be.

    Raises
    ------
    TypeError, ValueError
        As `leank.patch`; or the weights are on several devices.
    """

    def __init__(self, model: nn.Module, *, sink: int, recent: int, chunk: int = 8192) -> None:
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        self.layout: Layout = inspect_learnable(model)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"model: expected all weights on one device, got {names}")
        self.device = devices.pop()
        self.window = {"sink": sink, "recent": recent}
        self.chunk = chunk
        self.base = model.model
        self.head = model.get_output_embeddings()
        for part in (self.base, self.head):
            part.requires_grad_(False)
        AttentionInterface.register(_NAME, _attention)
        # The op knows what is visible: no mask is made.
        AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)

    @torch.no_grad()
    def dense(self, batch: Batch) -> Dense:
        """Run densely over context and span."""
        ids = torch.cat([batch.context, batch.span], 1)
        n_context, n_columns = batch.context.shape[1], ids.shape[1]
        columns = torch.arange(n_columns, device=ids.device)
        # Without a mask attention takes its fast path.
        mask = (columns >= batch.start[:, None]).long() if batch.start.any() else None
        # A padding column has any position.
        positions = (columns - batch.start[:, None]).clamp(min=0)
        cache = DynamicCache()
        # The span is in the last chunk.
        cuts = [*range(0, max(1, n_context), self.chunk), n_columns]
        with sdpa_kernel(_BACKENDS):
            for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
                out = self.base(
                    input_ids=ids[:, begin:end],
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                )
        return Dense(
            out.last_hidden_state[:, -batch.span.shape[1] :].clone(),  # frees the others
            [layer.keys[:, :, :n_context] for layer in cache.layers],
            [layer.values[:, :, :n_context] for layer in cache.layers],
            [layer.keys[:, :, n_context:] for layer in cache.layers],
            [layer.values[:, :, n_context:] for layer in cache.layers],
        )

    def mixed(
        self,
        batch: Batch,
        dense: Dense,
        alpha: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run over the span, with middle keys multiplied by alpha.

        Parameters
        ----------
        batch : Batch
        dense : Dense
            Of the same batch.
        alpha : float32 [N, Hkv, D]
            May require a gradient.
        hidden : bool [N, Hkv], optional
            Heads that attend to no middle key.

        Returns
        -------
        tensor [B, T, hidden]
            Last hidden states; of columns that are context, they mean nothing.
        """
        n_context, n_span = batch.context.shape[1], batch.span.shape[1]
        columns = torch.arange(n_context, n_context + n_span, device=batch.span.device)
        context = None
        if batch.begin is not None:
            context = (columns - n_context < batch.begin[:, None])[:, None, :, None]
        run = _Run(dense, alpha, hidden, batch.start, context, self.window)
        with use_attention(self.layout, _NAME):
            return self.base(
                input_ids=batch.span,
                position_ids=columns - batch.start[:, None],
                use_cache=False,
                leank_run=run,
            ).last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits that generate() compares, float32 [..., V], of last hidden states."""
        return self.head(hidden).float()


def loss_of(out: torch.Tensor, dense: Dense, batch: Batch) -> torch.Tensor:
    """Return the mean over hidden units and, weighted, over tokens of (h - h')^2.

    Source: LeanK, arXiv 2508.02215, section 3.2.
    """
    return error_of(out, dense, batch) / batch.weights.sum()


def error_of(out: torch.Tensor, dense: Dense, batch: Batch) -> torch.Tensor:
    """Return the weighted sum over tokens whose mean `loss_of` is, float32."""
    error = (out.float() - dense.target.float()).square().mean(-1)
    return (error * batch.weights).sum()
