"""Making samples: a long context, then a short span with the answer.

Each sample is made from its own random generator, so sample i of a seed is the same in every
process, in any order, and after a restart. The tokens are those of the whole string, cut once into
context and span; pieces are never tokenized apart, since that gives other tokens at their borders.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .sample import Sample
from .tasks import ALL_KINDS, CONTINUATION, KINDS, Puzzle, check_kinds
from .text import PARTS, Corpus, DataError

_MARK = "<<the text and the question>>"
_RUN = 8  # consecutive passages in a haystack, at most; several in a row read like a document
_TRIES = 30  # draws of a puzzle until it fits and its values are not in the text by chance
_FITS = 6  # times that the text is cut anew to meet a length; two are the rule
_CHARACTERS = 4  # per token, as tasks.py assumes it


class Samples(Sequence):
    """The n samples of a part, a seed and these options; made when they are asked for.

    Parameters
    ----------
    corpus : Corpus
    part : {"train", "validation", "test"}
        The part of the corpus that contexts are made of. It also enters the random numbers.
    tokenizer : transformers tokenizer
        A fast one. If it has a chat template, text and question are the user's turn, without its
        thinking where it can be told so. Else the prompt is "Question: ... Answer: ...".
    kinds : sequence of str
        Some of `leank.learning.tasks.ALL_KINDS`.
    weights : sequence of float, optional
        How often each kind is drawn, relative to the others; equally often by default.
    lengths : int or (int, int)
        Tokens of context and span: always so many, or drawn log-uniformly from a range with both
        ends. A sample may be a token or two shorter where no cut of its text gives exactly these.
    together : int, default 1
        So many samples after each other are equally long, as those of a batch should be.
    n : int
    seed : int
    n_continued : int, default 64
        Tokens of the span of a continuation; at most half of the sample.

    Raises
    ------
    DataError
        If an argument is not as expected, the text is too short for the greatest length, or the
        least length too short for a question.
    """

    def __init__(
        self,
        corpus: Corpus,
        part: str,
        tokenizer: Any,
        *,
        kinds: Sequence[str] = ALL_KINDS,
        weights: Sequence[float] | None = None,
        lengths: int | tuple[int, int] = (512, 4096),
        together: int = 1,
        n: int = 1,
        seed: int = 0,
        n_continued: int = 64,
    ):
        passages = corpus.part(part)
        check_kinds(kinds)
        self.kinds = tuple(kinds)
        self.shares = _shares(self.kinds, weights)
        self.lengths = _range(lengths)
        for name, value, least in (
            ("together", together, 1),
            ("n", n, 1),
            ("seed", seed, 0),
            ("n_continued", n_continued, 1),
        ):
            if not isinstance(value, int | np.integer) or value < least:
                raise DataError(f"{name}: expected an integer from {least} on, got {value!r}")
        self.part, self.together, self.n = part, int(together), int(n)
        self.seed, self.n_continued = int(seed), int(n_continued)
        self.prompt = Prompt(tokenizer)
        # "</s>" in a text would become the end of a sequence.
        special = [token for token in tokenizer.all_special_tokens if token]
        self.passages = [p for p in passages if not any(token in p for token in special)]
        self._check_text()
        self._check_least()

    def __len__(self) -> int:
        """Return n."""
        return self.n

    def __getitem__(self, index: int) -> Sample:
        """Make the sample of an index from 0 to n - 1."""
        if not 0 <= index < self.n:
            raise IndexError(f"index: expected 0 to {self.n - 1}, got {index}")
        source = self.seed, PARTS.index(self.part)
        low, high = self.lengths
        drawn = np.random.default_rng([*source, index // self.together, 1])
        length = int(math.exp(drawn.uniform(math.log(low), math.log(high + 1))))
        length = min(max(length, low), high)  # rounding of exp and log
        rng = np.random.default_rng([*source, index])
        kind = self.kinds[int(rng.choice(len(self.kinds), p=self.shares))]
        if kind == CONTINUATION:
            return self._continuation(rng, length)
        return self._needles(rng, kind, length)

    # ------------------------------------------------------------------------------- checks

    def _check_text(self) -> None:
        if len(self.passages) < 2:
            raise DataError(
                f"text: expected 2 passages or more in part {self.part!r}, got {len(self.passages)}"
            )
        n_characters = sum(map(len, self.passages))
        probe = "\n\n".join(self.passages[:32])
        self.characters_per_token = len(probe) / max(1, len(self.prompt.encode(probe)[0]))
        n_tokens = int(0.8 * n_characters / self.characters_per_token)  # passages differ
        if n_tokens < self.lengths[1]:
            raise DataError(
                f"lengths: expected at most {n_tokens:,} tokens, since part {self.part!r} of the "
                f"text has hardly more, got {self.lengths[1]:,}; give more text"
            )

    def _check_least(self) -> None:
        """Find out before the work whether each kind fits into the least length."""
        low = self.lengths[0]
        if self.n_continued > low // 2 and CONTINUATION in self.kinds:
            raise DataError(
                f"lengths: expected at least {2 * self.n_continued} tokens for a continuation of "
                f"{self.n_continued}, got {low}"
            )
        for kind in self.kinds:
            if kind != CONTINUATION:
                self._puzzle(np.random.default_rng(0), kind, low, self.passages[0], "")

    # ------------------------------------------------------------------------------- making

    def _continuation(self, rng: np.random.Generator, length: int) -> Sample:
        n_text = length - len(self.prompt.first)
        ids, _, _ = self._text(rng, n_text, [])
        start = int(rng.integers(len(ids) - n_text + 1))
        ids = np.concatenate([self.prompt.first, ids[start : start + n_text]])
        context, span = ids[: -self.n_continued], ids[-self.n_continued :]
        expected = (self.prompt.tokenizer.decode(span.tolist()),)
        whole = 0, len(span)
        return Sample(CONTINUATION, context, span, whole, expected, (), (whole,))

    def _needles(self, rng: np.random.Generator, kind: str, length: int) -> Sample:
        other = int(rng.integers(len(self.passages)))
        _, ends, text = self._text(rng, length, [other])
        puzzle, n_other = self._puzzle(rng, kind, length, self.passages[other], text)
        depths = rng.random(len(puzzle.needles))
        depths = np.sort(depths) if puzzle.in_order else depths
        # Tokens of the text join with those of needles, so the first guess may be some tokens off.
        n_text, best = length - n_other, None
        for _ in range(_FITS):
            cut = int(ends[n_text - 1]) if n_text > 0 else 0
            written = self.prompt.write(text[:cut], puzzle, depths)
            tokens, offsets = self.prompt.encode(written.text)
            excess = len(tokens) + len(self.prompt.before) - length
            if excess <= 0 and (best is None or len(tokens) > len(best[1])):
                best = written, tokens, offsets
            if excess == 0 or (excess > 0 and n_text <= 0):
                break
            n_text = min(max(0, n_text - excess), len(ends))
        if best is None:
            raise DataError(
                f"lengths: expected room for the question of kind {kind!r} and some text, got "
                f"{length} tokens"
            )
        return self.prompt.cut(kind, puzzle.values, *best)

    def _text(
        self, rng: np.random.Generator, n_tokens: int, used: list[int]
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Return at least n tokens of text, where each ends in the text, and the text.

        It is made of runs of passages that are neighbours in the corpus, none of them twice and
        none of `used`.
        """
        free = np.ones(len(self.passages), bool)
        free[used] = False
        pieces: list[str] = []
        n_characters, wanted = 0, 1.1 * n_tokens * self.characters_per_token
        while True:
            while n_characters < wanted and free.any():
                start = int(rng.choice(np.flatnonzero(free)))
                stop = start + int(rng.integers(1, _RUN + 1))
                for i in (start + np.flatnonzero(free[start:stop])).tolist():
                    pieces.append(self.passages[i])
                    n_characters += len(self.passages[i]) + 2
                    free[i] = False
            text = "\n\n".join(pieces)
            ids, offsets = self.prompt.encode(text)
            if len(ids) >= n_tokens:
                return ids, offsets[:, 1], text
            if not free.any():
                raise DataError(
                    f"text: expected {n_tokens:,} tokens in part {self.part!r}, got {len(ids):,}"
                )
            wanted = 1.2 * max(wanted, n_characters)

    def _puzzle(
        self, rng: np.random.Generator, kind: str, length: int, other: str, text: str
    ) -> tuple[Puzzle, int]:
        """Draw a puzzle that fits, with values that are not in the text; and count its tokens."""
        text = text.casefold()
        scale = self.characters_per_token / _CHARACTERS
        n_least = None
        for _ in range(_TRIES):
            puzzle = KINDS[kind](rng, int(length * scale), other)
            alone = self.prompt.write("", puzzle, np.zeros(len(puzzle.needles)))
            n_tokens = len(self.prompt.encode(alone.text)[0]) + len(self.prompt.before)
            n_least = n_tokens if n_least is None else min(n_least, n_tokens)
            if n_tokens <= length and not any(v.casefold() in text for v in puzzle.values):
                return puzzle, n_tokens
        if n_least <= length:
            raise DataError(f"text: expected none with the values of a puzzle, got {puzzle.values}")
        raise DataError(
            f"lengths: expected at least {n_least} tokens for a question of kind {kind!r}, got "
            f"{length}"
        )


