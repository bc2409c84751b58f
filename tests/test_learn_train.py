"""Learner: both stages, budgets, validation, resuming, divergence."""

import dataclasses
import doctest

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from leank.learning import train  # noqa: E402
from leank.learning.folder import FORMAT, read_state, write_state  # noqa: E402
from leank.learning.span import SpanModel, loss_of  # noqa: E402
from leank.learning.train import DivergedError, Learner, Settings  # noqa: E402
from leank.learning.validation import Validation  # noqa: E402

from .learn_tools import make_batch, random_alpha  # noqa: E402
from .tiny_models import RECENT, SINK, tiny  # noqa: E402

SETTINGS = Settings(
    ratio=0.5,
    align=8,
    stage1_steps=6,
    stage2_steps=8,
    validate_every=3,
    lr=0.1,
    stage2_lr=0.05,
)


def batches(i):
    return make_batch(seed=100 + i)


def validation(model, cache_bytes=0):
    batches = [make_batch(seed=1), make_batch((30, 33), seed=2)]
    return Validation(model, batches, cache_bytes=cache_bytes)


def learner(settings=SETTINGS, batches=batches, cache_bytes=0, **options):
    model = SpanModel(tiny(), sink=SINK, recent=RECENT)
    return Learner(model, settings, batches, validation(model, cache_bytes), **options)


def state_of(one):
    return one.alpha.detach(), one.n_done, one.best


def assert_same(one, other):
    for x, y in zip(state_of(one)[:2], state_of(other)[:2], strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))
    np.testing.assert_array_equal(one.best.keep, other.best.keep)
    assert (one.best.loss, one.best.stage, one.best.step) == (
        other.best.loss,
        other.best.stage,
        other.best.step,
    )


def test_doctests():
    assert doctest.testmod(train).failed == 0


def test_both_stages():
    one = learner()
    steps = list(one.run())
    assert [(s.stage, s.step) for s in steps] == [(1, i) for i in range(6)] + [
        (2, i) for i in range(8)
    ]
    assert steps[5].mean_alpha < 0.98 and steps[0].lr == pytest.approx(0.1)
    assert steps[6].lr == pytest.approx(0.05 * train.trapezoid(0, 8))
    validated = [(s.stage, s.step) for s in steps if s.validation is not None]
    assert validated == [(1, 5), (2, 2), (2, 5), (2, 7)]
    assert one.best.keep.shape == (3, 2, 16)
    assert one.best.keep.sum() == 3 * 2 * 16 / 2
    assert not (one.best.keep.sum(-1) % 8).any()
    losses = [s.validation for s in steps if s.validation is not None]
    assert one.best.loss == min(losses)
    assert [s.improved for s in steps if s.validation is not None] == [
        x == min(losses[: i + 1]) for i, x in enumerate(losses)
    ]
    # As deployed, on the same batches.
    assert one.validation.loss(one.best.keep) == one.best.loss


