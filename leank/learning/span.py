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
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

from leank.learning.ops import mixed_attention
from leank.learning.sample import Batch
from leank.models import Layout, inspect_learnable

_NAME, _CHUNK_NAME = "leank_learn", "leank_learn_chunk"
_ALL = 1 << 62  # a window that no text exceeds
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

    def here(x: torch.Tensor | None) -> torch.Tensor | None:
        """Return it where this layer is, which has K and V of the context already."""
        return None if x is None else x.to(query.device)

    if run.context is not None:
        context = here(run.context)
        key = torch.where(context, run.dense.span_keys[i], key)
        value = torch.where(context, run.dense.span_values[i], value)
    out = mixed_attention(
        query,
        run.dense.keys[i],
        run.dense.values[i],
        key,
        value,
        here(run.alpha[i]),
        scale=scaling,
        start=here(run.start),
        hidden=here(None if run.hidden is None else run.hidden[i]),
        **run.window,
    )
    return out.transpose(1, 2), None


def _attend_chunk(
    module, query, key, value, attention_mask, *, scaling, leank_start=None, **kwargs
):
    """Attention of a chunk to all before it and itself; returns [B, T, Hq, D].

    With padding, or for a chunk that is not the first, transformers would make a mask of T x L,
    with which there is no flash attention: that can take longer than all the rest.
    """
    n_new = query.shape[2]
    if leank_start is None:
        bias = causal_lower_right(n_new, key.shape[2])
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    n_past = key.shape[2] - n_new
    out = mixed_attention(
        query,
        *(x[:, :, :n_past] for x in (key, value)),
        *(x[:, :, n_past:] for x in (key, value)),
        torch.ones(key.shape[1], key.shape[3], device=key.device),  # of no key: all are the window
        sink=0,
        recent=_ALL,
        scale=scaling,
        start=leank_start.to(key.device),
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
        What `leank.patch` accepts, on the CPU, on one GPU, or with its layers on several where
        transformers put them by `device_map`; its weights get no gradient any more.
    sink, recent : int
        Tokens at the start and at the end that keep every channel.
    chunk : int
        Columns of the context that are prefilled at once, so that memory is linear in Lc.

    Attributes
    ----------
    device : torch.device
        Where the embedding is, and where batches and factors have to be.
    devices : tuple of torch.device
        Where the weights are, `device` first.

    Raises
    ------
    TypeError, ValueError
        As `leank.patch`; or weights are on several devices without a device_map, or offloaded.
    """

    def __init__(self, model: nn.Module, *, sink: int, recent: int, chunk: int = 8192) -> None:
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        self.devices = _find_devices(model)  # before the next line, which runs the model
        self.layout: Layout = inspect_learnable(model)
        self.device = self.devices[0]
        self.window = {"sink": sink, "recent": recent}
        self.chunk = chunk
        self.base = model.model
        self.head = model.get_output_embeddings()
        for part in (self.base, self.head):
            part.requires_grad_(False)
        # They know what is visible: transformers makes no mask for names that it has none for.
        AttentionInterface.register(_NAME, _attention)
        AttentionInterface.register(_CHUNK_NAME, _attend_chunk)

    @torch.no_grad()
    def dense(self, batch: Batch, padded: bool | None = None) -> Dense:
        """Run densely over context and span.

        Parameters
        ----------
        batch : Batch
        padded : bool, optional
            Whether rows begin with padding; None: looks, for which a GPU is waited for.
        """
        ids = torch.cat([batch.context, batch.span], 1)
        n_context, n_columns = batch.context.shape[1], ids.shape[1]
        columns = torch.arange(n_columns, device=ids.device)
        # A padding column has any position.
        positions = (columns - batch.start[:, None]).clamp(min=0)
        cache = DynamicCache()
        # The span is in the last chunk.
        cuts = [*range(0, max(1, n_context), self.chunk), n_columns]
        if padded is None:
            padded = bool(batch.start.any())
        mask, options = None, {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(_BACKENDS))
            if ids.is_cuda:
                stack.enter_context(use_attention(self.layout, _CHUNK_NAME))
                options = {"leank_start": batch.start if padded else None}
            elif padded:
                mask = (columns >= batch.start[:, None]).long()
            for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
                out = self.base(
                    input_ids=ids[:, begin:end],
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                    **options,
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
                position_ids=(columns - batch.start[:, None]).clamp(min=0),
                use_cache=False,
                leank_run=run,
            ).last_hidden_state

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits that generate() compares, float32 [..., V], of last hidden states."""
        return self.head(hidden).float()


def _find_devices(model: nn.Module) -> tuple[torch.device, ...]:
    """Return where the weights are, the embedding's device first."""
    parts = [getattr(model, "get_input_embeddings", lambda: None)(), model]
    devices = dict.fromkeys(
        p.device for part in parts if part is not None for p in part.parameters()
    )
    names = ", ".join(sorted(map(str, devices)))
    if torch.device("meta") in devices:
        # They would be copied to a GPU in the forward, and stay there until the backward.
        raise ValueError(
            f"model: expected all weights on GPUs or all on the CPU, got {names}; what is on meta "
            "was offloaded or not loaded"
        )
    if len(devices) > 1 and not getattr(model, "hf_device_map", None):
        raise ValueError(
            f"model: expected all weights on one device, or on several by device_map, got {names}"
        )
    return tuple(devices)


def loss_of(out: torch.Tensor, dense: Dense, batch: Batch) -> torch.Tensor:
    """Return the mean over hidden units and, weighted, over tokens of (h - h')^2.

    Source: LeanK, arXiv 2508.02215, section 3.2.
    """
    return error_of(out, dense, batch) / batch.weights.sum()


def error_of(out: torch.Tensor, dense: Dense, batch: Batch) -> torch.Tensor:
    """Return the weighted sum over tokens whose mean `loss_of` is, float32, where the batch is."""
    return (token_errors(out, dense, batch) * batch.weights).sum()


def token_errors(out: torch.Tensor, dense: Dense, batch: Batch) -> torch.Tensor:
    """Return the mean over hidden units of (h - h')^2, float32 [B, T], where the batch is."""
    error = (out.float() - dense.target.float()).square().mean(-1)
    return error.to(batch.weights.device)
