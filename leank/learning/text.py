"""Text to learn from: what ships with Python, or your files, in three parts that share nothing.

Documents are cut into passages of about 2,000 characters. The hash of a passage decides its part,
so a passage is in the same part whatever else is read with it, and for ever.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PARTS = ("train", "validation", "test")
SHARES = (0.6, 0.2, 0.2)
WINDOW = 50  # characters; no stretch of this length is in two parts

_PASSAGE = 2000  # characters of a passage, at most
_SHORTEST = 200
_GAP = re.compile(r"[\n ]*")
_FACTOR = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array, since scalars warn of overflow

# Not text, of one machine only, or packages that distributions ship apart from Python: with them
# two installations of one version would learn from different text.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",  # read as topics
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}
_QUOTED_OR_COMMENT = re.compile(
    r'"""(?P<double>.*?)"""|\'\'\'(?P<single>.*?)\'\'\'|(?P<comment>(?:^[ \t]*#[^\n]*\n)+)',
    re.MULTILINE | re.DOTALL,
)


class DataError(ValueError):
    """Data that cannot be made as asked; the message names the argument, expected and got."""


@dataclass(frozen=True)
class Corpus:
    """Passages of the three parts, and a digest of them to store beside what was learned.

    Attributes
    ----------
    train, validation, test : tuple of str
        Passages in the order of the documents. No 50 characters are in two parts.
    n_dropped : int
        Characters that were left out, nearly all of them because they repeat others.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    n_dropped: int = 0

    def part(self, name: str) -> tuple[str, ...]:
        """Return the passages of "train", "validation" or "test"; DataError for another name."""
        if name not in PARTS:
            raise DataError(f"part: expected one of {', '.join(PARTS)}, got {name!r}")
        return getattr(self, name)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that tell whether two runs used the same text."""
        whole = "\0\0".join("\0".join(self.part(name)) for name in PARTS)
        return hashlib.blake2b(_bytes(whole), digest_size=8).hexdigest()


def default_text(code: bool = False) -> list[str]:
    """Return documents made of text that ships with Python, in a fixed order.

    They are the reference topics behind ``help()``, the licence, and of each module of the standard
    library the comments and triple-quoted strings, which are its docstrings and messages. Two
    installations with the same files give the same text; another Python version gives another
    (compare `Corpus.digest`).

    Parameters
    ----------
    code : bool, default False
        Add what is left of each module, its code.

    Returns
    -------
    list of str
        About 2.6 MB of prose, and 5 MB of code if asked for.

    Raises
    ------
    DataError
        If this Python ships without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = _topics()
    licence = root / "LICENSE.txt"
    if licence.is_file():
        documents.append(licence.read_text(encoding="utf-8"))
    sources = [path.read_text(encoding="utf-8") for path in _modules(root)]
    documents += map(_prose, sources)
    documents += map(_code, sources) if code else ()
    documents = [text for text in documents if text]
    if sum(map(len, documents)) < 1 << 20:
        raise DataError(
            f"text: expected the sources of the standard library in {root}, got hardly any; "
            "give text files of your own"
        )
    return documents


def read_text(paths: Iterable[str | Path]) -> list[str]:
    """Return one document per UTF-8 text file, in the order given.

    Raises
    ------
    DataError
        If there is no path, or a file cannot be read as text.
    """
    documents = []
    for path in paths:
        try:
            documents.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error  # the system's would name it again
            raise DataError(f"text: expected a UTF-8 text file, got {path}: {reason}") from error
    if not documents:
        raise DataError("text: expected at least one file, got none")
    return documents


def split(documents: Iterable[str], shares: Sequence[float] = SHARES) -> Corpus:
    r"""Cut documents into passages and deal these to the three parts.

    Parameters
    ----------
    documents : iterable of str
    shares : sequence of 3 floats, default (0.6, 0.2, 0.2)
        Wanted shares of train, validation and test; only their ratios count.

    Returns
    -------
    Corpus
        A paragraph that has 50 characters in common with an earlier one is left out, and so is a
        passage with 50 characters in common with another part.

    Raises
    ------
    DataError
        If a share is not positive, or a part stays empty.

    Examples
    --------
    >>> lines = (f"The number {i} has the square {i * i}.\n" for i in range(9000))
    >>> corpus = split(["\n".join(lines)])
    >>> len(corpus.train) > len(corpus.test) > 20
    True
    """
    if len(shares) != len(PARTS) or not all(share > 0 for share in shares):
        raise DataError(f"shares: expected 3 positive numbers, got {tuple(shares)}")
    limits = np.cumsum(shares) / sum(shares)
    texts = [_tidy(document) for document in documents]
    n_read = sum(map(len, texts))
    passages = _passages(texts)
    places = np.array([_place(passage) for passage in passages])
    parts = np.minimum(np.searchsorted(limits, places, side="right"), len(PARTS) - 1)
    kept = _without_shared([_windows(passage) for passage in passages], parts)
    dealt = [[passages[i] for i in np.flatnonzero(kept & (parts == p))] for p in range(len(PARTS))]
    if not all(dealt):
        sizes = ", ".join(f"{len(d)} for {name}" for d, name in zip(dealt, PARTS, strict=True))
        raise DataError(
            f"text: expected enough for passages in all three parts, got {n_read:,} characters "
            f"({sizes})"
        )
    n_kept = sum(len(passage) for passages in dealt for passage in passages)
    return Corpus(*(tuple(passages) for passages in dealt), n_dropped=n_read - n_kept)


