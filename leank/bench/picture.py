"""A picture of what ``leank bench`` found: rates against amounts, under what the machine reaches.

It leaves matplotlib's global state alone, as `leank.pictures` does.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from leank.bench.lines import Line, Result
from leank.pictures import GREY, save

_OURS, _DENSE = "#c0561f", "#1b4f72"
_OUR_MARKERS, _DENSE_MARKERS = "oPX", "sD^v<>"
# What is counted: the units of an amount, what it is, the unit of a rate, and the line above all.
_UNITS = {
    "bytes": ("KB MB GB TB", "that a step must move", "GB/s", "reading memory"),
    "operations": ("kFLOP MFLOP GFLOP TFLOP", "of a step", "TFLOP/s", "torch's matmul"),
}
_RATES = {"GB/s": 1e9, "TFLOP/s": 1e12}
_TIMES = {10.0**k: f"{10 ** (k % 3)} {'us ms s'.split()[k // 3]}" for k in range(9)}


def draw(path: Path, result: Result) -> bool:
    """Write the picture; return False where the result has no line that it could show.

    Each mark is a contender at a shape. Faint lines connect what takes the same time.
    """
    lines = [x for table in result.tables for x in table.lines if isinstance(x, Line)]
    lines = [line for line in lines if line.has_rate]
    if not lines:
        return False
    units, counted, rate_name, reached = _UNITS[lines[0].what]
    amounts = [amount for line in lines for amount, _ in line.amounts().values()]
    power = min(4, max(1, int(math.log10(max(amounts)) / 3)))
    amount_unit, rate_unit = 1e3**power, _RATES[rate_name]
    x_label = f"{units.split()[power - 1]} {counted}"
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axes = figure.subplots()
    markers: dict[str, tuple[str, str]] = {}
    marks = []
    labels = []
    for line in lines:
        for name, (amount, us) in line.amounts().items():
            color, marker = markers.setdefault(name, _marker(name, markers))
            x, y = amount / amount_unit, amount / us.median * 1e6 / rate_unit
            low, high = (amount / end * 1e6 / rate_unit for end in (us.high, max(us.low, 1e-9)))
            marks.append((x, y))
            axes.vlines(x, low, high, color=color, linewidth=1)
            axes.plot(x, y, marker, color=color, markersize=8, markeredgecolor="white")
            if name in ("LeanK", line.best):
                labels.append((x, y, str(line.shape), color))
    peaks = [line.peak / rate_unit for line in lines]
    _frame(axes, np.array(marks), peaks, amount_unit / rate_unit * 1e6)
    label = f"{reached}, measured: {_span(peaks)} {rate_name}"
    axes.axhspan(min(peaks), max(peaks), color=GREY, linewidth=0, alpha=0.25)
    axes.axhline(max(peaks), color=GREY, linewidth=1.4, label=label)
    for name, (color, marker) in markers.items():
        axes.plot([], [], marker, color=color, markersize=8, label=name)
    axes.set_xlabel(f"{x_label} (faint lines: the same time)")
    axes.set_ylabel(rate_name)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    _label(axes, labels)
    save(figure, path, _title(result))
    return True


def _marker(name: str, seen: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return colour and shape: LeanK's contenders are of one colour, dense ones of another."""
    color, markers = (_OURS, _OUR_MARKERS) if name.startswith("LeanK") else (_DENSE, _DENSE_MARKERS)
    n = sum(of == color for of, _ in seen.values())
    return color, markers[n % len(markers)]


def _frame(axes: Axes, marks: np.ndarray, peaks: list[float], us: float) -> None:
    """Set the axes, and draw lines of equal time; `us`: of one unit at one unit's rate."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    (left, low), (right, high) = marks.min(0), marks.max(0)
    left, right = left / 2, right * 2.5
    low, high = low / 2, max(high, *peaks) * 1.6
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    for axis, span in ((axes.xaxis, right / left), (axes.yaxis, high / low)):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1e3 else (1,)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(NullFormatter())
    for time, text in _TIMES.items():
        ends = np.array([left, right])
        axes.plot(ends, ends * us / time, color="#e3e6e8", linewidth=0.8, zorder=0)
        # Where the line enters the picture.
        x, y = max(left, low * time / us), max(low, left * us / time)
        if x < right / 1.5 and y < high / 1.5:
            place = {"xytext": (3, 4), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(text, (x, y), color="#9aa5ad", annotation_clip=True, **place)


def _label(axes: Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write texts beside marks, (x, y, text, colour) each, and none over another."""
    axes.figure.draw_without_rendering()  # from here on places are known
    taken: list[tuple[str, float, float]] = []
    for x, y, text, color in sorted(labels, key=lambda label: label[1]):
        # LeanK moves less than others, which are right of it.
        side, ha = (-9, "right") if color == _OURS else (9, "left")
        across, mark = axes.transData.transform((x, y)) * 72 / axes.figure.dpi  # points
        height = mark
        for of, beside, other in sorted(taken, key=lambda place: place[2]):
            if of == ha and abs(across - beside) < 50 and abs(height - other) < 11:
                height = other + 11
        taken.append((ha, across, height))
        place = {"xytext": (side, height - mark - 3), "textcoords": "offset points", "ha": ha}
        axes.annotate(text, (x, y), fontsize=9, color=color, **place)


def _span(values: list[float]) -> str:
    low, high = (f"{x:,.3g}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _title(result: Result) -> str:
    names = ", ".join(table.name for table in result.tables)
    facts = result.facts
    return f"{facts.get('GPU') or facts.get('CPU')}, {facts['dtype']}: {names}"
