"""What ``leank bench decode`` is asked, and what it found; needs neither torch nor a GPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import leank
from leank.bench.profiles import load_profiles


class Shape(NamedTuple):
    """B rows of L tokens each, the new one included."""

    n_rows: int
    length: int

    def __str__(self) -> str:
        """Return it as the option --shapes takes it."""
        return f"{self.n_rows}x{self.length}"


_TABLE = [(64, 32768), (16, 32768), (1, 131072), (64, 4096), (8, 8192), (1, 1024), (1, 4096)]
_SHAPES = {
    "llama-3.1-8b": tuple(Shape(*pair) for pair in _TABLE),
    "qwen-2.5-7b": (Shape(16, 32768),),
}
# A query always sees its own token whole: recent is 1 at least.
_LEAST = {"q_heads": 1, "layers": 1, "rounds": 1, "sink": 0, "recent": 1, "seed": 0}


class BenchError(Exception):
    """A mistake in what the user asked for, or a machine that cannot do it; one line of text."""


class WrongResultError(Exception):
    """LeanK's result is outside its error bound; one line of text."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``leank bench decode``."""

    profile: str | None = None  # one name or "all"; None is all unless there is a mask
    mask: str | Path | None = None
    q_heads: int | None = None
    layers: int | None = None
    shapes: tuple[str, ...] = ()
    rounds: int = 15
    sink: int = 128
    recent: int = 896
    dtype: str = "bfloat16"
    seed: int = 0
    per_layer: bool = False
    append: bool = False
    mixed: bool = False

    @property
    def window(self) -> dict[str, int]:
        """S0 and W, as keyword arguments."""
        return {"sink": self.sink, "recent": self.recent}


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One mask to measure, bool [N, Hkv, D], and where."""

    name: str
    keep: npt.NDArray[np.bool_]
    n_q_heads: int
    shapes: tuple[Shape, ...]

    @property
    def n_heads(self) -> int:
        """KV heads of a layer, Hkv."""
        return self.keep.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head, D."""
        return self.keep.shape[2]


def plan(options: Options) -> list[Work]:
    """Return what the options ask for.

    Raises
    ------
    BenchError
        If an option or the mask file cannot be used.
    """
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise BenchError(f"{name.replace('_', '-')}: expected at least {least}, got {value}")
    shapes = tuple(_shape(text) for text in options.shapes)
    if options.mask is not None:
        if options.profile is not None:
            raise BenchError(f"profile: expected none with --mask, got {options.profile}")
        return [_work_of_mask(options, shapes)]
    if options.q_heads is not None:
        raise BenchError(f"q-heads: expected none without --mask, got {options.q_heads}")
    works = []
    for name, profile in load_profiles().items():
        if options.profile in (None, "all", name):
            keep = _some_layers(profile.keep(options.seed), options.layers)
            works.append(Work(name, keep, profile.n_q_heads, shapes or _SHAPES[name]))
    return works


def _work_of_mask(options: Options, shapes: tuple[Shape, ...]) -> Work:
    path = options.mask
    try:
        keep = leank.load_mask(path).keep
    except (leank.MaskFileError, ModuleNotFoundError) as error:
        raise BenchError(f"mask: {error}") from error
    except OSError as error:
        raise BenchError(f"mask: {path}: {error.strerror or error}") from error
    n_heads, n_q_heads = keep.shape[1], options.q_heads
    if n_q_heads is None or n_q_heads % n_heads:
        raise BenchError(
            f"q-heads: expected a multiple of the mask's {n_heads} KV heads, "
            f"got {'none' if n_q_heads is None else n_q_heads}"
        )
    keep = _some_layers(keep, options.layers)
    return Work(Path(path).name, keep, n_q_heads, shapes or _SHAPES["llama-3.1-8b"])


