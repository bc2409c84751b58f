"""Checking masks and choosing channels within the exact budget."""

import numpy as np
import pytest

from leank import _C

from .reference import select_channels


@pytest.mark.parametrize("align", [8, 16, 32])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.95, 1.0])
def test_select_equals_reference(rng, ratio, align):
    for shape in [(1, 1, 32), (2, 3, 64), (5, 2, 96)]:
        # Heads differ in scale, so that some become empty and some keep all.
        scores = rng.random(shape, np.float32) * rng.random((*shape[:2], 1), np.float32) ** 3
        keep = _C.select_channels(scores, ratio, align)
        assert keep.dtype == bool and keep.shape == shape
        np.testing.assert_array_equal(keep, select_channels(scores, ratio, align))
        assert keep.sum() == np.floor(scores.size * (1 - ratio) / align + 0.5) * align
        _C.check_mask(keep, align)


def test_select_keeps_the_top_channels_of_each_head(rng):
    scores = rng.standard_normal((3, 4, 64)).astype(np.float32)
    keep = _C.select_channels(scores, 0.6, 8)
    for head, kept in zip(scores.reshape(-1, 64), keep.reshape(-1, 64), strict=True):
        if kept.any() and not kept.all():
            assert head[kept].min() > head[~kept].max()


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_select_breaks_ties_by_head_then_channel(rng, levels):
    scores = rng.integers(0, levels, (2, 3, 32)).astype(np.float32)
    for ratio in (0.2, 0.5, 0.75):
        keep = _C.select_channels(scores, ratio, 8)
        np.testing.assert_array_equal(keep, select_channels(scores, ratio, 8))
    equal = _C.select_channels(np.ones((1, 3, 16), np.float32), 0.5, 8)
    assert equal.reshape(6, 8).all(axis=1).tolist() == [True] * 3 + [False] * 3


def test_select_rounds_half_a_block_up():
    scores = np.arange(24, dtype=np.float32).reshape(1, 1, 24)
    # 1.5 and 0.5 blocks; to the nearest even number would be 2 and 0.
    assert _C.select_channels(scores, 0.5, 8).sum() == 16
    assert _C.select_channels(scores[..., :8], 0.5, 8).sum() == 8


def test_select_takes_negative_scores():
    scores = -np.arange(32, dtype=np.float32).reshape(1, 2, 16)
    keep = _C.select_channels(scores, 0.25, 8)
    assert keep.reshape(4, 8).all(axis=1).tolist() == [True, True, True, False]


SCORES = np.ones((2, 2, 16), np.float32)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((SCORES, -0.01, 8), ValueError, r"ratio: expected 0 to 1, got -0\.01"),
        ((SCORES, 1.5, 8), ValueError, r"ratio: expected 0 to 1, got 1\.5"),
        ((SCORES, float("nan"), 8), ValueError, r"ratio: expected 0 to 1, got nan"),
        ((SCORES, 0.5, 0), ValueError, r"align: expected .*, got 0"),
        ((SCORES, 0.5, -8), ValueError, r"align: expected .*, got -8"),
        ((SCORES, 0.5, 12), ValueError, r"align: expected .*16, got 12"),
        ((SCORES[0], 0.5, 8), ValueError, r"scores: expected \(any, any, any\), got \(2, 16\)"),
        ((SCORES[:0], 0.5, 8), ValueError, r"scores: expected .*, got \(0, 2, 16\)"),
        ((SCORES.astype(float), 0.5, 8), TypeError, r"scores: .* float32, got float64"),
        ((SCORES.tolist(), 0.5, 8), TypeError, r"scores: expected a NumPy array, got list"),
        ((SCORES[:, :, ::2], 0.5, 8), ValueError, r"scores: .*contiguous"),
        ((SCORES[:, ::2], 0.5, 8), ValueError, r"scores: .*contiguous"),
        ((SCORES * np.float32(np.nan), 0.5, 8), ValueError, r"scores: .*finite.*, got"),
        ((SCORES * np.float32(np.inf), 0.5, 8), ValueError, r"scores: .*finite.*, got"),
        ((SCORES, "half", 8), TypeError, r"real number"),
    ],
)
def test_select_refuses(args, error, message):
    with pytest.raises(error, match=message):
        _C.select_channels(*args)


def widths(*kept, head_dim=32):
    """Mask [1, Hkv, D] whose heads keep their first channels."""
    return np.arange(head_dim) < np.array(kept)[None, :, None]


def test_check_accepts():
    _C.check_mask(widths(0, 8, 24, 32), 8)
    _C.check_mask(widths(0, 16, 32), 16)
    _C.check_mask(np.ones((3, 2, 512), bool), 64)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((widths(8, 12), 8), ValueError, r"keep: .*multiple of 8.* layer 0 head 1"),
        (
            (np.concatenate([widths(16, 16), widths(24, 16)]), 16),
            ValueError,
            r"keep: .*multiple of 16.* layer 1 head 0",
        ),
        ((widths(8), 4), ValueError, r"align: expected a multiple of 8, got 4"),
        ((widths(8), 0), ValueError, r"align: expected a multiple of 8, got 0"),
        ((widths(8), -8), ValueError, r"align: expected a multiple of 8, got -8"),
        ((widths(8, head_dim=36), 8), ValueError, r"keep: .*got \(1, 1, 36\)"),
        ((widths(8, head_dim=520), 8), ValueError, r"keep: .*up to 512, got \(1, 1, 520\)"),
        ((widths(8)[:, :0], 8), ValueError, r"keep: .*got \(1, 0, 32\)"),
        ((widths(8)[0], 8), ValueError, r"keep: expected \(any, any, any\), got \(1, 32\)"),
        ((widths(8).astype(np.uint8), 8), TypeError, r"keep: expected dtype bool, got uint8"),
        ((widths(8).tolist(), 8), TypeError, r"keep: expected a NumPy array, got list"),
        ((widths(16)[:, :, ::2], 8), ValueError, r"keep: .*contiguous"),
    ],
)
def test_check_refuses(args, error, message):
    with pytest.raises(error, match=message):
        _C.check_mask(*args)


def test_allocation_failure(rng):
    scores = rng.random((2, 3, 32), np.float32)
    expected = _C.select_channels(scores, 0.5, 8)
    for n in (1, 2):
        _C._fail_allocation(n)
        with pytest.raises(MemoryError):
            _C.select_channels(scores, 0.5, 8)
    _C._fail_allocation(3)
    np.testing.assert_array_equal(_C.select_channels(scores, 0.5, 8), expected)
    _C._fail_allocation(0)
