"""The attention of mask learning in plain PyTorch, and small batches."""

import numpy as np
import torch

from leank.learning.sample import Batch

from .tiny_models import VOCAB


def eager_mixed(
    q, k_context, v_context, k, v, alpha, *, sink, recent, scale, start=None, hidden=None
):
    """The same as `leank.learning.ops.mixed_attention`, with every logit in memory."""
    k, v = torch.cat([k_context, k], 2), torch.cat([v_context, v], 2)
    n_rows, n_heads, n_columns, _ = k.shape
    n_new, r = q.shape[2], q.shape[1] // n_heads
    start = q.new_zeros(n_rows, dtype=torch.int64) if start is None else start
    position = torch.arange(n_columns, device=q.device) - start[:, None]
    p, j = position[:, -n_new:, None], position[:, None, :]
    visible = (j >= 0) & (j <= p)
    window = (j < sink) | (p - j < recent)
    grouped = q.unflatten(1, (n_heads, r))
    whole = torch.einsum("bgrtd,bgjd->bgrtj", grouped, k)
    middle = torch.einsum("bgrtd,gd,bgjd->bgrtj", grouped, alpha.to(q.dtype), k)
    logits = torch.where(window[:, None, None], whole, middle) * scale
    seen = visible[:, None, None].expand_as(logits)
    if hidden is not None:
        seen = seen & (window[:, None, None] | ~hidden[:, None, None, None])
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = torch.where(seen.any(-1, keepdim=True), logits, 0.0).softmax(-1)
    out = torch.einsum("bgrtj,bgjd->bgrtd", weights * seen, v)
    return out.flatten(1, 2)


def make_batch(lengths=(40, 12, 25), n_span=7, seed=0):
    """Return left-padded contexts of these lengths, spans, and weights of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    n_context = max(lengths)
    context = torch.randint(3, VOCAB, (len(lengths), n_context), generator=generator)
    start = n_context - torch.tensor(lengths)
    context[torch.arange(n_context) < start[:, None]] = 0
    span = torch.randint(3, VOCAB, (len(lengths), n_span), generator=generator)
    weights = (torch.rand(len(lengths), n_span, generator=generator) < 0.6).float()
    weights[:, -1] = 1
    return Batch(context, span, start, weights)


def random_alpha(seed=0, shape=(3, 2, 16)):
    """Return factors, some of them 0 or 1."""
    x = np.random.default_rng(seed).uniform(-0.3, 1.3, shape).clip(0, 1)
    return torch.from_numpy(x.astype(np.float32))
