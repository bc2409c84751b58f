"""Both stages of learning a mask: factors on the channels of middle keys, then the mask itself.

Source: LeanK, arXiv 2508.02215, section 3.2. Stage 2 differs from the paper: it runs through the
mask as it will be deployed, and never ends with a worse one than stage 1's at the same budget.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from leank import _C
from leank.learning.data import Batch
from leank.learning.span import SpanModel, loss_of


class DivergedError(Exception):
    """A loss or a gradient is not finite; the best mask so far is in `Learner.best`."""


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Attributes
    ----------
    ratio : float
        Share of K channels to drop.
    align : int
        Each head keeps a multiple of so many channels.
    stage1_steps, stage2_steps : int
    lr : float
        Highest learning rate of stage 1; stage 2 has half of it.
    penalty : float
        lambda, the weight of mean |alpha| in stage 1.
    zero_every : int
        In each so-manyth step of stage 2 heads without a channel see middle keys with logit 0, so
        that they get a gradient and may come back; 0: never.
    validate_every : int
        Steps between validations.
    """

    ratio: float = 0.7
    align: int = 16
    stage1_steps: int = 300
    stage2_steps: int = 200
    lr: float = 0.03
    penalty: float = 0.06
    zero_every: int = 4
    validate_every: int = 25


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
        Batch of training step i, of both stages together.
    validation : sequence of Batch
        At least one.
    """

    def __init__(
        self,
        model: SpanModel,
        settings: Settings,
        batches: Callable[[int], Batch],
        validation: Sequence[Batch],
    ) -> None:
        if not validation:
            raise ValueError("validation: expected at least one batch, got none")
        self.model, self.settings = model, settings
        self.batches, self.validation = batches, validation
        self.alpha = torch.ones(model.layout.mask_shape, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.alpha], lr=settings.lr, weight_decay=0.0)
        self.n_done = 0
        self.best: Best | None = None
        self.choose()  # names a ratio or an alignment that does not fit before any work

    def choose(self) -> np.ndarray:
        """Return the mask [N, Hkv, D] that meets the budget exactly for the alphas of now."""
        scores = self.alpha.detach().numpy()
        return _C.select_channels(scores, self.settings.ratio, self.settings.align)

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
                # Moments of the penalised loss would lead stage 2 astray.
                self.optimizer.state.clear()
            lr = self._set_lr(stage, step)
            loss = self._step(stage, step)
            self.n_done += 1
            n_steps = n1 if stage == 1 else n2
            due = (step + 1) % self.settings.validate_every == 0 or step + 1 == n_steps
            validation = improved = None
            # Masks of stage 1 on the way are not candidates: only its last one is.
            if due and (stage == 2 or step + 1 == n1):
                validation, improved = self._validate(stage, step)
            alpha = self.alpha.detach()
            yield Step(
                stage,
                step,
                loss,
                float(alpha.mean()),
                float((alpha < 0.1).float().mean()),
                lr,
                validation,
                bool(improved),
            )

    def _set_lr(self, stage: int, step: int) -> float:
        s = self.settings
        n_steps, highest = (s.stage1_steps, s.lr) if stage == 1 else (s.stage2_steps, s.lr / 2)
        lr = highest * trapezoid(step, n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _step(self, stage: int, step: int) -> float:
        batch = self.batches(self.n_done)
        dense = self.model.dense(batch)
        self.optimizer.zero_grad()
        if stage == 1:
            loss = loss_of(self.model.mixed(batch, dense, self.alpha), dense, batch)
            total = loss + self.settings.penalty * self.alpha.abs().mean()
        else:
            keep = torch.tensor(self.choose())
            # The mask goes forward, its gradient to alpha: straight through. The difference is
            # exactly 0.
            factor = keep.float() + (self.alpha - self.alpha.detach())
            every = self.settings.zero_every
            hidden = None if every and (step + 1) % every == 0 else ~keep.any(-1)
            total = loss = loss_of(self.model.mixed(batch, dense, factor, hidden), dense, batch)
        total.backward()
        if not (torch.isfinite(loss) and torch.isfinite(self.alpha.grad).all()):
            raise DivergedError(f"stage {stage}, step {step}: the loss is {loss.item()}")
        self.optimizer.step()
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        return loss.item()

    def _validate(self, stage: int, step: int) -> tuple[float, bool]:
        keep = self.choose()
        loss = self.loss_as_deployed(keep, self.validation)
        improved = self.best is None or loss < self.best.loss
        if improved:
            self.best = Best(keep, loss, stage, step)
        return loss, improved

    @torch.no_grad()
    def loss_as_deployed(self, keep: np.ndarray, batches: Sequence[Batch]) -> float:
        """Return the mean loss of a mask as it is deployed: empty heads see no middle key."""
        keep = torch.tensor(keep)
        losses = []
        for batch in batches:
            dense = self.model.dense(batch)
            out = self.model.mixed(batch, dense, keep.float(), ~keep.any(-1))
            losses.append(loss_of(out, dense, batch).item())
        return float(np.mean(losses))

    # ------------------------------------------------------------------------------------ resuming

    def save(self, path: Path) -> None:
        """Write the state to a file that a killed process never leaves half written."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "n_done": self.n_done,
            "alpha": self.alpha.detach(),
            "optimizer": self.optimizer.state_dict(),
            "best": None
            if self.best is None
            else dataclasses.asdict(self.best) | {"keep": torch.tensor(self.best.keep)},
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on from a state that `save` wrote.

        Raises
        ------
        ValueError
            It is of a run with other settings, or of another model.
        """
        state = torch.load(path, weights_only=True)
        mine = dataclasses.asdict(self.settings)
        for name, value in mine.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"resume: expected a run with {name} = {value}, "
                    f"got one with {state['settings'].get(name)}"
                )
        if state["alpha"].shape != self.alpha.shape:
            raise ValueError(
                f"resume: expected factors {tuple(self.alpha.shape)}, "
                f"got {tuple(state['alpha'].shape)}"
            )
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.n_done = state["n_done"]
        best = state["best"]
        self.best = best and Best(**best | {"keep": best["keep"].numpy()})
