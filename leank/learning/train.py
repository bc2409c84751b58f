"""Both stages of learning a mask: factors on the channels of middle keys, then the mask itself.

Source: LeanK, arXiv 2508.02215, section 3.2. Stage 2 differs from the paper: it runs through the
mask as it will be deployed, and never ends with a worse one than stage 1's at the same budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from leank.learning.budget import choose_channels
from leank.learning.graphs import Gradients
from leank.learning.parallel import Alone, World
from leank.learning.sample import Batch
from leank.learning.span import SpanModel
from leank.learning.validation import Validation
from leank.masks import ChannelMask

EASY = 0.8  # share of the ratio that a gradual stage 2 begins with


class DivergedError(Exception):
    """A loss or a gradient is not finite.

    The best mask so far is in `Learner.best`; `leank.learn` puts it here as well.
    """

    mask: ChannelMask | None = None


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Attributes
    ----------
    ratio : float
        Share to drop, of what `budget` counts.
    align : int
        Each head keeps a multiple of so many channels.
    budget : {"k", "kv"}
        What the ratio is of: K channels, or bytes of K and V outside the window, where a head that
        keeps no channel stores no V either.
    stage1_steps, stage2_steps : int
    lr, stage2_lr : float
        Highest learning rates.
    penalty : float
        lambda, the weight of mean ``|alpha|`` in stage 1.
    gradual : float
        Share of the steps of stage 2 during which the ratio rises from 0.8 of itself; 0: none.
    fade : float
        Share of the steps of stage 2 during which the forward moves from the factors, which stage 1
        ended with, to the mask; empty heads see middle keys until then. 0: none.
    live : float
        For the budget "kv" alone: what keeping a head alive is worth beside its channels, in
        channels of factor 1. Factors tell what channels are worth, not what an empty head costs.
    zero_every : int
        In each so-manyth step of stage 2 heads without a channel see middle keys with logit 0, so
        that they get a gradient and may come back; 0: never.
    validate_every : int
        Steps between validations.
    """

    ratio: float = 0.7
    align: int = 16
    budget: str = "k"
    stage1_steps: int = 200
    stage2_steps: int = 80
    lr: float = 0.03
    stage2_lr: float = 0.005
    penalty: float = 0.06
    gradual: float = 0.0
    fade: float = 0.0
    live: float = 0.0
    zero_every: int = 4
    validate_every: int = 10

    def __post_init__(self) -> None:
        """Check what no other part checks."""
        for name in ("stage1_steps", "stage2_steps", "zero_every"):
            _check(name, getattr(self, name), 0)
        _check("validate_every", self.validate_every, 1)
        _check("penalty", self.penalty, 0)
        _check("live", self.live, 0)
        if self.live > 0 and self.budget != "kv":
            raise ValueError(
                f"live: expected 0 with budget {self.budget}, where empty heads save no more than "
                f"their channels, got {self.live:g}; give budget kv"
            )
        for name in ("gradual", "fade", "lr", "stage2_lr"):
            _check(name, getattr(self, name), 0, 1)

    def ratio_of(self, step: int) -> float:
        """Return the ratio of a step of stage 2."""
        n_rising = self.gradual * self.stage2_steps
        if step >= n_rising:
            return self.ratio
        return self.ratio * (EASY + (1 - EASY) * step / n_rising)

    def softness_of(self, step: int) -> float:
        """Return how far the forward of a step of stage 2 is from the mask, 1 to 0."""
        n_fading = self.fade * self.stage2_steps
        return 1 - step / n_fading if step < n_fading else 0.0


@dataclass(frozen=True)
class Step:
    """What one step did, for the log."""

    stage: int
    step: int
    loss: float
    mean_alpha: float
    low_share: float  # of alphas under 0.1
    lr: float
    validation: float | None = None
    improved: bool = False


@dataclass
class Best:
    """The mask with the smallest validation loss so far, bool [N, Hkv, D]."""

    keep: np.ndarray
    loss: float
    stage: int
    step: int


