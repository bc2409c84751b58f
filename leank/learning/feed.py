"""The samples of one run: from which text, how long, and which of them a step reads."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from leank.learning.data import Samples
from leank.learning.parallel import World, local_size, share
from leank.learning.sample import Batch, Sample, collate
from leank.learning.tasks import ALL_KINDS, CONTINUATION
from leank.learning.text import Corpus, DataError, default_text, read_text, split

LONGEST = 8192  # tokens of the default lengths, at most: a longer context costs time and no mask
_TOGETHER = 8  # samples of one length in a test, which no other size of batches may change
_WORKERS, _AHEAD = 8, 4  # processes that make batches, and how many each makes in advance


@dataclass(frozen=True)
class DataSettings:
    """What to learn from.

    Attributes
    ----------
    lengths : int or (int, int), optional
        Tokens of the samples of a step, which are equally long: always so many, or spread over a
        range. Default: from twice the window (but at least 512) to the model's context (but at most
        8,192).
    batch_size : int
        Samples of a step, of all processes together.
    kinds : sequence of str
        Some of `leank.learning.tasks.ALL_KINDS`.
    weights : sequence of float, optional
        How often each kind is drawn, relative to the others; equally often by default.
    text : path or sequence of path
        UTF-8 text files; default: text that ships with Python.
    seed : int
    n_validation, n_test : int
        Samples to choose the best mask by, and for the report at the end.
    """

    lengths: int | tuple[int, int] | None = None
    batch_size: int = 8
    kinds: tuple[str, ...] = ALL_KINDS
    weights: tuple[float, ...] | None = None
    text: str | Path | tuple[str | Path, ...] = ()
    seed: int = 0
    n_validation: int = 64
    n_test: int = 64


class Feed:
    """The samples of a run; all that can be wrong with them is found here, before the work.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    settings : DataSettings
    n_steps : int
        Of both stages.
    window : int
        First and last tokens that keep all channels, together.
    context : int or None
        Most tokens that the model can read.

    Raises
    ------
    DataError
        If the samples cannot be made.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: DataSettings,
        *,
        n_steps: int,
        window: int,
        context: int | None,
    ) -> None:
        self.settings = settings
        for name in ("batch_size", "n_validation"):
            if getattr(settings, name) < 1:
                raise DataError(f"{name}: expected at least 1, got {getattr(settings, name)}")
        self.lengths = _lengths(settings.lengths, window, context)
        files = [settings.text] if isinstance(settings.text, str | Path) else settings.text
        self.corpus: Corpus = split(read_text(files) if files else default_text())
        common = {"kinds": settings.kinds, "weights": settings.weights, "lengths": self.lengths}
        common |= {"seed": settings.seed, "together": settings.batch_size}
        n_train = max(1, n_steps) * settings.batch_size
        self.train = Samples(self.corpus, "train", tokenizer, n=n_train, **common)
        common["together"] = _TOGETHER
        self.validation = Samples(
            self.corpus, "validation", tokenizer, n=settings.n_validation, **common
        )
        self.test: Sequence[Sample] = ()
        if settings.n_test > 0:
            # A continuation has no answer that could be right or wrong.
            kinds = [k for k in settings.kinds if k != CONTINUATION] or settings.kinds
            common |= {"kinds": kinds, "weights": None}
            self.test = Samples(self.corpus, "test", tokenizer, n=settings.n_test, **common)

    def batches(self, world: World, n_workers: int = 0) -> Batches:
        """Return the batches of all steps, each of a process's own samples.

        Parameters
        ----------
        world : World
        n_workers : int, default 0
            Processes that make batches in advance; 0: each is made when it is asked for.
        """
        size = self.settings.batch_size
        if size < world.size:
            raise DataError(
                f"batch_size: expected at least {world.size}, one per process, got {size}"
            )
        steps = range(0, len(self.train) - size + 1, size)
        own = [share(range(first, first + size), world) for first in steps]
        return Batches(self.train, own, n_workers)

    def validation_batches(self, world: World, n_workers: int = 0) -> list[Batch]:
        """Return a process's own of the validation's batches.

        n_workers : processes that make the samples; 0: this one
        """
        size = self.settings.batch_size
        starts = range(0, len(self.validation), size)
        # Of like lengths, so that there is little padding.
        n = len(self.validation)
        made = _made(self.validation.__getitem__, range(n), min(n_workers, n - 1))
        items = sorted(made, key=len)
        return [collate(items[start : start + size]) for start in share(starts, world)]


