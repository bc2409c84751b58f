"""The kinds of task: what is hidden in a text, what is asked about it, and how answers are scored.

A kind is a small function of a random generator. It makes a `Puzzle` of strings; data.py hides its
needles in text and counts tokens. Wording comes from several templates per kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .text import DataError

ADJECTIVES = """amber ancient blue brave bright broken calm clever copper cosmic crimson curious
dusty early eager electric empty fading fierce frozen gentle golden grand green hidden hollow humble
icy iron ivory jolly lazy little lonely lucky marble mellow misty modern narrow noble northern olive
orange patient plain polite proud purple quick quiet rapid rusty scarlet secret sharp shy silent
silver simple sleepy slow small smooth southern spare steady stormy sunny swift tall tiny velvet
violet wandering warm western white wild wise wooden yellow young""".split()
NOUNS = """anchor apple arrow badger basket beacon bell bicycle bottle bridge button camel candle
canyon castle cedar chimney cloud compass cricket desert dolphin donkey dragon drum eagle engine
falcon feather fiddle forest fountain garden glacier guitar hammer harbor heron island jacket kettle
ladder lantern lemon lizard meadow mirror mountain needle oak orchard otter owl paddle palace parrot
pebble pencil piano pigeon planet pocket pony rabbit raven river rocket saddle sailor salmon scarf
shadow spider spoon stone sparrow teapot temple thunder tiger tower train trumpet tunnel turtle
valley violin wagon walnut whistle willow window wizard wolf zebra""".split()


class Puzzle(NamedTuple):
    """What one task hides and asks, as strings.

    Attributes
    ----------
    needles : tuple of str
        Texts to hide at places of their own; one may have several lines.
    question : str
        What is asked after the text.
    cue : str
        How the answer begins; given, not to be learned. May be empty. A space follows where it ends
        with a letter, a digit or a colon.
    values : tuple of str
        What the answer must contain, in order.
    answer : str
        What the model should say after the cue.
    in_order : bool
        Whether the needles keep their order in the text.
    """

    needles: tuple[str, ...]
    question: str
    cue: str
    values: tuple[str, ...]
    answer: str
    in_order: bool = False


Kind = Callable[[np.random.Generator, int, str], Puzzle]


def single(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide one fact; `room` and `other` are the tokens at hand and a passage of other text."""
    return _facts(rng, n=1, n_asked=1)


