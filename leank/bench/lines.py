"""What ``leank bench`` found: a line for each shape, in tables; needs neither torch nor a GPU."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple


class Shape(NamedTuple):
    """B rows of L tokens each, the new one included."""

    n_rows: int
    length: int

    def __str__(self) -> str:
        """Return it as the option --shapes takes it."""
        return f"{self.n_rows}x{self.length}"

    @property
    def letters(self) -> dict[str, int]:
        """The numbers by the letters of tables."""
        return {"B": self.n_rows, "L": self.length}


class Case(NamedTuple):
    """B rows, each a prompt of L tokens, and what generate() adds."""

    n_rows: int
    length: int
    n_new: int

    def __str__(self) -> str:
        """Return it as the option --cases takes it."""
        return f"{self.n_rows}x{self.length}x{self.n_new}"

    @property
    def letters(self) -> dict[str, int]:
        """The numbers by the letters of tables."""
        return {"B": self.n_rows, "L": self.length, "new": self.n_new}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds: the median of some rounds, the fastest and the slowest one."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, us: Sequence[float]) -> Timing:
        """Return that of single rounds."""
        return cls(statistics.median(us), min(us), max(us))

    @classmethod
    def mean(cls, timings: Iterable[Timing], weights: Iterable[float] | None = None) -> Timing:
        """Return the mean of each number, over layers for example."""
        numbers = zip(*((t.median, t.low, t.high) for t in timings), strict=True)
        if weights is not None:
            weights = list(weights)
        return cls(*(statistics.fmean(values, weights) for values in numbers))

    def over(self, n: float) -> Timing:
        """Return the time of one of n."""
        return Timing(self.median / n, self.low / n, self.high / n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One shape: LeanK's time, the bytes that bound it, and dense peers.

    Decode: means over the layers of a mask. Bytes are those that must move from or to memory.
    """

    what: ClassVar[str] = "bytes"  # that `amounts` counts, and that the peak is of

    shape: Shape | Case
    us: Timing
    needed_bytes: float
    dense_us: dict[str, Timing]  # by peer
    dense_bytes: float
    peak_gb_s: float  # of memory, as measured beside

    @property
    def has_rate(self) -> bool:
        """False where the time is a difference of two, and not above 0."""
        return self.us.median > 0

    @property
    def gb_s(self) -> float | None:
        """Needed bytes per time, in 1e9 bytes per second."""
        return self.needed_bytes / self.us.median / 1e3 if self.has_rate else None

    @property
    def share(self) -> float | None:
        """`gb_s` by what memory reaches."""
        return self.gb_s / self.peak_gb_s if self.has_rate else None

    @property
    def bound_us(self) -> float:
        """The time that the bytes alone take."""
        return self.needed_bytes / self.peak_gb_s / 1e3

    @property
    def byte_ratio(self) -> float:
        """Bytes of dense attention by those that LeanK must move."""
        return self.dense_bytes / self.needed_bytes

    @property
    def best(self) -> str | None:
        """The fastest peer; None if none took the shape."""
        return min(self.dense_us, key=lambda name: self.dense_us[name].median, default=None)

    @property
    def gain(self) -> float | None:
        """Time of the fastest peer by LeanK's."""
        if self.best is None or not self.has_rate:
            return None
        return self.dense_us[self.best].median / self.us.median

    @property
    def peak(self) -> float:
        """The most that memory moves in a second."""
        return self.peak_gb_s * 1e9

    def amounts(self) -> dict[str, tuple[float, Timing]]:
        """Return what each contender has to move, and its time, by its name."""
        dense = {name: (self.dense_bytes, us) for name, us in self.dense_us.items()}
        return {"LeanK": (self.needed_bytes, self.us), **dense}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppendLine(Line):
    """What storing one token takes; `us` is its time beyond that of attending."""

    attending_us: Timing

    @property
    def added(self) -> float:
        """Time of storing by that of attending."""
        return self.us.median / self.attending_us.median


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnLine(Line):
    """Forward and backward of mask learning's attention, in which products count, not bytes."""

    what: ClassVar[str] = "operations"

    n_flop: float  # of the products that are needed
    product_tflop_s: float  # torch's, of square matrices, as measured beside
    # Beyond inputs and results, by contender; None where the system does not tell.
    extra_bytes: dict[str, int | None]

    @property
    def tflop_s(self) -> float:
        """Needed operations per time, in 1e12 per second."""
        return self.n_flop / self.us.median / 1e6

    @property
    def of_product(self) -> float:
        """`tflop_s` by that of a product of matrices."""
        return self.tflop_s / self.product_tflop_s

    @property
    def peak(self) -> float:
        """Operations in a second of a product of matrices."""
        return self.product_tflop_s * 1e12

    def amounts(self) -> dict[str, tuple[float, Timing]]:
        """Return the operations that are needed, and each contender's time, by its name."""
        times = {"LeanK": self.us, **self.dense_us}
        return {name: (self.n_flop, us) for name, us in times.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateLine(Line):
    """Steps of generate() after the first token; bytes are those of the weights and of K and V."""

    # LeanK in other ways: with a mask that keeps everything, and without graphs.
    own_us: dict[str, Timing]
    own_bytes: dict[str, float]
    weight_bytes: int
    dense_cache_bytes: int  # of all tokens
    # By contender; peak memory is known on a GPU, and the first token counts where it is read.
    cache_bytes: dict[str, int]
    peak_memory: dict[str, int]
    first_s: dict[str, float]

    @property
    def cache_share(self) -> float:
        """Bytes of LeanK's cache by those of a dense one."""
        return self.cache_bytes["leank"] / self.dense_cache_bytes

    @property
    def most_memory(self) -> float:
        """The peak that LeanK was to stay below: 2% and 1 GiB above weights and cache."""
        return 1.02 * (self.weight_bytes + self.cache_bytes["leank"]) + 2**30

    @property
    def pages_gain(self) -> float | None:
        """Time with a mask that keeps everything by LeanK's."""
        pages = self.own_us.get("pages")
        return None if pages is None else pages.median / self.us.median

    def amounts(self) -> dict[str, tuple[float, Timing]]:
        """Return what each contender has to read in a step, and its time, by its name."""
        own = {f"LeanK, {name}": (self.own_bytes[name], us) for name, us in self.own_us.items()}
        return super().amounts() | own


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
        """`tb_s` by that of the sum."""
        return self.tb_s / self.plain_tb_s


@dataclasses.dataclass(frozen=True)
class MixedLine:
    """Heads that all differ in width against heads of one width; both need the same bytes."""

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
    shape: Shape | Case
    reason: str


@dataclasses.dataclass
class Table:
    """What was found with one mask; `lines` holds lines of one kind or of several."""

    name: str
    about: str  # layers, heads, what else the shapes have in common
    bound: float  # of the error
    measure: str  # what the error is relative to
    error: float | None = None  # the largest; None where nothing was compared
    lines: list[Line | LayerLine | MixedLine] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)

    def checked(self, error: float) -> None:
        """Note an error that is within the bound."""
        self.error = error if self.error is None else max(self.error, error)


@dataclasses.dataclass
class Result:
    """Machine, versions and settings in words, how it was measured, and a table of each mask."""

    facts: dict[str, str | int | float]
    how: str
    tables: list[Table] = dataclasses.field(default_factory=list)


def as_json(result: Result) -> dict[str, Any]:
    """Return the result as JSON values, what follows from others included."""
    tables = []
    for table in result.tables:
        fields = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
        lines = [{"kind": type(line).__name__, **_plain(line)} for line in table.lines]
        tables.append(fields | {"lines": lines, "refusals": [_plain(r) for r in table.refusals]})
    return {"facts": result.facts, "how": result.how, "tables": tables}


def _plain(line: Any) -> dict[str, Any]:
    kind = type(line)
    properties = [name for name in dir(kind) if isinstance(getattr(kind, name), property)]
    values = {name: getattr(line, name) for name in properties}
    return dataclasses.asdict(line) | values | {"shape": line.shape.letters}