def trapezoid(step: int, n_steps: int, floor: float = 0.1) -> float:
    """Return the share of the highest learning rate: up for 20% of the steps, down for 20%.

    Examples
    --------
    >>> [round(trapezoid(i, 10), 2) for i in range(10)]
    [0.55, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55]
    """
    ramp = max(1, n_steps // 5)
    rise, fall = (step + 1) / ramp, (n_steps - step) / ramp
    return floor + (1 - floor) * min(1.0, rise, fall)


class Learner:
    """Learns one mask; each step is a function of its number, so that a resumed run ends alike.

    Parameters
    ----------
    model : SpanModel
    settings : Settings
    batches : callable
        Batch of training step i, of both stages together; of a process's own samples.
    validation : Validation
    start : float array [N, Hkv, D], optional
        Factors to begin with; default: ones.
    world : World, optional
        The processes that learn together; default: this one alone.
    gradients : Gradients, optional
        Of the same model; the graphs of another learner, to be used again.
    """

    def __init__(
        self,
        model: SpanModel,
        settings: Settings,
        batches: Callable[[int], Batch],
        validation: Validation,
        *,
        start: np.ndarray | None = None,
        world: World | None = None,
        gradients: Gradients | None = None,
    ) -> None:
        self.model, self.settings, self.world = model, settings, world or Alone()
        self.gradients = gradients or Gradients(model)
        self.batches, self.validation = batches, validation
        self.alpha = torch.ones(model.layout.mask_shape, device=model.device)
        if start is not None:
            self.alpha.copy_(torch.as_tensor(start))
        self.alpha.requires_grad_()
        self.optimizer = torch.optim.AdamW([self.alpha], lr=settings.lr, weight_decay=0.0)
        self.n_done = 0
        self.best: Best | None = None
        self.stage1_alpha: torch.Tensor | None = None  # what stage 2 began with
        self.stage1_loss: float | None = None  # of the validation, with stage 1's mask
        self.choose()  # names a ratio or an alignment that does not fit before any work

    def choose(self, ratio: float | None = None) -> np.ndarray:
        """Return the mask [N, Hkv, D] that meets the budget exactly for the alphas of now."""
        s = self.settings
        scores = self.alpha.detach().cpu().numpy()
        ratio = s.ratio if ratio is None else ratio
        return choose_channels(scores, ratio, s.align, s.budget, s.live)

    def run(self) -> Iterator[Step]:
        """Go on with both stages to their end; yield after each step, when the state is complete.

        Raises
        ------
        DivergedError
            A loss or a gradient is not finite.
        """
        n1, n2 = self.settings.stage1_steps, self.settings.stage2_steps
        while self.n_done < n1 + n2:
            stage, step = (1, self.n_done) if self.n_done < n1 else (2, self.n_done - n1)
            if stage == 2 and step == 0:
                self.end_stage1()
            lr = self._set_lr(stage, step)
            loss = self._step(stage, step)
            self.n_done += 1
            n_steps = n1 if stage == 1 else n2
            due = (step + 1) % self.settings.validate_every == 0 or step + 1 == n_steps
            validation = improved = None
            # Masks of stage 1 on the way are not candidates: only its last one is.
            if stage == 2 and due:
                validation, improved = self._validate(stage, step)
            elif self.n_done == n1:
                self.end_stage1()
                validation, improved = self.stage1_loss, True
            low = (self.alpha.detach() < 0.1).float()
            mean_alpha, low_share = torch.stack([self.alpha.detach().mean(), low.mean()]).tolist()
            yield Step(stage, step, loss, mean_alpha, low_share, lr, validation, bool(improved))
        self.end_stage1()  # for runs without a step

    def end_stage1(self) -> None:
        """Validate stage 1's mask, the one to beat, and forget what the optimizer knows; once."""
        if self.stage1_alpha is not None:
            return
        self.stage1_loss, _ = self._validate(1, self.settings.stage1_steps - 1)
        self.stage1_alpha = self.alpha.detach().clone()
        # Moments of the penalised loss would lead stage 2 astray.
        self.optimizer.state.clear()

    def skip_stage1(self, alpha: torch.Tensor) -> None:
        """Go on with stage 2 from the factors that stage 1 of another run ended with."""
        with torch.no_grad():
            self.alpha.copy_(alpha)
        self.n_done = self.settings.stage1_steps
        self.end_stage1()

    def _set_lr(self, stage: int, step: int) -> float:
        s = self.settings
        n_steps, highest = (s.stage1_steps, s.lr) if stage == 1 else (s.stage2_steps, s.stage2_lr)
        lr = highest * trapezoid(step, n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _step(self, stage: int, step: int) -> float:
        batch = self.batches(self.n_done).to(self.model.device)
        if stage == 1:
            factor, hidden = self.alpha, None
        else:
            keep = self.choose(self.settings.ratio_of(step))
            keep = torch.tensor(keep, device=self.model.device)
            soft, every = self.settings.softness_of(step), self.settings.zero_every
            factor = torch.lerp(keep.float(), self.alpha.detach(), soft)
            seen = soft > 0 or (every and (step + 1) % every == 0)
            hidden = None if seen else ~keep.any(-1)
        # The loss is a mean over the tokens of all processes: their sums are added, then divided.
        weight = self.world.sum(batch.weights.sum())
        # Straight through: alpha gets the gradient of the factors that went forward.
        loss, gradient = self.gradients(batch, factor, hidden, weight)
        loss, self.alpha.grad = self.world.sum(loss), self.world.sum(gradient)
        if stage == 1:
            (self.settings.penalty * self.alpha.abs().mean()).backward()
        if not torch.stack([loss, self.alpha.grad.abs().sum()]).isfinite().all():
            raise DivergedError(f"stage {stage}, step {step + 1}: the loss is {loss.item()}")
        self.optimizer.step()
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        return loss.item()

    def _validate(self, stage: int, step: int) -> tuple[float, bool]:
        keep = self.choose()
        loss = self.validation.loss(keep)
        if not np.isfinite(loss):
            raise DivergedError(f"stage {stage}, step {step + 1}: the validation loss is {loss}")
        improved = self.best is None or loss < self.best.loss
        if improved:
            self.best = Best(keep, loss, stage, step)
        return loss, improved

    # ------------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return what a learner with the same arguments needs to go on, on the CPU."""
        best = self.best and dataclasses.asdict(self.best) | {"keep": torch.tensor(self.best.keep)}
        return {
            "n_done": self.n_done,
            "alpha": self.alpha.detach().cpu(),
            "stage1_alpha": None if self.stage1_alpha is None else self.stage1_alpha.cpu(),
            "stage1_loss": self.stage1_loss,
            "optimizer": self.optimizer.state_dict(),
            "best": best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; `run` then does what it would have done without a stop."""
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.n_done, self.stage1_loss = state["n_done"], state["stage1_loss"]
        alpha, best = state["stage1_alpha"], state["best"]
        self.stage1_alpha = None if alpha is None else alpha.to(self.model.device)
        self.best = best and Best(**best | {"keep": best["keep"].numpy()})


def _check(name: str, value: float, least: float, most: float = float("inf")) -> None:
    if not least <= value <= most:  # False for NaN
        limits = f"at least {least}" if most == float("inf") else f"{least} to {most}"
        raise ValueError(f"{name}: expected {limits}, got {value}")
