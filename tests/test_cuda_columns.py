"""What ``leank.cuda.LayerCache.step_columns`` reads from a mask, against NumPy."""

import numpy as np
import pytest

from .conftest import random_keep
from .cuda_tools import make, needs_gpu, torch

pytest.importorskip("leank.cuda", reason="leank was built without CUDA")

from leank._cuda_ops import NO_COLUMN  # noqa: E402

pytestmark = needs_gpu

N_ROWS, LENGTH = 3, 70
ROOMS = [LENGTH + 1, 2048, 5003]
# Room, row and column of what a mask says wrongly; the new column may be either.
WRONG = [(room, *place) for room in ROOMS for place in [(0, 0), (2, LENGTH - 1)]]
WRONG += [(room, *place) for room in ROOMS[1:] for place in [(1, LENGTH + 1), (2, -1)]]


def filled(room, real):
    """Return a cache with columns of which some are padding."""
    rng = np.random.default_rng(0)
    keep = random_keep(rng, 64, (16, 0))
    cache = make(keep, "bfloat16", n_rows=N_ROWS, sink=2, recent=8, max_tokens=room)
    k, v = torch.randn(2, N_ROWS, len(keep), LENGTH, 64, device="cuda").bfloat16()
    cache.append(k, v, torch.from_numpy(real).cuda())
    return cache


def read(cache, mask):
    """Return valid, and whether the mask did not fit."""
    misfit = torch.full((), NO_COLUMN, dtype=torch.int32, device="cuda")
    valid = cache.step_columns(mask, misfit)
    assert valid.shape == (N_ROWS, 1) and valid.dtype == torch.bool
    assert int(misfit) in (LENGTH, NO_COLUMN)
    return valid[:, 0].tolist(), int(misfit) == LENGTH


def some_real():
    real = np.random.default_rng(1).random((N_ROWS, LENGTH)) < 0.7
    real[:, -1] = True
    return real


def wide(real, new, room):
    """Return a mask [B, 1, 1, room] of stored columns and the new one."""
    mask = np.zeros((len(real), room), bool)
    mask[:, :LENGTH], mask[:, LENGTH] = real, new
    return torch.from_numpy(mask)[:, None, None].cuda()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
def test_masks_that_fit(room, dtype):
    real, new = some_real(), np.array([True, False, True])
    mask = wide(real, new, room)
    if dtype != torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
    assert read(filled(room, real), mask) == (new.tolist(), False)


@pytest.mark.parametrize("room, row, column", WRONG)
def test_masks_that_do_not_fit(room, row, column):
    real, new = some_real(), np.ones(N_ROWS, bool)
    mask = wide(real, new, room)
    mask[row, 0, 0, column] ^= True
    assert read(filled(room, real), mask) == ([True] * N_ROWS, True)


@pytest.mark.parametrize("all_real", [True, False])
def test_one_mask_for_all_rows_and_none(all_real):
    real = np.ones((N_ROWS, LENGTH), bool) if all_real else some_real()
    cache = filled(2048, real)
    one = wide(np.ones((1, LENGTH), bool), True, 2048)
    assert read(cache, one) == read(cache, None) == ([True] * N_ROWS, not all_real)


def test_a_mask_with_strides():
    real = some_real()
    twice = wide(real, np.ones(N_ROWS, bool), 2048).repeat_interleave(2, -1)
    assert read(filled(2048, real), twice[..., ::2]) == ([True] * N_ROWS, False)


def test_what_was_noted_stays():
    cache, new = filled(100, some_real()), np.ones(N_ROWS, bool)
    misfit = torch.full((), 50, dtype=torch.int32, device="cuda")
    for real in (some_real(), ~some_real()):
        cache.step_columns(wide(real, new, 100), misfit)
        assert int(misfit) == 50


def test_masks_that_are_refused():
    cache = filled(100, some_real())
    misfit = torch.full((), NO_COLUMN, dtype=torch.int32, device="cuda")
    mask = wide(some_real(), np.ones(N_ROWS, bool), 100)
    for bad, text in (
        (mask.cpu(), r"attention_mask: expected cuda:0, got cpu"),
        (mask[..., :-1], r"attention_mask: expected \(3, 1, 1, 100\), the same for all heads"),
        (mask.long(), r"attention_mask: expected torch.bool or floating point, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=text):
            cache.step_columns(bad, misfit)
    assert int(misfit) == NO_COLUMN
