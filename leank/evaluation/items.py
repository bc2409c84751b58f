"""The items of an evaluation: RULER's tasks, those of `leank.learning.tasks`, and plain text.

Each is made from its own random generator, so item i of a task, a length and a seed is the same
whatever else is asked for. All contexts are of the test part of the text, from which no mask of
`leank learn` was learned; a second turn is of the validation part.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leank.evaluation import ruler
from leank.learning.data import Prompt, Samples, Written
from leank.learning.sample import Sample
from leank.learning.tasks import CONTINUATION, KINDS
from leank.learning.text import Corpus, DataError

# What is asked for unless told: RULER without the user's questions, recall, copy and text.
TASKS = (
    *(name for name in ruler.TASKS if name != ruler.QA),
    "lines",
    "table",
    "copy",
    CONTINUATION,
)
ALL_TASKS = (*ruler.TASKS, *KINDS, CONTINUATION)
_MORE_TOKENS = 16  # than those of the answer; RULER's tasks say their own number
_CONTINUED = 256  # tokens of text whose likelihood is measured, at most


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    task : str
        One of `ALL_TASKS`.
    length, index : int
        Tokens asked for, and its number among those of this task and length.
    sample : Sample
        Its context and its first `n_dense` tokens are read first, and densely, in one call.
    max_new_tokens : int
        Of an answer.
    depth : float, optional
        Share of the prompt before the needle, where there is one.
    """

    task: str
    length: int
    index: int
    sample: Sample
    max_new_tokens: int
    depth: float | None = None

    @property
    def prompt(self) -> np.ndarray:
        """Tokens up to the answer, [L] int64."""
        return np.concatenate([self.sample.context, self.sample.span[: self.sample.answer[0]]])

    @property
    def n_first(self) -> int:
        """Tokens of the first call."""
        return len(self.sample.context) + self.sample.n_dense


@dataclass(frozen=True)
class SuiteSettings:
    """Which items: the arguments of the command.

    Attributes
    ----------
    tasks : sequence of str
    lengths : sequence of int
        Tokens of an item, from the first of its context to the last that it may generate.
    n_items : int
        Of each task and length.
    seed : int
    second_turn : int
        Tokens of other text in a second call, before the question; 0: all is one call.
    """

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (4096,)
    n_items: int = 10
    seed: int = 0
    second_turn: int = 0

    def __post_init__(self) -> None:
        """Check them."""
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if not values or len(set(values)) < len(values):
                raise DataError(f"{name}: expected one or more, each once, got {list(values)}")
        for task in self.tasks:
            if task not in ALL_TASKS:
                raise DataError(f"tasks: expected some of {', '.join(ALL_TASKS)}, got {task!r}")
        for name, value, least in (
            ("lengths", min(self.lengths), 1),
            ("items", self.n_items, 1),
            ("seed", self.seed, 0),
            ("second-turn", self.second_turn, 0),
        ):
            if value < least:
                raise DataError(f"{name}: expected at least {least}, got {value}")
        if self.second_turn >= min(self.lengths):
            raise DataError(
                f"second-turn: expected less than the lengths, of which it is a part, got "
                f"{self.second_turn} of {min(self.lengths)}"
            )