def test_stage_1_alone_lowers_the_loss_of_its_mask():
    """The learned mask is better than the one chosen among equal factors."""
    one = learner(Settings(ratio=0.5, align=8, stage1_steps=40, stage2_steps=0, lr=0.05))
    start = one.validation.loss(one.choose())
    list(one.run())
    assert one.best.loss < 0.9 * start


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 9, 13])
def test_a_resumed_run_ends_alike(tmp_path, cut):
    whole, first, second = learner(), learner(), learner()
    list(whole.run())
    for _ in zip(range(cut), first.run(), strict=False):
        pass
    assert first.n_done == cut
    write_state(tmp_path / "state", {"format": FORMAT} | first.state_dict())
    second.load_state_dict(read_state(tmp_path / "state"))
    list(second.run())
    assert_same(whole, second)
    assert whole.stage1_loss == second.stage1_loss
    assert torch.equal(whole.stage1_alpha, second.stage1_alpha)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_save_that_fails_leaves_the_state_before(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_state(path, {"format": FORMAT, "n_done": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        write_state(path, {"format": FORMAT, "n_done": 2})
    assert read_state(path)["n_done"] == 1


def test_kept_dense_runs_change_nothing():
    plain, kept, some = learner(), learner(cache_bytes=1 << 30), learner(cache_bytes=130_000)
    for one in (plain, kept, some):
        list(one.run())
        assert_same(plain, one)
    assert [len(one.validation._cache) for one in (plain, kept, some)] == [0, 2, 1]


def test_stage_2_goes_on_from_another_runs_stage_1():
    """As if stage 1 had been its own: the budget does not touch it."""
    other = dataclasses.replace(SETTINGS, ratio=0.75)
    first, whole, second = learner(), learner(other), learner(other)
    list(first.run())
    list(whole.run())
    second.skip_stage1(first.stage1_alpha)
    assert [step.stage for step in second.run()] == [2] * 8
    assert_same(whole, second)


def test_stage_2_never_ends_worse_than_stage_1():
    one = learner(dataclasses.replace(SETTINGS, stage2_lr=1.0))  # destroys what stage 1 found
    steps = list(one.run())
    assert one.best.loss <= one.stage1_loss
    assert max(s.validation for s in steps if s.validation is not None) > one.best.loss


def test_a_gradual_ratio_rises_to_the_budget(monkeypatch):
    settings = dataclasses.replace(SETTINGS, gradual=0.5, stage1_steps=0)
    ratios = [settings.ratio_of(i) for i in range(8)]
    np.testing.assert_allclose(ratios, [0.4, 0.425, 0.45, 0.475, 0.5, 0.5, 0.5, 0.5])
    one = learner(settings)
    used, choose = [], one.choose
    monkeypatch.setattr(one, "choose", lambda r=None: used.append(r) or choose(r))
    list(one.run())
    assert [r for r in used if r is not None] == ratios
    assert one.best.keep.mean() == 0.5  # validated at the budget also while the ratio rises


def test_a_fading_stage_2_begins_with_the_forward_of_stage_1():
    settings = dataclasses.replace(SETTINGS, fade=0.5, stage1_steps=0)
    assert [settings.softness_of(i) for i in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    one, other = (
        learner(settings, start=random_alpha()),
        learner(dataclasses.replace(settings, stage1_steps=8, penalty=0.0), start=random_alpha()),
    )
    steps, first = list(one.run()), next(iter(other.run()))
    assert steps[0].loss == first.loss
    # From the mask on, it is what is validated.
    assert one.best.loss == one.validation.loss(one.best.keep)


def test_it_starts_from_given_factors():
    start = random_alpha().numpy()
    one = learner(start=start)
    np.testing.assert_array_equal(one.alpha.detach(), start)


def test_without_any_step_the_start_is_the_result():
    one = learner(dataclasses.replace(SETTINGS, stage1_steps=0, stage2_steps=0))
    assert list(one.run()) == []
    np.testing.assert_array_equal(one.best.keep, one.choose())
    assert one.best.loss == one.stage1_loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_have_float32_factors_and_losses(dtype):
    model = SpanModel(tiny(dtype=dtype), sink=SINK, recent=RECENT)
    one = Learner(model, SETTINGS, batches, validation(model))
    steps = list(one.run())
    assert one.alpha.dtype == torch.float32 and np.isfinite([s.loss for s in steps]).all()
    full = learner()
    list(full.run())
    assert one.best.loss == pytest.approx(full.best.loss, rel=0.2)


def test_divergence_stops_with_the_best_mask_so_far():
    def bad_at_the_end(i):
        batch = batches(i)
        if i == 11:
            batch.weights[:] = torch.nan
        return batch

    one, whole = learner(batches=bad_at_the_end), learner()
    with pytest.raises(DivergedError, match="stage 2, step 6: the loss is nan"):
        list(one.run())
    for _ in zip(range(11), whole.run(), strict=False):
        pass
    assert_same(one, whole)


@pytest.mark.parametrize("every", [0, 1])
def test_empty_heads_get_a_gradient_where_asked(every):
    one = learner(Settings(**{**SETTINGS.__dict__, "zero_every": every, "stage1_steps": 0}))
    with torch.no_grad():
        one.alpha[0, 0] = 0.2
        one.alpha[1:, :, 8:] = 0.1
        one.alpha[0, 1] = 0.9
    keep = one.choose()
    assert not keep[0, 0].any() and keep[0, 1].all()
    before = one.alpha.detach().clone()
    next(iter(one.run()))
    moved = (one.alpha.detach() - before).abs() > 0
    assert moved[0, 0].any() == bool(every)
    # Channels that a live head dropped move too: the gradient goes straight through the mask.
    assert moved[1, 0][~torch.tensor(keep[1, 0])].any()


def test_straight_through_is_the_gradient_of_the_factors():
    one = learner()
    with torch.no_grad():
        one.alpha.copy_(random_alpha())
    batch = batches(0)
    dense = one.model.dense(batch)
    keep = torch.tensor(one.choose())
    factor = keep.float().requires_grad_()
    loss_of(one.model.mixed(batch, dense, factor, ~keep.any(-1)), dense, batch).backward()
    before = one.alpha.detach().clone()
    through = keep.float() + (one.alpha - one.alpha.detach())
    loss_of(one.model.mixed(batch, dense, through, ~keep.any(-1)), dense, batch).backward()
    torch.testing.assert_close(one.alpha.grad, factor.grad, rtol=0, atol=0)
    assert torch.equal(one.alpha.detach(), before) and factor.grad[~keep].abs().max() > 0


def test_bad_settings_are_named_before_any_work():
    with pytest.raises(ValueError, match="validation: expected at least one batch"):
        Validation(SpanModel(tiny(), sink=SINK, recent=RECENT), [])
    with pytest.raises(ValueError, match="align"):
        learner(Settings(ratio=0.5, align=7))
    for name in ("lr", "stage2_lr", "penalty", "gradual", "stage1_steps", "validate_every"):
        with pytest.raises(ValueError, match=f"{name}: expected .* got -1"):
            Settings(**{name: -1})
    with pytest.raises(ValueError, match="lr: expected 0 to 1, got nan"):
        Settings(lr=float("nan"))