def _some_layers(keep: npt.NDArray[np.bool_], n: int | None) -> npt.NDArray[np.bool_]:
    """Return n of the layers, as far apart as they can be."""
    if n is None:
        return keep
    if n > len(keep):
        raise BenchError(f"layers: expected at most the mask's {len(keep)}, got {n}")
    return keep[[i * len(keep) // n for i in range(n)]]


def _shape(text: str) -> Shape:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise BenchError(f"shapes: expected BxL as 8x8192, got {text!r}")
    return Shape(*(int(n) for n in found.groups()))


# ----------------------------------------------------------------------------------- what was found


@dataclasses.dataclass(frozen=True)
class Line:
    """One shape of the table. Times are microseconds of a layer, means over the layers."""

    shape: Shape
    us: float  # LeanK, the new token stored
    needed_bytes: float
    dense_bytes: float
    dense_us: dict[str, float]  # by peer

    @property
    def byte_ratio(self) -> float:
        """Bytes of dense K and V by the bytes that LeanK must read."""
        return self.dense_bytes / self.needed_bytes

    @property
    def tb_s(self) -> float:
        """Needed bytes per time, in 1e12 bytes per second."""
        return self.needed_bytes / self.us / 1e6

    @property
    def best(self) -> str | None:
        """The fastest peer; None if none took the shape."""
        return min(self.dense_us, key=self.dense_us.get, default=None)

    @property
    def gain(self) -> float | None:
        """Time of the fastest peer by LeanK's."""
        return None if self.best is None else self.dense_us[self.best] / self.us


@dataclasses.dataclass(frozen=True)
class LayerLine:
    """One layer alone, several caches of it in turn."""

    shape: Shape
    layer: int
    us: float
    needed_bytes: int
    plain_tb_s: float  # of torch's sum over the pages and twins of the same caches

    @property
    def tb_s(self) -> float:
        """Needed bytes per time, in 1e12 bytes per second."""
        return self.needed_bytes / self.us / 1e6

    @property
    def share(self) -> float:
        """Rate as a share of that of the plain read."""
        return self.tb_s / self.plain_tb_s


@dataclasses.dataclass(frozen=True)
class AppendLine:
    """A decode that stores the new token, and one that attends to what is stored."""

    shape: Shape
    storing_us: float
    attending_us: float

    @property
    def share(self) -> float:
        """What storing adds, as a share of attending."""
        return self.storing_us / self.attending_us - 1


@dataclasses.dataclass(frozen=True)
class MixedLine:
    """A mask whose heads all differ in width, and one of as many bytes whose heads do not."""

    shape: Shape
    widths: tuple[int, ...]
    mixed_us: float
    equal_us: float

    @property
    def ratio(self) -> float:
        """Time of mixed widths by that of equal ones."""
        return self.mixed_us / self.equal_us


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why there is no time of a peer, or of LeanK, at a shape."""

    who: str
    shape: Shape
    reason: str


@dataclasses.dataclass
class Table:
    """What was found with one mask; `lines` holds lines of one kind or of several."""

    name: str
    n_layers: int
    n_q_heads: int
    n_heads: int
    head_dim: int
    error: float  # the largest, relative to the largest output of its head
    bound: float  # of that error
    lines: list[Line | LayerLine | AppendLine | MixedLine] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Result:
    """Machine, versions and settings in words, and a table of each mask."""

    facts: dict[str, str | int]
    tables: list[Table] = dataclasses.field(default_factory=list)


def as_json(result: Result) -> dict[str, Any]:
    """Return the result as JSON values, what follows from others included."""
    tables = []
    for table in result.tables:
        fields = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
        lines = [{"kind": type(line).__name__, **_plain(line)} for line in table.lines]
        tables.append(fields | {"lines": lines, "refusals": [_plain(r) for r in table.refusals]})
    return {"facts": result.facts, "tables": tables}


def _plain(line: Any) -> dict[str, Any]:
    properties = [n for n, x in vars(type(line)).items() if isinstance(x, property)]
    names = [f.name for f in dataclasses.fields(line)] + properties
    values = {name: getattr(line, name) for name in names}
    return values | {"shape": {"B": line.shape.n_rows, "L": line.shape.length}}
