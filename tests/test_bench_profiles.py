"""The widths that the package ships for benchmarks, and the bytes that follow from them."""

import doctest
import hashlib

import numpy as np
import pytest

from leank import ChannelMask
from leank.bench import profiles
from leank.bench.profiles import dense_bytes, load_profiles, needed_bytes, random_keep

from .conftest import random_keep as keep_of
from .reference import is_window

WINDOW = {"sink": 128, "recent": 896}
PROFILES = load_profiles()


def byte_ratio(keep, length):
    """Dense bytes by needed ones, both means over the layers."""
    needed = sum(needed_bytes(layer, 1, length, **WINDOW) for layer in keep)
    return sum(dense_bytes(layer, 1, length) for layer in keep) / needed


def test_doctests():
    result = doctest.testmod(profiles)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "name, shape, n_q_heads, counts",
    [
        ("llama-3.1-8b", (32, 8), 32, {0: 47, 32: 120, 64: 67, 96: 22}),
        ("qwen-2.5-7b", (28, 4), 28, {0: 35, 32: 34, 64: 33, 96: 10}),
    ],
)
def test_shapes_and_widths(name, shape, n_q_heads, counts):
    profile = PROFILES[name]
    assert (profile.name, profile.n_q_heads, profile.head_dim) == (name, n_q_heads, 128)
    assert profile.widths.shape == shape
    assert dict(zip(*np.unique(profile.widths, return_counts=True), strict=True)) == counts
    assert profile.source == "LeanK, arXiv 2508.02215, masks of the reference implementation"


def test_widths_are_those_of_the_masks():
    """Hashes of kept_per_head, as little-endian int64, of the masks that the profiles are of."""
    hashes = {
        name: hashlib.sha256(profile.widths.astype("<i8").tobytes()).hexdigest()[:16]
        for name, profile in PROFILES.items()
    }
    assert hashes == {"llama-3.1-8b": "fe86a852a77d851f", "qwen-2.5-7b": "342cde6e3523ba54"}


@pytest.mark.parametrize(
    "name, length, ratio",
    [
        ("llama-3.1-8b", 32768, 1.73),
        ("llama-3.1-8b", 4096, 1.49),
        ("llama-3.1-8b", 1024, 1.00),
        ("qwen-2.5-7b", 32768, 1.98),
    ],
)
def test_byte_ratios(name, length, ratio):
    assert byte_ratio(PROFILES[name].keep(0), length) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_makes_masks_of_its_widths(name):
    profile = PROFILES[name]
    mask = ChannelMask(profile.keep(seed=3))
    np.testing.assert_array_equal(mask.kept_per_head, profile.widths)
    np.testing.assert_array_equal(mask.keep, profile.keep(seed=3))
    assert (mask.keep != profile.keep(seed=4)).any()
    assert profile.keep(seed=3).flags.c_contiguous
    heads = mask.keep[profile.widths == 32]
    assert len(np.unique(heads, axis=0)) == len(heads)


def test_random_places_are_uniform():
    keep = random_keep(np.full((1000, 1), 8), 16, seed=1)
    np.testing.assert_allclose(keep.mean((0, 1)), 0.5, atol=0.1)


@pytest.mark.parametrize("length", [1, 9, 10, 11, 50])
def test_needed_bytes_counts_what_the_rule_reads(length):
    keep, dim = keep_of(np.random.default_rng(0), 16, (0, 8, 16)), 16
    sink, recent, p = 4, 6, length - 1
    n_elements = 0
    for kept in keep:
        for j in range(length):
            if is_window(p, j, sink=sink, recent=recent, lo=sink, n0=0):
                n_elements += 2 * dim
            elif kept.any():
                n_elements += kept.sum() + dim
    for n_rows, size in ((1, 2), (3, 4)):
        got = needed_bytes(keep, n_rows, length, sink=sink, recent=recent, elem_bytes=size)
        assert got == n_rows * size * n_elements
    assert dense_bytes(keep, 3, length) == 3 * 2 * 2 * 3 * length * dim


def test_where_nothing_is_dropped_all_is_read():
    keep = np.ones((2, 64), bool)
    for length in (10, 5000):
        assert needed_bytes(keep, 2, length, **WINDOW) == dense_bytes(keep, 2, length)
