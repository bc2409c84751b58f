"""What the tests of LeanKCache share: forwards, and a cache with a prompt in it."""

import torch

import leank

from .tiny_models import VOCAB, prompts


@torch.no_grad()
def forward(model, ids, cache, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask).logits


def filled(model, lengths=(40, 12, 25), seed=1):
    """Return a cache with a left-padded prompt, the mask of its columns, and ids to go on with."""
    ids, mask = prompts(list(lengths), seed=seed)
    cache = leank.make_cache(model)
    forward(model, ids, cache, mask)
    more = torch.randint(3, VOCAB, (len(lengths), 6), generator=torch.Generator().manual_seed(7))
    return cache, torch.cat([mask, torch.ones_like(more)], 1), more


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
