"""Scores without training."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from leank import ChannelMask  # noqa: E402
from leank.learning.parallel import Alone  # noqa: E402
from leank.learning.scores import lowest_frequencies, random_scores, second_moments  # noqa: E402
from leank.models import inspect_model  # noqa: E402

from .tiny_models import FAMILIES, prompts, tiny  # noqa: E402


def rotated(model, ids, i):
    """Return q and k [H, L, D] of layer i after rotary embedding, for one row without padding."""
    out = model.model(ids[None], use_cache=True, output_hidden_states=True)
    attention = model.model.layers[i].self_attn
    hidden = model.model.layers[i].input_layernorm(out.hidden_states[i])
    q = attention.q_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(len(ids))[None])
    half = q.shape[-1] // 2
    q = q * cos + torch.cat([-q[..., half:], q[..., :half]], -1) * sin
    return q[0], out.past_key_values.layers[i].keys[0]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments(family):
    model = tiny(family)
    ids, mask = prompts([30, 12, 21], seed=3)
    got = second_moments(model, [(ids[:2], mask[:2].bool()), (ids[2:], mask[2:].bool())])
    for i in range(3):
        q2, k2 = np.zeros((2, 16)), np.zeros((2, 16))
        for row, real in zip(ids, mask.bool(), strict=True):
            q, k = (x.double().square().sum(1) for x in rotated(model, row[real], i))
            q2 += q.view(2, -1, 16).sum(1).numpy()
            k2 += k.numpy()
        np.testing.assert_allclose(got[i], q2 * k2 / (q2 * k2).max(), rtol=1e-4, atol=1e-7)
    assert model.config._attn_implementation == "sdpa"


def test_moments_of_processes_are_those_of_one():
    """The products of each were added, which puts channels in another order."""
    ids, mask = prompts([30, 12, 21], seed=3)
    batches = [(ids[b : b + 1], mask[b : b + 1].bool()) for b in range(3)]
    sums = []

    class World(Alone):
        """Notes sums, or adds those that were noted."""

        def __init__(self, others=None):
            self.others = others and iter(others)

        def sum(self, x):
            sums.append(x)
            return x if self.others is None else x + next(self.others)

    one = second_moments(tiny(), batches)
    second_moments(tiny(), batches[:1], World())
    got = second_moments(tiny(), batches[1:], World(list(sums)))
    np.testing.assert_allclose(got, one, rtol=1e-6)


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="batches: expected at least one"):
        second_moments(tiny(), [])


def test_lowest_frequencies_keep_pairs_that_turn_slowly():
    layout = inspect_model(tiny())
    keep = ChannelMask.from_scores(lowest_frequencies(layout), ratio=0.5, align=8).keep
    assert (keep.sum(-1) == 8).all()
    np.testing.assert_array_equal(np.flatnonzero(keep[0, 0]), [4, 5, 6, 7, 12, 13, 14, 15])


def test_random_scores_depend_on_the_seed_alone():
    layout = inspect_model(tiny())
    first, again, other = (random_scores(layout, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 2, 16) and (first != other).any()