def samples(corpus: Corpus, part: str, tokenizer: Any, **options: Any) -> Samples:
    """Return ``Samples(corpus, part, tokenizer, **options)``, a sequence of samples."""
    return Samples(corpus, part, tokenizer, **options)


# ------------------------------------------------------------------------------------ prompts


class Written(NamedTuple):
    """A prompt with its answer, as a string, and where its parts are in it."""

    text: str
    needles: list[tuple[int, int]]
    question: int
    answer: tuple[int, int]
    values: list[tuple[int, int]]


class Prompt:
    """How text, question and answer become one string, and this string tokens."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                "tokenizer: expected a fast one, which says where tokens are in the text, got "
                f"{type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        # What is put before a text, like <s>. A chat template writes it itself.
        alone, whole = self.encode("a")[0].tolist(), tokenizer("a").input_ids
        n_first = len(whole) - len(alone)
        while n_first > 0 and whole[n_first : n_first + len(alone)] != alone:
            n_first -= 1
        self.first = np.array(whole[:n_first], np.int64)
        if tokenizer.chat_template is None:
            self.before, self.opening, self.closing = self.first, "", "\nAnswer: "
            self.asks = "Question: "
            return
        chat = _chat(tokenizer)
        self.before = self.first[:0]
        self.opening, self.closing = chat.split(_MARK)
        self.asks = ""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [T] without added special ones, and where each is in the text, [T, 2]."""
        # verbose: the tokenizer would warn of texts longer than its model's context.
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        return np.array(encoded["input_ids"], np.int64), offsets

    def write(self, text: str, puzzle: Puzzle, depths: np.ndarray) -> Written:
        """Hide each needle after a line of the text, at its share of the way through."""
        places = []
        for depth in depths.tolist():
            line_end = text.find("\n", int(depth * len(text)))
            places.append(len(text) if line_end < 0 else line_end)
        whole, needles, done = self.opening, [(0, 0)] * len(places), 0
        for i in sorted(range(len(places)), key=places.__getitem__):
            whole += text[done : places[i]]
            whole += "\n" if len(whole) > len(self.opening) else ""
            done = places[i]
            needles[i] = len(whole), len(whole) + len(puzzle.needles[i])
            whole += puzzle.needles[i]
        whole += text[done:] + "\n\n"
        question = len(whole)
        whole += self.asks + puzzle.question + self.closing + puzzle.cue
        whole += " " if puzzle.cue[-1:].isalnum() or puzzle.cue.endswith(":") else ""
        answer = len(whole), len(whole) + len(puzzle.answer)
        whole += puzzle.answer
        values, end = [], answer[0]
        for value in puzzle.values:  # in the order of the answer
            begin = whole.index(value, end)
            end = begin + len(value)
            values.append((begin, end))
        return Written(whole, needles, question, answer, values)

    def cut(
        self,
        kind: str,
        expected: tuple[str, ...],
        written: Written,
        tokens: np.ndarray,
        offsets: np.ndarray,
    ) -> Sample:
        """Cut tokens where the question begins, and find answer, values and needles among them."""
        starts, stops = offsets[:, 0].tolist(), offsets[:, 1].tolist()

        def among(a: int, b: int) -> tuple[int, int]:
            """Return the range of tokens that have a character of the range a to b."""
            return bisect.bisect_right(stops, a), bisect.bisect_left(starts, b)

        border = bisect.bisect_left(starts, written.question)
        first, stop = among(*written.answer)
        n_before = len(self.before)
        return Sample(
            kind=kind,
            context=np.concatenate([self.before, tokens[:border]]),
            span=tokens[border:],
            answer=(first - border, stop - border),
            expected=expected,
            needles=tuple(
                (a + n_before, b + n_before)
                for a, b in (among(*needle) for needle in written.needles)
            ),
            values=tuple(
                (a - border, b - border) for a, b in (among(*value) for value in written.values)
            ),
        )