# ------------------------------------------------------------------------- what Python ships


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _modules(root: Path) -> list[Path]:
    """Return the modules of the standard library, sorted by their names on every system."""
    found = {}
    for path in root.rglob("*.py"):
        names = path.relative_to(root).parts
        # Names that begin so (config-3.11-x86_64, _sysconfigdata__linux) describe one machine.
        own = any(name.startswith(("config-", "_sysconfigdata")) for name in names)
        if not own and not _LEFT_OUT & set(names[:-1]):
            found[names] = path
    return [found[names] for names in sorted(found)]


def _prose(source: str) -> str:
    """Return the comments and triple-quoted strings of a module.

    A regular expression reads all modules in half a second; parsing them takes ten times as long,
    and the odd string that is no docstring is text, too.
    """
    found = []
    for match in _QUOTED_OR_COMMENT.finditer(source):
        if match["comment"] is not None:
            lines = [line.strip().lstrip("#!") for line in match["comment"].splitlines()]
            text = "\n".join(line.removeprefix(" ") for line in lines)
        else:
            text = inspect.cleandoc(match["double"] or match["single"] or "")
        if len(text) > WINDOW and _is_prose(text):
            found.append(text.strip("\n"))
    return "\n\n".join(found)


def _code(source: str) -> str:
    return _QUOTED_OR_COMMENT.sub("", source)


def _is_prose(text: str) -> bool:
    return sum(c.isalpha() or c == " " for c in text) > 0.7 * len(text)


# ---------------------------------------------------------------------------------- passages


def _tidy(text: str) -> str:
    """Unify line ends and spaces; shorten rulers and gaps, which cost tokens and say nothing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs()
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    # Not re.sub(r" +$"): it looks again from each space of a long row of them.
    text = "\n".join(line.rstrip(" ") for line in text.split("\n"))
    text = re.sub(r"([^\w\s])\1{3,}", r"\1\1\1\1", text)
    text = re.sub(r"(?<=\S) {3,}", "  ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _passages(texts: list[str]) -> list[str]:
    """Pack paragraphs into passages, without those that repeat a window of an earlier one."""
    cut = [[p for long in text.split("\n\n") for p in _pieces(long)] for text in texts]
    windows = [_windows(paragraph) for paragraphs in cut for paragraph in paragraphs]
    new = iter(_without_shared(windows, np.arange(len(windows))))
    passages = []
    for paragraphs in cut:
        packed = ""
        for paragraph in paragraphs:
            if not next(new):
                continue
            if packed and len(packed) + 2 + len(paragraph) > _PASSAGE:
                passages.append(packed)
                packed = ""
            packed += "\n\n" * bool(packed) + paragraph
        passages.append(packed)
    return [passage for passage in passages if len(passage) >= _SHORTEST]


def _pieces(paragraph: str) -> list[str]:
    """Cut a paragraph longer than a passage, after a line or else after a word."""
    pieces, begin = [], 0
    while len(paragraph) - begin > _PASSAGE:
        end = begin + _PASSAGE
        cut = paragraph.rfind("\n", begin + 1, end)
        cut = cut if cut > 0 else paragraph.rfind(" ", begin + 1, end)
        cut = cut if cut > 0 else end
        pieces.append(paragraph[begin:cut])
        begin = _GAP.match(paragraph, cut).end()
    return [*pieces, paragraph[begin:]]


def _place(passage: str) -> float:
    """Return where in [0, 1) the content of a passage puts it."""
    digest = hashlib.blake2b(_bytes(passage), digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32


def _without_shared(windows: list[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """Tell which texts share no window with an earlier one of another group.

    The first text with a window owns it. Two texts that stay and are of different groups cannot
    share one, since its owner is in one group only.

    Parameters
    ----------
    windows : list of np.ndarray
        Hashes of each text.
    groups : np.ndarray
        Group of each text, [n].

    Returns
    -------
    np.ndarray
        True where a text stays, [n] bool.
    """
    if not windows:
        return np.ones(0, bool)
    text_of = np.repeat(np.arange(len(windows)), [len(w) for w in windows])
    # np.unique returns the first place of each value, and places are in the order of the texts.
    _, first, which = np.unique(np.concatenate(windows), return_index=True, return_inverse=True)
    foreign = groups[text_of[first[which]]] != groups[text_of]
    return np.bincount(text_of[foreign], minlength=len(windows)) == 0


def _windows(text: str) -> np.ndarray:
    """Return the hashes [n] uint64 of all windows, as written and with white space collapsed.

    Collapsing finds what was copied with other line breaks.
    """
    return np.concatenate([_rolling(text), _rolling(" ".join(text.split()))])


def _rolling(text: str) -> np.ndarray:
    """Return a polynomial hash modulo 2^64 of each window of `text`."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(codes) < WINDOW:
        return np.empty(0, np.uint64)
    # Neighbouring letters differ in few bits.
    mixed = (codes + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(29)
    # A window of n + m is one of n, then one of m: double up to the powers of 2 that add to WINDOW.
    windows, width = np.zeros(len(codes) + 1, np.uint64), 0
    power, step, factor = mixed, 1, _FACTOR
    while width < WINDOW:
        if WINDOW & step:
            n = len(codes) - width - step + 1
            windows = windows[:n] * factor + power[width : width + n]
            width += step
        n = len(codes) - 2 * step + 1
        power = power[:n] * factor + power[step : step + n] if n > 0 else power
        step, factor = 2 * step, factor * factor
    return windows


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
