"""The tasks of RULER (arXiv 2404.06654), by the templates and settings of its code.

A task is a function of a random generator, a size and a source of words; it writes a text with what
is hidden in it, a question and an answer. The size counts what the text is made of, lines, words or
documents, so that items.py can meet a length. What differs from RULER, whose data are downloads:
essays, words and documents come from the text of the run, and words of the needles from the lists
in `leank.learning.tasks`.
"""

from __future__ import annotations

import json
import math
import string
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from leank.learning.tasks import ADJECTIVES, NOUNS
from leank.learning.text import DataError

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {what} for {key} is: {value}."
_SHORT = 4096  # tokens; below, RULER repeats common words less
_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
_ALPHA, _CODED = 2.0, 6  # of coded words: the zeta distribution, letters


class Text(NamedTuple):
    """What a task writes; `context`, `question` and `cue` follow each other.

    Attributes
    ----------
    context : str
        The task, and the text in which something is hidden.
    question : str
    cue : str
        How the answer begins; given.
    answer : str
        What the model should say.
    values : tuple of str
        What the answer must contain, in its order.
    needle : (int, int), optional
        Characters of the hidden text in `context`, where there is one.
    """

    context: str
    question: str
    cue: str
    answer: str
    values: tuple[str, ...]
    needle: tuple[int, int] | None = None


