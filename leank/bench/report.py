"""What ``leank bench decode`` prints at the end."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from leank.bench.work import AppendLine, LayerLine, Line, MixedLine, Result, Shape
from leank.bench.work import Table as ResultTable


def print_report(result: Result, console: Console, *, peers: bool) -> None:
    """Print the result, in colour if the console has any; 80 columns are enough.

    peers : whether to print the times of all dense peers, not of the best one alone
    """
    console.print()
    console.print(_facts(result))
    for table in result.tables:
        console.print(_heading(table))
        for kind, draw in _KINDS.items():
            if lines := [line for line in table.lines if isinstance(line, kind)]:
                console.print(draw(lines))
                if kind is Line and peers and any(line.dense_us for line in lines):
                    console.print(_all_peers(lines))
        if table.refusals:
            console.print(_refusals(table))
    console.print(_how(result))


def _facts(result: Result) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in result.facts.items():
        grid.add_row(f" {name}", Text(str(value)))
    return grid


def _heading(table: ResultTable) -> Group:
    shape = (
        f"\n {table.name}: {table.n_layers} layers, Hq/Hkv {table.n_q_heads}/{table.n_heads}, "
        f"D {table.head_dim}"
    )
    check = (
        f" checked: largest error {table.error:.1e} of its head's largest output, "
        f"bound {table.bound:.1e}"
    )
    return Group(Text(shape, style="bold"), Text(check, style="green"))


def _box(*names: str) -> Table:
    """Return a table of numbers; the first column is the B x L of a row."""
    table = Table(box=box.ROUNDED, header_style="bold")
    table.add_column("B x L", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    return table


def _gains(lines: list[Line]) -> Table:
    table = _box("byte ratio", "LeanK us", "best dense us", "which", "gain", "TB/s")
    for line in lines:
        best = ["-"] * 3
        if line.best is not None:
            best = [_us(line.dense_us[line.best]), line.best, f"{line.gain:.2f}"]
        mine = f"{line.byte_ratio:.2f}", _us(line.us)
        table.add_row(str(line.shape), *mine, *best, f"{line.tb_s:.2f}")
    return table


def _all_peers(lines: list[Line]) -> Table:
    names = list(dict.fromkeys(name for line in lines for name in line.dense_us))
    table = _box(*(f"{name} us" for name in names))
    for line in lines:
        times = (line.dense_us.get(name) for name in names)
        table.add_row(str(line.shape), *("-" if us is None else _us(us) for us in times))
    return table


def _layers(lines: list[LayerLine]) -> Table:
    table = _box("layer", "MB", "us", "TB/s", "sum TB/s", "share")
    for line in lines:
        numbers = f"{line.needed_bytes / 1e6:.2f}", _us(line.us), f"{line.tb_s:.2f}"
        plain = f"{line.plain_tb_s:.2f}", f"{line.share:.0%}"
        table.add_row(str(line.shape), str(line.layer), *numbers, *plain)
    return table


def _appends(lines: list[AppendLine]) -> Table:
    table = _box("attend us", "store and attend us", "share of storing")
    for line in lines:
        row = _us(line.attending_us), _us(line.storing_us), f"{line.share:.1%}"
        table.add_row(str(line.shape), *row)
    return table


def _mixes(lines: list[MixedLine]) -> Table:
    table = _box("widths", "mixed us", "equal us", "ratio")
    for line in lines:
        widths = f"{line.widths[0]} to {line.widths[-1]}"
        row = widths, _us(line.mixed_us), _us(line.equal_us), f"{line.ratio:.3f}"
        table.add_row(str(line.shape), *row)
    return table


_KINDS: dict[type, Callable[[list], Table]] = {
    Line: _gains,
    LayerLine: _layers,
    AppendLine: _appends,
    MixedLine: _mixes,
}


def _refusals(table: ResultTable) -> Table:
    """One line for each peer and reason, with the shapes."""
    shapes: dict[tuple[str, str], list[Shape]] = {}
    for refusal in table.refusals:
        shapes.setdefault((refusal.who, refusal.reason), []).append(refusal.shape)
    grid = Table.grid(padding=(0, 1))
    for (who, reason), seen in shapes.items():
        where = ", ".join(str(shape) for shape in seen)
        grid.add_row(Text("-"), Text(f"no {who} at {where}: {reason}"))
    return grid


def _how(result: Result) -> Text:
    text = (
        f"\nTimes are us of one layer: medians of {result.facts['rounds']} replays of CUDA graphs, "
        "with the L2 cache evicted before each. LeanK stores the new token and attends."
    )
    if any(isinstance(line, Line) for table in result.tables for line in table.lines):
        text += (
            " Its time is the mean over the layers; dense peers only attend. TB/s: bytes that "
            "LeanK must read, by its time."
        )
    if any(isinstance(line, LayerLine) for table in result.tables for line in table.lines):
        text += " Sum: what torch.sum reads per time of all that the same caches hold."
    return Text(text, style="dim")


def _us(us: float) -> str:
    return f"{us:,.1f}"
