"""What ``leank bench`` prints at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from leank.bench.lines import (
    AppendLine,
    Case,
    GenerateLine,
    LayerLine,
    LearnLine,
    Line,
    MixedLine,
    Result,
    Shape,
    Timing,
)
from leank.bench.lines import Table as ResultTable


def print_report(result: Result, console: Console, *, peers: bool = True) -> None:
    """Print the result, in colour if the console has any; 80 columns are enough.

    peers : whether to print the times of all dense peers, not of the best one alone
    """
    console.print()
    console.print(_facts(result.facts))
    for table in result.tables:
        console.print(_heading(table))
        for kind, tables in _KINDS.items():
            if lines := [line for line in table.lines if type(line) is kind]:
                for draw in tables:
                    console.print(draw(lines))
                if peers and kind in (Line, AppendLine) and any(len(x.dense_us) > 1 for x in lines):
                    console.print(_all_peers(lines))
        if table.refusals:
            console.print(_refusals(table))
    console.print(Text("\n" + result.how, style="dim"))
    if any(_varies(line) for table in result.tables for line in table.lines):
        text = "Times vary by more than half: is something else running? Numbers may mislead."
        console.print(Text(text, style="red"))


def _varies(line: object) -> bool:
    if not isinstance(line, Line) or not line.has_rate:
        return False
    times = [line.us, *line.dense_us.values()]
    return any(us.high > 1.5 * us.median or us.low < us.median / 1.5 for us in times)


def _facts(facts: Mapping[str, object]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in facts.items():
        grid.add_row(f" {name}", Text(str(value)))
    return grid


def _heading(table: ResultTable) -> Group:
    if table.error is None:
        check = Text(" not checked: there was nothing to compare with", style="red")
    else:
        check = Text(
            f" checked: largest error {table.error:.1e} {table.measure}, bound {table.bound:.1e}",
            style="green",
        )
    return Group(Text(f"\n {table.name}: {table.about}", style="bold"), check)


def _box(first: str, *names: str) -> Table:
    """Return a table of numbers; the first column is the shape of a row."""
    table = Table(box=box.ROUNDED, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    return table


# ---------------------------------------------------------------------- LeanK against its bound


def _rates(lines: Sequence[Line]) -> Table:
    table = _box("B x L", "LeanK us", "range", "MB", "GB/s", "of peak", "bound us")
    for line in lines:
        speed = f"{line.needed_bytes / 1e6:,.2f}", f"{line.gb_s:,.1f}", f"{line.share:.0%}"
        table.add_row(str(line.shape), *_timing(line.us), *speed, _us(line.bound_us))
    return table


def _appends(lines: Sequence[AppendLine]) -> Table:
    names = "store us", "range", "attend us", "adds", "KB", "GB/s", "bound us"
    table = _box("B x L", *names)
    for line in lines:
        rate = f"{line.gb_s:,.2f}" if line.has_rate else "-"
        added = _us(line.attending_us.median), f"{line.added:.1%}"
        speed = f"{line.needed_bytes / 1e3:,.1f}", rate, f"{line.bound_us:.2f}"
        table.add_row(str(line.shape), *_timing(line.us), *added, *speed)
    return table


def _products(lines: Sequence[LearnLine]) -> Table:
    table = _box("B x L", "LeanK us", "range", "MB", "TFLOP/s", "of matmul", "bound us")
    for line in lines:
        speed = f"{line.needed_bytes / 1e6:,.2f}", f"{line.tflop_s:.3g}", f"{line.of_product:.0%}"
        table.add_row(str(line.shape), *_timing(line.us), *speed, _us(line.bound_us))
    return table


def _memory(lines: Sequence[LearnLine]) -> Table:
    names = list(dict.fromkeys(name for line in lines for name in line.extra_bytes))
    table = _box("B x L", *(f"{name}: extra MiB" for name in names))
    for line in lines:
        found = (line.extra_bytes.get(name) for name in names)
        table.add_row(str(line.shape), *("-" if x is None else f"{x / 2**20:,.1f}" for x in found))
    return table


def _contenders(lines: Sequence[GenerateLine]) -> Table:
    """One row for each contender; a table has one case."""
    (line,) = lines
    columns = {
        "first token s": {name: f"{s:.3f}" for name, s in line.first_s.items()},
        "peak GiB": {name: _gib(n) for name, n in line.peak_memory.items()},
        "KV GiB": {name: _gib(n) for name, n in line.cache_bytes.items()},
    }
    columns = {name: values for name, values in columns.items() if values}
    table = _box("contender", "ms a step", "range", "tokens/s", *columns)
    for name, us in {**line.dense_us, "leank": line.us, **line.own_us}.items():
        rate = f"{line.shape.n_rows / us.median * 1e6:,.1f}"
        rest = (values.get(name, "-") for values in columns.values())
        table.add_row(name, f"{us.median / 1e3:,.2f}", _range(us), rate, *rest)
    return table


def _generate_gains(lines: Sequence[GenerateLine]) -> Table:
    (line,) = lines
    words = {}
    if line.best is not None:
        words[f"against {line.best}"] = f"{line.gain:.2f}x as fast"
    if line.pages_gain is not None:
        words["against pages"] = f"{line.pages_gain:.2f}x as fast"
    bound = f"{line.byte_ratio:.2f}x fewer than dense, bound {line.bound_us / 1e3:,.2f} ms"
    words["bytes"] = f"{line.needed_bytes / 1e9:,.3f} GB a step, {bound}"
    words["rate"] = f"{line.gb_s:,.1f} GB/s, {line.share:.0%} of peak"
    words["KV"] = f"{line.cache_share:.3f} of a dense cache"
    if "leank" in line.peak_memory:
        most = f"of at most {_gib(line.most_memory)}"
        words["peak memory"] = f"{_gib(line.peak_memory['leank'])} {most} GiB"
    return _facts(words)


def _gib(n: float) -> str:
    return f"{n / 2**30:,.3g}" if n < 2**30 else f"{n / 2**30:,.2f}"


# ------------------------------------------------------------------------- LeanK against others


def _gains(lines: Sequence[Line]) -> Table:
    table = _box("B x L", "byte ratio", "gain", "best dense", "us", "range", "GB/s")
    for line in lines:
        row = [f"{line.byte_ratio:.2f}", *["-"] * 5]
        if line.best is not None:
            us = line.dense_us[line.best]
            rate = f"{line.dense_bytes / us.median / 1e3:,.1f}"
            row[1:] = f"{line.gain:.2f}x", line.best, *_timing(us), rate
        table.add_row(str(line.shape), *row)
    return table


def _time_gains(lines: Sequence[Line]) -> Table:
    """Where bytes do not tell the contenders apart."""
    table = _box("B x L", "gain", "best dense", "us", "range")
    for line in lines:
        row = ["-"] * 4
        if line.best is not None:
            gain = f"{line.gain:.2f}x" if line.has_rate else "-"
            row = [gain, line.best, *_timing(line.dense_us[line.best])]
        table.add_row(str(line.shape), *row)
    return table


def _all_peers(lines: Sequence[Line]) -> Table:
    names = list(dict.fromkeys(name for line in lines for name in line.dense_us))
    table = _box("B x L", *(f"{name} us" for name in names))
    for line in lines:
        times = (line.dense_us.get(name) for name in names)
        table.add_row(str(line.shape), *("-" if us is None else _us(us.median) for us in times))
    return table


# ---------------------------------------------------------------------------------- single layers


def _layers(lines: Sequence[LayerLine]) -> Table:
    table = _box("B x L", "layer", "MB", "us", "TB/s", "sum TB/s", "share")
    for line in lines:
        numbers = f"{line.needed_bytes / 1e6:.2f}", _us(line.us), f"{line.tb_s:.2f}"
        plain = f"{line.plain_tb_s:.2f}", f"{line.share:.0%}"
        table.add_row(str(line.shape), str(line.layer), *numbers, *plain)
    return table


def _mixes(lines: Sequence[MixedLine]) -> Table:
    table = _box("B x L", "widths", "mixed us", "equal us", "ratio")
    for line in lines:
        widths = f"{line.widths[0]} to {line.widths[-1]}"
        row = widths, _us(line.mixed_us), _us(line.equal_us), f"{line.ratio:.3f}"
        table.add_row(str(line.shape), *row)
    return table


_KINDS: dict[type, tuple[Callable[[list], Table], ...]] = {
    Line: (_rates, _gains),
    AppendLine: (_appends, _time_gains),
    LearnLine: (_products, _time_gains, _memory),
    GenerateLine: (_contenders, _generate_gains),
    LayerLine: (_layers,),
    MixedLine: (_mixes,),
}


def _refusals(table: ResultTable) -> Table:
    """One line for each peer and reason, with the shapes."""
    shapes: dict[tuple[str, str], list[Shape | Case]] = {}
    for refusal in table.refusals:
        shapes.setdefault((refusal.who, refusal.reason), []).append(refusal.shape)
    grid = Table.grid(padding=(0, 1))
    for (who, reason), seen in shapes.items():
        where = ", ".join(str(shape) for shape in seen)
        grid.add_row(Text("-"), Text(f"no {who} at {where}: {reason}"))
    return grid


def _us(us: float) -> str:
    return f"{us:,.1f}"


def _timing(us: Timing) -> tuple[str, str]:
    return _us(us.median), _range(us)


def _range(us: Timing) -> str:
    """Return how far the fastest and the slowest round are from the median."""
    if us.median <= 0:  # a difference of two times
        return f"{us.low:.1f} to {us.high:.1f}"
    low, high = (f"{x / us.median - 1:+.0%}" for x in (us.low, us.high))
    return f"{low} {high}"