class Question(NamedTuple):
    """A question about a text of the user: accepted answers, and the paragraphs with the answer."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]


class Source(NamedTuple):
    """What tasks are made of.

    Attributes
    ----------
    sentences : sequence of tuples of str
        Of each passage of the text.
    words : sequence of str
        Different ones, for lists.
    length : int
        Tokens that an item should have.
    documents : sequence of str
        Paragraphs among which those with an answer are put.
    questions : sequence of Question
    """

    sentences: Sequence[tuple[str, ...]]
    words: Sequence[str]
    length: int
    documents: Sequence[str] = ()
    questions: Sequence[Question] = ()


Write = Callable[[np.random.Generator, int, Source], Text]


class Task(NamedTuple):
    """How a text is written, and how many tokens RULER lets a model answer."""

    write: Write
    max_new_tokens: int


# ------------------------------------------------------------------------------------ needles


def _needles(
    rng: np.random.Generator,
    size: int,
    source: Source,
    *,
    haystack: str,
    keys: str = "words",
    values: str = "numbers",
    n_keys: int = 1,
    n_values: int = 1,
    n_asked: int = 1,
) -> Text:
    """Hide needles in noise, sentences of the text, or other needles; `size` counts these."""
    n_keys = max(n_keys, n_asked)
    names = _different(rng, n_keys, keys)
    # All values differ, so that the place of each in an answer is known.
    drawn = np.array(_different(rng, n_keys * n_values, values)).reshape(n_keys, n_values)
    needles = [
        (_NEEDLE.format(what=values, key=names[i], value=value), (i, j))
        for i in range(n_keys)
        for j, value in enumerate(drawn[i].tolist())
    ]
    needles = [needles[i] for i in rng.permutation(len(needles))]
    asked = rng.choice(n_keys, n_asked, replace=False).tolist()
    if haystack == "essay":
        lines, joint = _sentences(rng, size, source), " "
        depths = np.sort(rng.choice(_DEPTHS, len(needles), replace=False))
        places = (len(lines) * depths // 100).tolist()
    else:
        joint = "\n"
        size = max(size, len(needles))
        lines = [_NOISE] * size
        if haystack == "needle":
            lines = [
                _NEEDLE.format(what=values, key=key, value=value)
                for key, value in zip(
                    _drawn(rng, size, keys, names), _drawn(rng, size, values), strict=True
                )
            ]
        places = sorted(rng.choice(size, len(needles), replace=False).tolist())
    one = n_asked * n_values == 1
    what = values[:-1] if one else values
    some, are, were = ("A", "is", "is") if one else ("Some", "are", "are all")
    head = (
        f"{some} special magic {what} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {what} afterwards.\n"
    )
    context, begins = _hide(head, lines, [needle for needle, _ in needles], places, joint)
    query = ", and ".join(filter(None, [", ".join(names[i] for i in asked[:-1]), names[asked[-1]]]))
    wanted = tuple(drawn[asked].reshape(-1).tolist())
    needle = None
    if one:
        which = [of for _, of in needles].index((asked[0], 0))
        needle = begins[which], begins[which] + len(needles[which][0])
    return Text(
        context,
        f"\nWhat {were} the special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text {are}",
        " " + ", ".join(wanted),
        wanted,
        needle,
    )


def _hide(
    head: str, lines: Sequence[str], needles: Sequence[str], places: Sequence[int], joint: str
) -> tuple[str, list[int]]:
    """Put needles before the lines of these numbers; return the text, and where each begins."""
    pieces, last = [], 0
    needle_at = []
    for needle, place in zip(needles, places, strict=True):
        pieces += lines[last:place]
        needle_at.append(len(pieces))
        pieces.append(needle)
        last = place
    pieces += lines[last:]
    begins = np.cumsum([len(head), *(len(piece) + len(joint) for piece in pieces)])
    return head + joint.join(pieces), begins[needle_at].tolist()


def _sentences(rng: np.random.Generator, size: int, source: Source) -> list[str]:
    """Return so many sentences; as in RULER, a text that is too short comes again."""
    order, lines = rng.permutation(len(source.sentences)), []
    while len(lines) < size:
        for i in order.tolist():
            lines += source.sentences[i]
            if len(lines) >= size:
                break
    return lines[:size]


def _drawn(rng: np.random.Generator, n: int, kind: str, without: Sequence[str] = ()) -> list[str]:
    """Draw n words, numbers or uuids, none of them in `without`."""
    found: list[str] = []
    while len(found) < n:
        if kind == "numbers":
            new = str(rng.integers(10**6, 10**7))
        elif kind == "words":
            new = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
        else:
            new = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if new not in without:
            found.append(new)
    return found


def _different(rng: np.random.Generator, n: int, kind: str) -> list[str]:
    found: list[str] = []
    while len(found) < n:
        found += _drawn(rng, 1, kind, found)
    return found


# -------------------------------------------------------------------------- variables and words


def _variables(rng: np.random.Generator, size: int, source: Source) -> Text:
    """Hide one chain of 4 assignments in noise, after an example with an answer."""
    example = _chain(rng, 5, 3)
    asked = _chain(rng, max(size, 5), 5)
    context = f"{example.context}{example.question}{example.cue}{example.answer}\n\n{asked.context}"
    return asked._replace(context=context)


def _chain(rng: np.random.Generator, size: int, n_letters: int) -> Text:
    n_hops = 4
    letters = np.array(list(string.ascii_uppercase))
    names: list[str] = []
    while len(names) <= n_hops:
        name = "".join(rng.choice(letters, n_letters))
        names += [name] * (name not in names)
    value = str(rng.integers(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {b} = VAR {a}" for a, b in zip(names[:-1], names[1:], strict=True)]
    places = sorted(rng.choice(size, len(chain), replace=False).tolist())
    head = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    context, _ = _hide(head, [_NOISE] * size, chain, places, "\n")
    return Text(
        context,
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        " " + " ".join(names),
        tuple(names),
    )


def _common_words(rng: np.random.Generator, size: int, source: Source) -> Text:
    """Write a list of `size` words of which 10 come more often, after an example."""
    short = source.length < _SHORT
    example = _word_list(rng, 20 if short else 40, source, *((3, 1) if short else (10, 3)))
    asked = _word_list(rng, max(size, 11), source, *((6, 1) if short else (30, 3)))
    context = f"{example.context}{example.question}{example.cue}{example.answer}\n{asked.context}"
    return asked._replace(context=context)


def _word_list(
    rng: np.random.Generator, size: int, source: Source, n_common: int, n_other: int
) -> Text:
    if size > len(source.words):
        raise DataError(
            f"text: expected at least {size:,} different words for task cwe, got "
            f"{len(source.words):,}"
        )
    words = [source.words[i] for i in rng.choice(len(source.words), size, replace=False)]
    common = words[:10]
    whole = common * n_common + words[10:] * n_other
    shuffled = [whole[i] for i in rng.permutation(len(whole))]
    return Text(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n" + _numbered(shuffled),
        "\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        " " + _numbered(common),
        tuple(common),
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _frequent_words(rng: np.random.Generator, size: int, source: Source) -> Text:
    """Write about `size` coded words, each as often as the zeta distribution says of its rank."""
    letters = np.array(list(string.ascii_lowercase))
    n_words = max(source.length // 50, 4)
    words: list[str] = list(
        dict.fromkeys("".join(rng.choice(letters, _CODED)) for _ in range(2 * n_words))
    )[:n_words]
    words[0] = "..."  # the first is noise, which the question says to ignore
    zeta = math.pi**2 / 6  # of _ALPHA
    counts = (size * np.arange(1, n_words + 1) ** -_ALPHA / zeta).astype(int)
    if not counts[1] > counts[2] > counts[3] > counts[4:5].sum():
        counts[1:4] += np.arange(3, 0, -1)  # too few words to tell which are the most frequent
    coded = np.repeat(words, counts)
    asked = tuple(words[1:4])
    return Text(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(rng.permutation(coded).tolist())}",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        " " + ", ".join(asked),
        asked,
    )


# -------------------------------------------------------------------------- question answering


def _answers(rng: np.random.Generator, size: int, source: Source) -> Text:
    """Ask one of the user's questions about documents, some of which have the answer."""
    asked = source.questions[int(rng.integers(len(source.questions)))]
    others = [document for document in source.documents if document not in asked.gold]
    n_others = min(max(0, size - len(asked.gold)), len(others))
    chosen = [others[i] for i in rng.choice(len(others), n_others, replace=False)]
    documents = [*asked.gold, *chosen]
    documents = [documents[i] for i in rng.permutation(len(documents))]
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words.\n\n"
    )
    listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
    return Text(
        f"{task}The following are given documents.\n\n{listed}",
        f"\n\n{task}Question: {asked.question}",
        " Answer:",
        f" {asked.answers[0]}",
        asked.answers,
    )