class Suite(Sequence):
    """All items, the first of each task and length before the second ones.

    Parameters
    ----------
    settings : SuiteSettings
    corpus : Corpus
    tokenizer : transformers tokenizer
        A fast one.
    questions, documents : sequences
        For task "qa": what is asked, and the paragraphs of the user's text.

    Raises
    ------
    DataError
        If there is too little text, or no room for a task; found before anything is run.
    """

    def __init__(
        self,
        settings: SuiteSettings,
        corpus: Corpus,
        tokenizer: Any,
        *,
        questions: Sequence[ruler.Question] = (),
        documents: Sequence[str] = (),
    ) -> None:
        if (ruler.QA in settings.tasks) != bool(questions):
            got = "no file of questions" if ruler.QA in settings.tasks else "questions without it"
            raise DataError(f"qa: expected task qa and its questions together, got {got}")
        self.settings = settings
        self._places = [
            (task, length, i)
            for i in range(settings.n_items)
            for length in settings.lengths
            for task in settings.tasks
        ]
        options = {"n": settings.n_items, "seed": settings.seed}
        self._samples = {
            (task, length): Samples(
                corpus,
                "test",
                tokenizer,
                kinds=(task,),
                lengths=length - settings.second_turn,
                n_continued=max(1, min(_CONTINUED, (length - settings.second_turn) // 4)),
                **options,
            )
            for task in settings.tasks
            if task not in ruler.TASKS
            for length in settings.lengths
        }
        self._prompt = Prompt(tokenizer)
        self._chats = tokenizer.chat_template is not None
        special = [token for token in tokenizer.all_special_tokens if token]
        passages = [p for p in corpus.part("test") if not any(token in p for token in special)]
        words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", " ".join(passages))))
        sentences = [
            tuple(re.split(r"(?<=[.!?])\s+", " ".join(passage.split()))) for passage in passages
        ]
        self._source = ruler.Source(sentences, words, 0, documents, questions)
        self._turns = None
        if settings.second_turn:
            self._turns = Samples(
                corpus,
                "validation",
                tokenizer,
                kinds=(CONTINUATION,),
                lengths=settings.second_turn + len(self._prompt.first),
                n_continued=1,
                **options,
            )
        for i in range(len(settings.tasks) * len(settings.lengths)):
            self[i]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)

    def __getitem__(self, number: int) -> Item:
        """Make the item of a number from 0 on."""
        task, length, index = self._places[number]
        depth = None
        if task in ruler.TASKS:
            n_new = ruler.TASKS[task].max_new_tokens
            sample = self._ruler(task, length - self.settings.second_turn, index)
            if sample.needles:
                depth = sample.needles[0][0] / (len(sample.context) + sample.answer[0])
        else:
            sample = self._samples[task, length][index]
            n_new = sample.answer[1] - sample.answer[0] + _MORE_TOKENS
        if self._turns is not None:
            sample = self._second_turn(sample, index)
        elif task != CONTINUATION:
            # The question is a part of the prompt, which attends densely.
            sample = dataclasses.replace(sample, n_dense=sample.answer[0])
        return Item(task, length, index, sample, n_new, depth)

    def _second_turn(self, sample: Sample, index: int) -> Sample:
        """Put other text between context and span; all of it comes after the first call."""
        turn = self._turns[index]
        text = np.concatenate([turn.context, turn.span])[len(self._prompt.first) :]

        def later(pair: tuple[int, int]) -> tuple[int, int]:
            return pair[0] + len(text), pair[1] + len(text)

        return dataclasses.replace(
            sample,
            span=np.concatenate([text, sample.span]),
            answer=later(sample.answer),
            values=tuple(map(later, sample.values)),
        )

    # ------------------------------------------------------------------------------- RULER

    def _ruler(self, task: str, length: int, index: int) -> Sample:
        """Return the largest text that leaves room for the answer, as RULER does."""
        write, n_new = ruler.TASKS[task]
        source = self._source._replace(length=length)
        seed = [self.settings.seed, zlib.crc32(task.encode()), length, index]

        def made(size: int) -> tuple[ruler.Text, Written, np.ndarray, np.ndarray, int]:
            text = write(np.random.default_rng(seed), size, source)
            written = self._write(text)
            tokens, offsets = self._prompt.encode(written.text)
            # The answer's own tokens are in the room that is left for what is generated.
            n_prompt = int(np.searchsorted(offsets[:, 1], written.answer[0], side="right"))
            return text, written, tokens, offsets, n_prompt + len(self._prompt.before)

        size, best = 1, None
        too_large: int | None = None
        failed: DataError | None = (
            None  # why the size that is too large is so, if not for its length
        )
        while too_large is None or too_large - size > 1:
            tried = (
                size if best is None else 2 * size if too_large is None else (size + too_large) // 2
            )
            try:
                new, reason = made(tried), None
            except DataError as error:
                new, reason = None, error
            if new is None or new[-1] + n_new > length:
                too_large, failed = tried, reason
                if best is None:
                    break
            elif task == ruler.QA and tried > len(self._source.documents):
                best = new
                break  # there is no more text to add
            else:
                size, best = tried, new
        if failed is not None:
            raise failed
        if best is None:
            raise DataError(
                f"lengths: expected room for task {task} and {n_new} new tokens, got {length} "
                "tokens before a second turn"
            )
        text, written, tokens, offsets, _ = best
        return self._prompt.cut(task, text.values, written, tokens, offsets)

    def _write(self, text: ruler.Text) -> Written:
        """Put the parts of a text where they belong in a prompt with its answer."""
        opening, closing, cue = "", "", text.cue
        if self._chats:
            opening, closing, cue = self._prompt.opening, self._prompt.closing, cue.lstrip()
        whole = opening + text.context
        question = len(whole)
        whole += text.question + closing + cue
        first = len(whole)
        whole += text.answer
        values, end = [], first
        for value in text.values:
            # Of several accepted answers, only the first is written.
            if (begin := whole.find(value, end)) >= 0:
                end = begin + len(value)
                values.append((begin, end))
        needles = [] if text.needle is None else [tuple(len(opening) + x for x in text.needle)]
        return Written(whole, needles, question, (first, len(whole)), values)
