"""Budgets of K alone and of K and V: exact, never exceeded, and as good as any mask of its kind."""

import doctest
import itertools

import numpy as np
import pytest

from leank import _C, ChannelMask
from leank.learning import budget
from leank.learning.budget import choose_channels
from leank.masks import kept_shares


def scores_of(seed, shape=(2, 2, 24)):
    """Make factors as stage 1 leaves them: many zeros and ones, and whole heads that are low."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-0.7, 1.2, shape).clip(0, 1) * rng.choice([0.1, 1], (*shape[:2], 1))
    return scores.astype(np.float32)


def cost(keep, align):
    """Blocks of K, and of V of heads that live."""
    return (keep.sum() + keep.any(-1).sum() * keep.shape[-1]) // align


def best_sum(scores, ratio, align):
    """Try every width of every head."""
    head_dim = scores.shape[-1]
    heads = -np.sort(-scores.reshape(-1, head_dim).astype(np.float64))
    best = 0.0
    for widths in itertools.product(range(0, head_dim + 1, align), repeat=len(heads)):
        paid = sum(w + head_dim for w in widths if w)
        if paid <= 2 * heads.size * (1 - ratio) * (1 + 1e-12):
            best = max(best, sum(h[:w].sum() for h, w in zip(heads, widths, strict=True)))
    return best


def test_doctests():
    assert doctest.testmod(budget).failed == 0


@pytest.mark.parametrize("ratio", [0.0, 0.13, 0.3, 0.5, 0.7, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("align", [8, 24])
def test_no_mask_within_the_budget_has_a_larger_sum(ratio, align):
    for seed in range(4):
        scores = scores_of(seed)
        keep = choose_channels(scores, ratio, align, "kv")
        assert not (keep.sum(-1) % align).any()
        assert scores[keep].sum(dtype=np.float64) == pytest.approx(best_sum(scores, ratio, align))


@pytest.mark.parametrize("shape, align", [((3, 2, 16), 8), ((10, 3, 64), 8), ((4, 8, 128), 16)])
@pytest.mark.parametrize("ratio", [0.1, 0.45, 0.6, 0.7, 0.9])
def test_the_budget_is_met_to_a_block(shape, align, ratio):
    scores = scores_of(1, shape)
    keep = choose_channels(scores, ratio, align, "kv")
    limit = 2 * scores.size * (1 - ratio) / align + 1e-6
    m = shape[-1] // align
    # Less only where a head has to be opened for more.
    room = 1 if (keep.any(-1) & ~keep.all(-1)).any() else m + 1
    assert limit - room < cost(keep, align) <= limit
    assert kept_shares(keep)["kv_bytes"] <= 1 - ratio + 1e-9
    assert ChannelMask(keep, 1, 1, align).empty_heads == (~keep.any(-1)).mean()


def test_zeros_use_the_budget_too():
    keep = choose_channels(np.zeros((1, 4, 16), np.float32), 0.5, 8, "kv")
    assert cost(keep, 8) == 8


def test_k_alone_is_the_choice_of_the_c_library():
    scores = scores_of(3, (4, 2, 32))
    np.testing.assert_array_equal(
        choose_channels(scores, 0.7, 8), _C.select_channels(scores, 0.7, 8)
    )


def test_emptying_a_head_pays_where_it_is_nearly_empty():
    """At one budget of bytes, keeping fewer heads leaves more channels for them."""
    scores = np.full((1, 4, 32), 0.5, np.float32)
    scores[0, 3] = 0.4
    keep = choose_channels(scores, 0.5, 8, "kv")
    assert keep.sum(-1)[0, 3] == 0 and keep.any(-1).sum() == 2 and keep.sum() == 64


def test_live_heads_can_be_worth_more_than_their_channels():
    scores = np.full((1, 4, 32), 0.5, np.float32)
    n_live = [
        choose_channels(scores, 0.3, 8, "kv", live).any(-1).sum() for live in (0.0, 4.0, 12.0, 99.0)
    ]
    assert n_live == sorted(n_live) and n_live[0] == 3 and n_live[-1] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.5, 8, "v"), "budget: expected k or kv, got 'v'"),
        ((1.5, 8, "kv"), "ratio"),
        ((0.5, 7, "kv"), "align"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_channels(scores_of(0), *arguments)
    with pytest.raises(ValueError, match="scores: expected at least 0, got -1"):
        choose_channels(-np.ones((1, 1, 8), np.float32), 0.5, 8, "kv")
