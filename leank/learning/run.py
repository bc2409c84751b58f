"""``leank.learn``: both stages for one mask or several, on disk so that a killed run can go on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import leank
from leank.learning.evaluate import Evaluation, evaluate
from leank.learning.feed import Batches, workers_for
from leank.learning.folder import ResumeError, RunFolder, check_same
from leank.learning.graphs import Gradients
from leank.learning.parallel import World, find_world
from leank.learning.plan import LearnError, Plan, Request, Target
from leank.learning.span import SpanModel
from leank.learning.train import Best, DivergedError, Learner, Step
from leank.learning.validation import Validation
from leank.masks import ChannelMask

_SAVE_STEPS, _SAVE_SECONDS = 10, 5.0  # a state is saved after so many, whichever is first
_START_BATCHES = 4  # of training, whose second moments a run may start from


@dataclass(frozen=True)
class Event:
    """What a progress callback gets after each step.

    Attributes
    ----------
    step : Step
    target : Target or None
        What stage 2 is for; None in stage 1, which serves all targets.
    n_done, n_total : int
        Steps of all stages.
    """

    step: Step
    target: Target | None
    n_done: int
    n_total: int


Progress = Callable[[Event], None]


def learn(
    model: nn.Module,
    tokenizer: Any,
    ratio: float = 0.7,
    align: int = 16,
    *,
    sink: int,
    recent: int,
    progress: bool | Progress = False,
    **options: Any,
) -> ChannelMask:
    """
    Learn which K channels a model can do without, from text and tasks that are made offline.

    Stage 1 learns a factor for each channel, stage 2 the mask as it will be used. The model's
    weights are not changed and get no gradient any more.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `leank.patch`, on the CPU, on one GPU, or on several by transformers' `device_map`,
        in float32, bfloat16 or float16. What `device_map` offloads to the CPU cannot be used.
    tokenizer : transformers tokenizer
        The model's, a fast one.
    ratio : float
        Share to drop: of the K channels, or with ``budget="kv"`` of the bytes of K and V.
    align : int
        Every head keeps a multiple of so many channels; a multiple of 8 that divides the head dim.
    sink, recent : int
        The window: first and last tokens that keep all channels.
    progress : bool or callable
        Show bars (needs rich), or call with an `Event` after each step.
    **options
        Fields of `leank.learning.Request`, `Settings` and `DataSettings`: ``stage1_steps``, ``lr``,
        ``lengths``, ``text``, ``seed``, ``output``, ``folder``, ``resume`` and so on.

    Returns
    -------
    ChannelMask
        With the window, the model's name, and how it was learned. It has the smallest validation
        loss of stage 2's masks and of stage 1's.

    Raises
    ------
    LearnError, DataError
        Something does not fit; found before any long work.
    ResumeError
        The run in the folder is another one.
    DivergedError
        A loss is not finite. The last good mask is in its attribute ``mask``, and in the output.

    Examples
    --------
    >>> mask = leank.learn(model, tokenizer, 0.7, sink=64, recent=512)  # doctest: +SKIP
    >>> mask.save("mask.safetensors")                                   # doctest: +SKIP
    """
    options |= {"sink": sink, "recent": recent, "progress": progress}
    [mask] = learn_many(model, tokenizer, [ratio], [align], **options).values()
    return mask


def learn_many(
    model: nn.Module,
    tokenizer: Any,
    ratios: Iterable[float],
    aligns: Iterable[int] = (16,),
    *,
    sink: int,
    recent: int,
    progress: bool | Progress = False,
    **options: Any,
) -> dict[Target, ChannelMask]:
    """
    Learn one mask for each pair of a ratio and an alignment, all from one stage 1.

    Each is what `leank.learn` with the same options returns for its pair.

    Parameters
    ----------
    model, tokenizer, sink, recent, progress, **options
        As in `leank.learn`.
    ratios, aligns : iterables

    Returns
    -------
    dict
        Masks by (ratio, align).

    Raises
    ------
    LearnError, DataError, ResumeError, DivergedError
        As `leank.learn`.
    """
    request = Request.of(ratios, aligns, sink=sink, recent=recent, **options)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    plan = Plan(model, tokenizer, request, name)
    if progress is True:
        from leank.learning.bars import Bars  # needs rich

        with Bars() as bars:
            run = Run(model, plan, bars)
            run.tested = bars.tested
            return run.go()
    return Run(model, plan, progress or None).go()


class Run:
    """A plan being carried out on a model with weights.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
    progress : callable, optional
    world : World, optional
        Default: the processes that torchrun or accelerate started, or this one alone.
    command : str
        What a user typed, for the log and the report.

    Attributes
    ----------
    tested : callable or None
        Called with the numbers of items done and of all while the report is made.

    Raises
    ------
    LearnError, ResumeError
        The model's weights are not where they can be used, or the folder has another run.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        progress: Progress | None = None,
        world: World | None = None,
        command: str = "",
    ) -> None:
        r = plan.request
        self.plan, self.progress, self.command = plan, progress, command
        self.tested: Callable[[int, int], None] | None = None
        try:
            self.model = SpanModel(model, sink=r.sink, recent=r.recent, chunk=r.chunk)
        except (TypeError, ValueError) as error:
            raise LearnError(str(error)) from error
        plan.check_device(next(model.parameters()).dtype, self.model.device)
        self.world = world or find_world(self.model.device)
        self.identity = plan.identity(model)
        self._whole = model
        self.n_done = 0
        self.done: list[dict[str, Any]] = []  # final states of the targets so far
        self.evaluations: list[Evaluation] = []  # of the report
        self._saved_at = time.monotonic()
        self.folder: RunFolder | None = None
        self._state: dict[str, Any] | None = None
        self._open()

    @property
    def n_total(self) -> int:
        """Steps of all stages."""
        s = self.plan.request.settings
        return s.stage1_steps + len(self.plan.targets) * s.stage2_steps

    def go(self) -> dict[Target, ChannelMask]:
        """Learn, save and report; return the masks."""
        masks: dict[Target, ChannelMask] = {}
        try:
            if len(self.done) < len(self.plan.targets):
                self._learn()
            for target, state in zip(self.plan.targets, self.done, strict=True):
                masks[target] = self._mask(target, _best(state), state["stage1_loss"])
                self._write(target, masks[target])
            if self.folder is not None and self.world.rank == 0:
                np.save(self.folder.path / "alpha.npy", self._alpha())
            if self.plan.request.report and self.world.rank == 0:
                self._report(masks)
            self.world.wait()
        finally:
            if self.folder is not None:
                self.folder.close()
        return masks

    # ----------------------------------------------------------------------------------- learning

    def _learn(self) -> None:
        feed = self.plan.feed
        n_workers = workers_for(self.model.device)
        validation = Validation(
            self.model,
            feed.validation_batches(self.world, n_workers),
            world=self.world,
            cache_bytes=self._cache_bytes(),
        )
        batches, gradients = feed.batches(self.world, n_workers), Gradients(self.model)
        with contextlib.closing(batches):
            for i in range(len(self.done), len(self.plan.targets)):
                self._learn_one(i, batches, validation, gradients)

    def _learn_one(
        self, i: int, batches: Batches, validation: Validation, gradients: Gradients
    ) -> None:
        """Learn the mask of a target; stage 1 is that of the first."""
        target = self.plan.targets[i]
        learner = Learner(
            self.model,
            self.plan.settings_of(target),
            batches,
            validation,
            start=self._start() if i == 0 and self._state is None else None,
            world=self.world,
            gradients=gradients,
        )
        if self._state is not None:
            learner.load_state_dict(self._state)
            self._state = None
        try:
            if i > 0 and learner.n_done == 0:
                learner.skip_stage1(self.done[0]["stage1_alpha"])
            self._run_one(learner, target)
        except DivergedError as error:
            raise self._diverged(error, learner, target) from error
        self.done.append(learner.state_dict() | {"optimizer": None})
        self._save(None)
        mask = self._mask(target, learner.best, learner.stage1_loss)
        self._write(target, mask)  # now, since the next target may take long

    def _run_one(self, learner: Learner, target: Target) -> None:
        n1, n2 = learner.settings.stage1_steps, learner.settings.stage2_steps
        for step in learner.run():
            self.n_done = learner.n_done + len(self.done) * n2
            self._log(step, None if step.stage == 1 else target)
            n_saved = learner.n_done % _SAVE_STEPS == 0 or learner.n_done == n1
            if n_saved or time.monotonic() - self._saved_at > _SAVE_SECONDS:
                self._save(learner)
            if self.progress is not None and self.world.rank == 0:
                shown = None if step.stage == 1 else target
                self.progress(Event(step, shown, self.n_done, self.n_total))

    def _start(self) -> np.ndarray | None:
        if isinstance(self.plan.start, np.ndarray):
            return self.plan.start
        if self.plan.start == "ones":
            return None
        from leank.learning.scores import second_moments

        make = self.plan.feed.batches(self.world)
        n_batches = min(
            _START_BATCHES, len(self.plan.feed.train) // self.plan.feed.settings.batch_size
        )
        inputs = []
        for i in range(n_batches):
            batch = make(i).to(self.model.device)
            ids = torch.cat([batch.context, batch.span], 1)
            columns = torch.arange(ids.shape[1], device=ids.device)
            inputs.append((ids, columns >= batch.start[:, None]))
        scores = second_moments(self._whole, inputs, self.world)
        # Sizes span decades; what counts is the order within a layer.
        flat = scores.reshape(len(scores), -1)
        places = flat.argsort(1, kind="stable").argsort(1, kind="stable")
        return (0.5 + 0.5 * (places + 1) / flat.shape[1]).reshape(scores.shape)

    def _cache_bytes(self) -> int:
        given = self.plan.request.cache_bytes
        if given is not None:
            return given
        if self.model.device.type == "cuda":
            # K and V of the context are where their layers are, perhaps most of them on one device.
            return min(torch.cuda.mem_get_info(device)[0] for device in self.model.devices) // 4
        return 1 << 30

    def _diverged(self, error: DivergedError, learner: Learner, target: Target) -> DivergedError:
        """Save what is good so far: the best mask, or in stage 1 the one of the last factors."""
        best = learner.best
        if best is None and learner.n_done > 0:
            best = Best(learner.choose(), float("nan"), 1, learner.n_done - 1)
        if best is None:
            return DivergedError(f"{error}; there is no good mask yet")
        mask = self._mask(target, best, learner.stage1_loss, f"; then it diverged: {error}")
        path = self._write(target, mask)
        saved = f"; the last good mask is in {path}" if path is not None else ""
        new = DivergedError(f"{error}{saved}")
        new.mask = mask
        return new

    def _mask(
        self, target: Target, best: Best, stage1_loss: float | None, more: str = ""
    ) -> ChannelMask:
        first = "" if stage1_loss is None else f" (stage 1: {stage1_loss:.6g})"
        where = f"stage {best.stage}, step {best.step + 1}"  # people count from 1
        result = f"validation loss {best.loss:.6g} at {where}{first}"
        return self.plan.mask(target, best.keep, result + more)

    def _write(self, target: Target, mask: ChannelMask) -> Any:
        path = self.plan.outputs[target]
        if path is not None and self.world.rank == 0:
            mask.save(path)
        return path

    # ----------------------------------------------------------------------------- state and log

    def _open(self) -> None:
        """Open the folder and read the state, which every process needs."""
        if self.plan.folder is None:
            return
        r = self.plan.request
        folder = RunFolder(self.plan.folder, writes=self.world.rank == 0)
        state = folder.load()
        self.world.wait()  # until all have read it: the first process may remove it now
        if state is not None and r.resume:
            check_same(self.identity, state["identity"])
            self.done, self._state = state["done"], state["learner"]
            self.n_done = state["n_done"]
        elif state is not None and len(state["done"]) < state["n_targets"]:
            raise ResumeError(
                f"folder: {self.plan.folder} has a run that stopped after {state['n_done']} steps; "
                "go on with resume, or remove the folder"
            )
        folder.begin(state if r.resume else None, self._header())
        self.folder = folder

    def _header(self) -> dict[str, Any]:
        names = [
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            for device in self.model.devices
        ]
        return {
            "kind": "header",
            **({"command": self.command} if self.command else {}),
            "leank": leank.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "device": " + ".join(names),
            "processes": self.world.size,
            "name": self.plan.name,
            "n_total": self.n_total,
            **self.identity,
        }

    def _log(self, step: Step, target: Target | None) -> None:
        if self.folder is not None:
            pair = {} if target is None else target._asdict()
            self.folder.log(asdict(step) | pair | {"time": round(time.time(), 3)})

    def _save(self, learner: Learner | None) -> None:
        if self.folder is None:
            return
        self._saved_at = time.monotonic()
        self.folder.save(
            {
                "identity": self.identity,
                "n_targets": len(self.plan.targets),
                "n_done": self.n_done,
                "done": self.done,
                "learner": None if learner is None else learner.state_dict(),
            }
        )

    def _alpha(self) -> np.ndarray:
        """Return the factors that stage 1 of all targets ended with."""
        return self.done[0]["stage1_alpha"].numpy()

    # ----------------------------------------------------------------------------------- reporting

    def _report(self, masks: dict[Target, ChannelMask]) -> None:
        """Test the masks and write a report for each, into the folder or one of its own in it."""
        from leank.learning.report import write_report  # needs rich

        keeps = {str(target): mask.keep for target, mask in masks.items()}
        size = self.plan.feed.settings.batch_size
        self.evaluations = evaluate(
            self.model, keeps, self.plan.feed.test, batch_size=size, progress=self.tested
        )
        for i, (target, mask) in enumerate(masks.items()):
            folder, log = self.folder.path, self.folder.log_path
            if len(masks) > 1:
                folder = folder / str(target)
                loss = self.done[i]["stage1_loss"]
                log = self.folder.log_of(target._asdict(), loss, folder)
            others = [e for e in self.evaluations if e is not self.evaluations[i]]
            own_first = [self.evaluations[i], *others]
            write_report(folder, own_first, mask, log, self._alpha())


def _best(state: dict[str, Any]) -> Best:
    best = state["best"]
    return Best(**best | {"keep": best["keep"].numpy()})
