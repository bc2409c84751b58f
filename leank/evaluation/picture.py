"""Pictures of an evaluation: needles found by depth and length, and scores against bytes.

It leaves matplotlib's global state alone, as `leank.pictures` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from leank.evaluation.summary import N_DEPTHS
from leank.pictures import GREY, save

_METHOD, _DENSE = "#c0561f", "#1b4f72"
_SPAN = 10  # points that the scores' axis has at least


def draw_needle(path: Path, needle: Mapping[str, Any], title: str = "") -> None:
    """Write a heat map of mean scores, depth x length; cells without an item are grey."""
    lengths = needle["lengths"]
    scores = np.array(
        [[np.nan if x is None else x for x in row] for row in needle["score"]], np.float64
    )
    figure = Figure(figsize=(max(5.0, 2.6 + 1.1 * len(lengths)), 5.2), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["RdYlGn"].with_extremes(bad="#d5dadd")
    image = axes.imshow(scores, vmin=0, vmax=1, cmap=colours, aspect="auto")
    for row, column in np.argwhere(np.isfinite(scores)).tolist():
        score = scores[row, column]
        ink = "#222222" if 0.15 < score < 0.85 else "white"  # the ends of the colours are dark
        axes.text(column, row, f"{score:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_xlabel("tokens")
    axes.set_yticks(
        np.arange(N_DEPTHS + 1) - 0.5, [f"{i / N_DEPTHS:.0%}" for i in range(N_DEPTHS + 1)]
    )
    axes.set_ylabel("depth of the needle in the prompt")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="score")
    save(figure, path, title)


def draw_bytes(path: Path, summary: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Write a plot of mean score against the bytes of a cache, with the interval of the loss."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    dense = summary[0]["mean"]["score"]
    axes.axhline(100 * dense, color=_DENSE, linewidth=1, linestyle="--")
    for i, method in enumerate(summary):
        mean, share = method["mean"], 100 * method["bytes_share"]
        score = 100 * mean["score"]
        colour = _DENSE if i == 0 else _METHOD
        if i and mean["low_points"] is not None:
            # The interval is that of the loss: what it leaves of dense's score.
            ends = 100 * dense - np.array([mean["high_points"], mean["low_points"]])
            axes.vlines(share, *ends.clip(0, 100), color=colour, linewidth=1.4)
        axes.plot(share, score, "o", color=colour, markersize=7)
        # Methods that keep and score alike would write their names over each other.
        side, ha = (7, "left") if share < 60 else (-7, "right")  # long names stay inside
        place = {"xytext": (side, (5, -10, 14, -19)[i % 4]), "textcoords": "offset points"}
        axes.annotate(method["name"], (share, score), ha=ha, fontsize=8, color=GREY, **place)
    axes.set_xlim(0, max(110, 110 * max(method["bytes_share"] for method in summary)))
    axes.margins(y=0.1)  # room for names
    low, high = axes.get_ylim()
    if high - low < _SPAN:  # equal scores would be spread over parts of a point
        axes.set_ylim((low + high - _SPAN) / 2, (low + high + _SPAN) / 2)
    axes.set_xlabel("bytes of the cache, % of dense")
    axes.set_ylabel("mean score, %; lines: 95% interval of the loss")
    axes.grid(True, color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, title)


def draw_results(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a plot of scores against bytes, from records of `leank.pytest_plugin`.

    A line joins results that differ in nothing but their first parameter; its values are written
    beside the points.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    # By what is on one line: its points, and at each of them the values of the first parameter.
    series: dict[str, dict[tuple[float, float], list[str]]] = {}
    for record in records:
        [(first, value), *others] = list(record["parameters"].items()) or [("", "")]
        name = record["name"].rpartition("::")[2].removeprefix("test_")
        label = ", ".join(
            [f"{name} by {first}" if first else name, *(f"{k} {v}" for k, v in others)]
        )
        point = 100 * record["values"]["bytes_share"], 100 * record["values"]["score"]
        series.setdefault(label, {}).setdefault(point, []).append(str(value))
    for i, (label, points) in enumerate(series.items()):
        [line] = axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        for point, values in points.items():
            # Lines that are alike would write over each other.
            place = {"xytext": (4, (4, -10, 13, -19)[i % 4]), "textcoords": "offset points"}
            text = ", ".join(dict.fromkeys(values))
            axes.annotate(text, point, fontsize=7, color=line.get_color(), **place)
    axes.set_xlim(0, max(115, 1.15 * axes.dataLim.x1))
    axes.set_ylim(min(-8, axes.dataLim.y0 - 8), max(108, axes.dataLim.y1 + 8))
    axes.set_xlabel("bytes of the cache, % of dense")
    axes.set_ylabel("score, %")
    axes.grid(True, color="#eeeeee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)