def _chat(tokenizer: Any) -> str:
    """Return a chat with a mark where the user speaks, up to where the model answers."""
    message = {"role": "user", "content": _MARK}
    # Templates ignore names that they do not know. Qwen3 would think first; Llama 3 would write
    # today's date, and no two days would see the same sample.
    chat = tokenizer.apply_chat_template(
        [message],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    if chat.count(_MARK) != 1:
        raise DataError(
            "tokenizer: expected a chat template that writes the user's words as they are, once, "
            f"got {chat!r}"
        )
    return chat


def _shares(kinds: tuple[str, ...], weights: Sequence[float] | None) -> np.ndarray:
    values = np.ones(len(kinds)) if weights is None else np.array(weights, np.float64)
    if values.shape != (len(kinds),) or not (values >= 0).all() or not 0 < values.sum() < np.inf:
        raise DataError(
            f"weights: expected {len(kinds)} numbers from 0 on, not all 0, got {weights}"
        )
    return values / values.sum()


def _range(lengths: int | tuple[int, int]) -> tuple[int, int]:
    pair = (lengths, lengths) if isinstance(lengths, int | np.integer) else tuple(lengths)
    if len(pair) != 2 or not all(isinstance(x, int | np.integer) for x in pair):
        raise DataError(f"lengths: expected an integer or two, got {lengths!r}")
    if not 1 <= pair[0] <= pair[1]:
        raise DataError(f"lengths: expected 1 <= least <= greatest, got {lengths!r}")
    return int(pair[0]), int(pair[1])