def workers_for(device: torch.device) -> int:
    """Return how many worker processes keep a device supplied.

    A GPU's step takes as long as one sample. Beside a step on the CPU, which takes seconds, samples
    cost nothing. The processes that learn together on a machine share its cores.
    """
    if device.type == "cpu" or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    there = getattr(os, "sched_getaffinity", None)  # the system may give us some of its cores only
    n_cores = len(there(0)) if there else os.cpu_count() or 1
    return max(1, min(_WORKERS, n_cores // local_size() - 1))


class Batches:
    """The batch of a step, when it is called with the step's number.

    Worker processes make those of the next steps in advance, as long as none is skipped.

    Parameters
    ----------
    samples : sequence of Sample
    own : list of sequences of int
        Which samples a step reads.
    n_workers : int
    """

    def __init__(
        self, samples: Sequence[Sample], own: Sequence[Sequence[int]], n_workers: int = 0
    ) -> None:
        self._samples, self._own, self._n_workers = samples, own, n_workers
        self._next = 0
        self._coming: Iterator[Batch] | None = None

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step.

        Raises
        ------
        DataError
            A sample cannot be made.
        """
        if self._n_workers == 0:
            return self._make(step)
        if self._coming is None or step != self._next:
            self.close()
            self._coming = _made(self._make, range(step, len(self._own)), self._n_workers)
        self._next = step + 1
        return next(self._coming)

    def close(self) -> None:
        """End the worker processes; they start again with the next batch that is asked for."""
        self._coming = None  # nobody else has it, and without it they end

    def _make(self, step: int) -> Batch:
        return collate([self._samples[i] for i in self._own[step]])


def _made(make: Callable[[int], Any], numbers: range, n_workers: int) -> Iterator[Any]:
    """Yield what `make` makes of numbers, in order; with workers, they make the next ones ahead.

    Workers are forked: a script that learns needs no ``if __name__ == "__main__"``, and what they
    read is in memory once.
    """
    if n_workers < 1:
        yield from map(make, numbers)
        return
    loader = DataLoader(
        _Things(make),
        batch_size=None,
        sampler=numbers,
        collate_fn=_as_it_is,
        num_workers=n_workers,
        multiprocessing_context="fork",
        prefetch_factor=_AHEAD,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    for thing in loader:
        if isinstance(thing, DataError):
            raise thing
        yield thing


class _Things(Dataset):
    """What a function makes; a DataError is returned, since a worker's comes with a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Any:
        try:
            return self._make(number)
        except DataError as error:
            return error


def _as_it_is(thing: Any) -> Any:
    return thing


def _lengths(
    given: int | tuple[int, int] | None, window: int, context: int | None
) -> tuple[int, int]:
    if given is None:
        greatest = min(LONGEST, context or LONGEST)
        lengths = min(max(512, 2 * window), greatest), greatest
    else:
        lengths = (given, given) if isinstance(given, int) else tuple(given)
    if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
        raise DataError(f"lengths: expected 1 <= least <= greatest, got {given}")
    if context is not None and lengths[1] > context:
        raise DataError(
            f"lengths: expected at most {context:,} tokens, the model's context, got {lengths[1]:,}"
        )
    if lengths[0] <= window:
        raise DataError(
            f"lengths: expected more than the {window:,} tokens of the window, sink and recent, "
            f"got {lengths[0]:,}; nothing outside it would be left to learn from"
        )
    return lengths