def multi_key(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide 4 to 12 facts of one wording and ask for one."""
    return _facts(rng, n=_count(rng, 4, 12, room, 24), n_asked=1)


def words(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide 1 to 6 facts whose values are words, and ask for one."""
    n = _count(rng, 1, 6, room, 20)
    keys, values = _keys(rng, n), rng.choice(NOUNS, n, replace=False).tolist()
    template, question, cue = _pick(
        rng,
        [
            (
                "In the box of the {key} there is a {value}.",
                "What is in the box of the {key}?",
                "In the box of the {key} there is a",
            ),
            (
                "The secret word of the {key} is {value}.",
                "What is the secret word of the {key}?",
                "The secret word of the {key} is",
            ),
        ],
    )
    needles = tuple(template.format(key=k, value=v) for k, v in zip(keys, values, strict=True))
    question, cue = question.format(key=keys[0]), cue.format(key=keys[0])
    return Puzzle(needles, question, cue, (values[0],), values[0])


def multi_query(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide 4 to 8 facts of one wording and ask for 2 or 3."""
    return _facts(rng, n=_count(rng, 4, 8, room, 24), n_asked=int(rng.integers(2, 4)))


def multi_value(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide 2 to 4 values of one key, and ask for all in the order of the text."""
    [key] = _keys(rng, 1)
    values = _values(rng, _count(rng, 2, 4, room, 24))
    needle, question, cue = _pick(
        rng,
        [
            (
                "One of the special numbers for {key} is: {value}.",
                "What are all the special numbers for {key} in the text above, in their order?",
                "The special numbers for {key} are:",
            ),
            (
                "The shelf of the {key} holds item {value}.",
                "Which items does the shelf of the {key} hold, in the order of the text?",
                "The shelf of the {key} holds the items",
            ),
            (
                "Note: the {key} was seen at post {value}.",
                "At which posts was the {key} seen, in the order of the notes above?",
                "The {key} was seen at the posts",
            ),
        ],
    )
    needles = tuple(needle.format(key=key, value=value) for value in values)
    question, cue = question.format(key=key), cue.format(key=key)
    return Puzzle(needles, question, cue, tuple(values), ", ".join(values), in_order=True)


def variables(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide chains of assignments; ask which variables have the value that one chain starts with."""
    n_hops = int(rng.integers(2, 5))
    n_chains = _count(rng, 1, 3, room, 16 * (n_hops + 1))
    names = _distinct(rng, n_chains * (n_hops + 1), _variable)
    numbers = _values(rng, n_chains, n_digits=5)
    chains = np.array(names).reshape(n_chains, n_hops + 1).tolist()
    template = _pick(rng, ["VAR {to} = {of}", "Let {to} = {of}.", "The program sets {to} = {of}."])
    # One hop of each chain after the other, so that each chain is in order in the text.
    needles = [template.format(to=c[0], of=v) for c, v in zip(chains, numbers, strict=True)]
    for hop in range(n_hops):
        needles += [template.format(to=chain[hop + 1], of=chain[hop]) for chain in chains]
    question, cue = _pick(
        rng,
        [
            (
                "Find all variables that are assigned the value {value} in the text above, "
                "directly or through another variable.",
                "The variables that are assigned the value {value} are:",
            ),
            (
                "Which variables have the value {value} in the end?",
                "These variables have the value {value}:",
            ),
        ],
    )
    question, cue = question.format(value=numbers[0]), cue.format(value=numbers[0])
    values = tuple(chains[0])
    return Puzzle(tuple(needles), question, cue, values, ", ".join(values), in_order=True)


def passkey(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide a passkey twice, among the keys of other doors in nearly the same words."""
    n = _count(rng, 2, 6, room, 36)
    doors = _keys(rng, n + 1)
    value, *others = _values(rng, n + 1, n_digits=5)
    template, question, cue = _pick(
        rng,
        [
            (
                "The pass key of the {door} door is {value}. Remember it. {value} opens it.",
                "What is the pass key of the {door} door?",
                "The pass key of the {door} door is",
            ),
            (
                "The code for the {door} gate is {value}. No other code than {value} opens it.",
                "Which code opens the {door} gate?",
                "The code for the {door} gate is",
            ),
        ],
    )
    needles = [template.format(door=doors[0], value=value)] * 2
    needles += [template.format(door=d, value=v) for d, v in zip(doors[1:], others, strict=True)]
    question, cue = question.format(door=doors[0]), cue.format(door=doors[0])
    return Puzzle(tuple(needles), question, cue, (value,), value)


def lines(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide numbered lines, each with a value, and ask for one by its number."""
    n = _count(rng, 4, 16, room, 24)
    numbers = np.sort(rng.choice(np.arange(1, 100), n, replace=False)).tolist()
    values = _values(rng, n)
    template, question, cue = _pick(
        rng,
        [
            (
                "line {number}: the register holds <{value}>",
                "What does the register hold in line {number}?",
                "line {number}: the register holds <",
            ),
            (
                "Entry {number}: received parcel {value}.",
                "Which parcel was received in entry {number}?",
                "Entry {number}: received parcel",
            ),
        ],
    )
    asked = int(rng.integers(n))
    needles = [template.format(number=k, value=v) for k, v in zip(numbers, values, strict=True)]
    question, cue = question.format(number=numbers[asked]), cue.format(number=numbers[asked])
    value = values[asked]
    return Puzzle(tuple(needles), question, cue, (value,), value, in_order=True)


def table(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide one JSON object of keys and values, and ask for the value of a key."""
    n = _count(rng, 4, 32, room, 20)
    keys = [key.replace(" ", _pick(rng, ["_", "-"])) for key in _keys(rng, n)]
    values = _values(rng, n)
    asked = int(rng.integers(n))
    record = json.dumps(dict(zip(keys, values, strict=True)), indent=_pick(rng, [None, 1]))
    question, cue = _pick(
        rng,
        [
            (
                'What is the value of "{key}" in the JSON object above?',
                'The value of "{key}" is "',
            ),
            ('Look up the key "{key}" in the JSON data.', '"{key}": "'),
        ],
    )
    question, cue = question.format(key=keys[asked]), cue.format(key=keys[asked])
    return Puzzle((record,), question, cue, (values[asked],), values[asked])


def copy(rng: np.random.Generator, room: int, other: str) -> Puzzle:
    """Hide 2 to 4 notes made of real text, and ask for one word for word; the cue begins it."""
    words = other.split()
    n_words = min(14, max(4, room // 12))
    n_given = n_words // 3
    n = min(_count(rng, 2, 4, room, 3 * n_words), max(1, len(words) // n_words))
    starts = rng.choice(max(1, len(words) // n_words), n, replace=False) * n_words
    notes = [words[s : s + n_words] for s in starts.tolist()]
    keys = _keys(rng, n)
    template, question, cue = _pick(
        rng,
        [
            ("Note {key}: {note}", "Repeat the note {key} word for word.", "Note {key}: {note}"),
            (
                "The message of the {key} reads: {note}",
                "What does the message of the {key} read, word for word?",
                "The message of the {key} reads: {note}",
            ),
        ],
    )
    texts = [" ".join(note) for note in notes]
    needles = tuple(template.format(key=k, note=t) for k, t in zip(keys, texts, strict=True))
    given, left = (" ".join(part) for part in (notes[0][:n_given], notes[0][n_given:]))
    # With a space of its own, since the words may end with any character.
    question, cue = question.format(key=keys[0]), cue.format(key=keys[0], note=given) + " "
    return Puzzle(needles, question, cue, (left,), left)


# Asked about needles; data.py makes the continuations itself, since they need tokens only.
KINDS: dict[str, Kind] = {
    "single": single,
    "multi_key": multi_key,
    "words": words,
    "multi_query": multi_query,
    "multi_value": multi_value,
    "variables": variables,
    "passkey": passkey,
    "lines": lines,
    "table": table,
    "copy": copy,
}
CONTINUATION = "continuation"
ALL_KINDS = (*KINDS, CONTINUATION)


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise DataError unless all are known kinds, each once."""
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds):
        raise DataError(f"kinds: expected different kinds in a sequence, got {kinds!r}")
    for kind in kinds:
        if kind not in ALL_KINDS:
            raise DataError(f"kinds: expected some of {', '.join(ALL_KINDS)}, got {kind!r}")


def score(kind: str, answer: str, expected: Sequence[str]) -> float:
    """Score what a model said after the cue.

    Needles: the share of expected values that are in the answer as whole words, case aside. Only
    the first line counts, and no more of it than a correct answer and 40 characters, so that
    reciting the text does not pay. Copies and continuations: the share of expected words before the
    first wrong one. It does not punish a wrong value beside the right ones.

    Parameters
    ----------
    kind : str
        One of `ALL_KINDS`.
    answer : str
        What was generated, without special tokens.
    expected : sequence of str
        `Sample.expected`.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    DataError
        If the kind is unknown or nothing is expected.

    Examples
    --------
    >>> score("multi_value", "They are 4711, 42 and so on.", ["4711", "1984"])
    0.5
    """
    check_kinds([kind])
    if isinstance(expected, str) or not expected:
        raise DataError(f"expected: expected a sequence of values, got {expected!r}")
    if kind in ("copy", CONTINUATION):
        wanted, said = " ".join(expected).split(), answer.split()
        n_right = 0
        while n_right < min(len(wanted), len(said)) and wanted[n_right] == said[n_right]:
            n_right += 1
        return n_right / max(1, len(wanted))
    counted = (answer.strip().splitlines() or [""])[0][: len(", ".join(expected)) + 40]
    found = [
        re.search(rf"(?<!\w){re.escape(value)}(?!\w)", counted, re.IGNORECASE) is not None
        for value in expected
    ]
    return sum(found) / len(found)


# -------------------------------------------------------------------------------- ingredients


def _facts(rng: np.random.Generator, n: int, n_asked: int) -> Puzzle:
    """Hide n facts of one wording and ask for the first ones."""
    n_asked = min(n, n_asked)
    keys, values = _keys(rng, n), _values(rng, n)
    template, question, cue = _pick(
        rng,
        [
            (
                "One of the special magic numbers for {key} is: {value}.",
                "What is the special magic number for {key} mentioned in the text above?",
                "The special magic number for {key} is:",
            ),
            (
                "The number of the {key} is {value}.",
                "What is the number of the {key}?",
                "The number of the {key} is",
            ),
            (
                "Please remember that the {key} has the number {value}.",
                "Which number does the {key} have?",
                "The {key} has the number",
            ),
            (
                "In the list of numbers, the {key} stands with {value}.",
                "With which number does the {key} stand in the list?",
                "In the list of numbers, the {key} stands with",
            ),
        ],
    )
    needles = tuple(template.format(key=k, value=v) for k, v in zip(keys, values, strict=True))
    if n_asked == 1:
        question, cue = question.format(key=keys[0]), cue.format(key=keys[0])
    else:
        asked = ", ".join(keys[: n_asked - 1]) + f" and {keys[n_asked - 1]}"
        question = _pick(
            rng,
            [
                f"What are the numbers of the {asked}? Answer in this order.",
                f"Name the numbers of the {asked}, in this order.",
            ],
        )
        cue = f"The numbers of the {asked} are"
    return Puzzle(needles, question, cue, tuple(values[:n_asked]), ", ".join(values[:n_asked]))


def _pick(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.integers(len(choices)))]


def _count(rng: np.random.Generator, low: int, high: int, room: int, each: int) -> int:
    """Draw how many needles; fewer where half of the room would not hold them."""
    n = int(rng.integers(low, high + 1))
    return max(1, min(n, room // (2 * each)))


def _distinct(rng: np.random.Generator, n: int, draw: Callable) -> list[str]:
    """Draw n strings, none of which is within another."""
    found: list[str] = []
    while len(found) < n:
        new = draw(rng)
        if not any(new in old or old in new for old in found):
            found.append(new)
    return found


def _keys(rng: np.random.Generator, n: int) -> list[str]:
    return _distinct(rng, n, lambda rng: f"{_pick(rng, ADJECTIVES)} {_pick(rng, NOUNS)}")


def _values(rng: np.random.Generator, n: int, n_digits: int = 0) -> list[str]:
    """Draw n numbers of equally many digits, 5 to 7 unless told."""
    n_digits = n_digits or int(rng.integers(5, 8))
    low = 10 ** (n_digits - 1)
    return _distinct(rng, n, lambda rng: str(rng.integers(low, 10 * low)))


def _variable(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, "ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(4))