def read_questions(path: Path, documents: Sequence[str]) -> tuple[Question, ...]:
    """Read questions about documents from a JSON-lines file.

    Parameters
    ----------
    path : path
        Each line has ``question``, and ``answers``, which are accepted. ``evidence`` is a part of
        the paragraph that tells the answer; default: the first answer.
    documents : sequence of str
        Paragraphs of the text.

    Raises
    ------
    DataError
        A line is not so, or no paragraph has the evidence; the message names the line.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"qa: expected a UTF-8 file, got {path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"qa: {path}, line {number}"
        try:
            record = json.loads(line)
            question, answers = record["question"], record["answers"]
            evidence = record.get("evidence", answers[0])
            right = all(isinstance(x, str) and x for x in (question, evidence, *answers))
        except (ValueError, LookupError, TypeError, AttributeError):
            right = False
        if not right or isinstance(answers, str):
            raise DataError(
                f'{where}: expected {{"question": "...", "answers": ["...", ...]}}, got {line[:60]}'
            )
        gold = tuple(d for d in documents if evidence.casefold() in d.casefold())
        if not gold:
            raise DataError(f"{where}: expected a paragraph with {evidence!r}, got none")
        questions.append(Question(question, tuple(answers), gold))
    if not questions:
        raise DataError(f"qa: expected at least one question, got none in {path}")
    return tuple(questions)


QA = "qa"
TASKS: dict[str, Task] = {
    "niah_single_1": Task(partial(_needles, haystack="noise"), 128),
    "niah_single_2": Task(partial(_needles, haystack="essay"), 128),
    "niah_single_3": Task(partial(_needles, haystack="essay", values="uuids"), 128),
    "niah_multikey_1": Task(partial(_needles, haystack="essay", n_keys=4), 128),
    "niah_multikey_2": Task(partial(_needles, haystack="needle"), 128),
    "niah_multikey_3": Task(
        partial(_needles, haystack="needle", keys="uuids", values="uuids"), 128
    ),
    "niah_multivalue": Task(partial(_needles, haystack="essay", n_values=4), 128),
    "niah_multiquery": Task(partial(_needles, haystack="essay", n_asked=4), 128),
    "vt": Task(_variables, 30),
    "cwe": Task(_common_words, 120),
    "fwe": Task(_frequent_words, 50),
    QA: Task(_answers, 32),
}


def score(task: str, said: str, values: Sequence[str]) -> float:
    """Score an answer as RULER does: the share of values in it, case aside; for qa, any of them.

    Examples
    --------
    >>> score("niah_multivalue", "They are 4711 and 42.", ["4711", "1984"])
    0.5
    >>> score("qa", "In Paris.", ["Paris", "the French capital"])
    1.0
    """
    found = [value.casefold() in said.casefold() for value in values]
    return float(any(found)) if task == QA else sum(found) / len(found)
