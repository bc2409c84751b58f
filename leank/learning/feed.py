"""The samples of one run: from which text, how long, and which of them a step reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leank.learning.data import Batch, Sample, Samples, collate
from leank.learning.parallel import World, share
from leank.learning.tasks import ALL_KINDS, CONTINUATION
from leank.learning.text import Corpus, DataError, default_text, read_text, split

LONGEST = 8192  # tokens of the default lengths, at most: a longer context costs time and no mask
_AHEAD = 4  # batches that are made before they are asked for


@dataclass(frozen=True)
class DataSettings:
    """What to learn from.

    Attributes
    ----------
    lengths : int or (int, int), optional
        Tokens of a sample: always so many, or spread over a range. Default: from twice the window
        (but at least 512) to the model's context (but at most 8,192).
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
    batch_size: int = 4
    kinds: tuple[str, ...] = ALL_KINDS
    weights: tuple[float, ...] | None = None
    text: str | Path | tuple[str | Path, ...] = ()
    seed: int = 0
    n_validation: int = 32
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
        common["seed"] = settings.seed
        n_train = max(1, n_steps) * settings.batch_size
        self.train = Samples(self.corpus, "train", tokenizer, n=n_train, **common)
        self.validation = Samples(
            self.corpus, "validation", tokenizer, n=settings.n_validation, **common
        )
        self.test: Sequence[Sample] = ()
        if settings.n_test > 0:
            # A continuation has no answer that could be right or wrong.
            kinds = [k for k in settings.kinds if k != CONTINUATION] or settings.kinds
            common |= {"kinds": kinds, "weights": None}
            self.test = Samples(self.corpus, "test", tokenizer, n=settings.n_test, **common)

    def batches(self, world: World) -> Callable[[int], Batch]:
        """Return what makes the batch of a step, of a process's own samples."""
        size = self.settings.batch_size
        if size < world.size:
            raise DataError(
                f"batch_size: expected at least {world.size}, one per process, got {size}"
            )
        n_steps = len(self.train) // size

        def make(step: int) -> Batch:
            items = share(range(step * size, (step + 1) * size), world)
            return collate([self.train[i] for i in items])

        return _Ahead(make, n_steps)

    def validation_batches(self, world: World) -> list[Batch]:
        """Return a process's own of the validation's batches."""
        size = self.settings.batch_size
        starts = range(0, len(self.validation), size)
        # Of like lengths, so that there is little padding.
        items = sorted(self.validation, key=len)
        return [collate(items[start : start + size]) for start in share(starts, world)]


class _Ahead:
    """Makes batches in threads before they are asked for, since it takes as long as a GPU's step.

    The tokenizers leave Python's lock while they work.
    """

    def __init__(self, make: Callable[[int], Batch], n: int) -> None:
        self._make, self._n = make, n
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        if self._pool is None:
            n_threads = max(1, min(_AHEAD, (os.cpu_count() or 1) // 2))
            self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="leank-data")
        wanted = range(step, min(step + _AHEAD, self._n))
        for i in [i for i in self._coming if i not in wanted]:
            self._coming.pop(i).cancel()
        for i in wanted:
            if i not in self._coming:
                self._coming[i] = self._pool.submit(self._make, i)
        return self._coming.pop(step).result()


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
