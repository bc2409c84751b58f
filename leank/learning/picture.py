"""Pictures of a run: the factors of stage 1 beside the mask, and the course of the losses.

Nothing but this module and `leank.evaluation.picture` imports matplotlib, and both leave that
library's global state alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

DPI = 120
_KEPT, _DROPPED = "#1b4f72", "#eceff1"
_STAGE = {1: "#c0561f", 2: "#1f6fb4"}
GREY = "#666666"
_DEEPEST = 1e-3  # the least loss that is shown, in medians
_SMOOTH = 0.9  # share of the running mean that stays at each step


def draw_alpha(
    path: Path, alpha: npt.NDArray[np.floating], keep: npt.NDArray[np.bool_], title: str = ""
) -> None:
    """Write a picture of factors [N, Hkv, D] from 0 to 1, of the mask, and of its heads' widths.

    Each row of pixels is one KV head; a layer's heads stand together. Rows are drawn large enough
    to be told apart.
    """
    n_layers, n_heads, head_dim = alpha.shape
    n_rows = n_layers * n_heads
    height = float(np.clip(n_rows * 0.075, 5, 15))
    width = 7.5 + 2 * head_dim * 0.03
    figure = Figure(figsize=(width, height + 1.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 2), sharey=True)
    extent = (-0.5, head_dim - 0.5, n_layers - 0.5, -0.5)
    options = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    image = left.imshow(
        np.asarray(alpha, np.float64).reshape(n_rows, head_dim),
        vmin=0,
        vmax=1,
        cmap="magma",
        **options,
    )
    left.set_title("factors after stage 1", loc="left", fontsize=10)
    bar = figure.colorbar(image, ax=left, location="bottom", aspect=40, pad=0.015)
    bar.set_label("alpha: 0 not needed, 1 needed in full", fontsize=9)
    middle.imshow(keep.reshape(n_rows, head_dim), cmap=ListedColormap([_DROPPED, _KEPT]), **options)
    middle.set_title(f"kept (dark): {keep.mean():.1%} of K", loc="left", fontsize=10)
    _draw_widths(right, keep)
    for axes in (left, middle):
        axes.set_xlabel("channel")
        axes.set_xticks(np.arange(0, head_dim + 1, max(8, head_dim // 8)).clip(max=head_dim - 1))
    _draw_layers((left, middle, right), n_layers)
    left.set_ylabel(f"layer, its {n_heads} KV heads from top to bottom")
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)


def _draw_widths(axes: Axes, keep: npt.NDArray[np.bool_]) -> None:
    n_layers, n_heads, head_dim = keep.shape
    widths = keep.sum(-1).reshape(-1)
    centres = (np.arange(len(widths)) + 0.5) / n_heads - 0.5
    axes.barh(centres, widths, height=0.86 / n_heads, color=_KEPT, linewidth=0)
    empty = widths == 0
    axes.plot(np.full(empty.sum(), head_dim * 0.02), centres[empty], ".", color="#c0392b", ms=3)
    axes.set_xlim(0, head_dim)
    axes.set_xticks([0, head_dim // 2, head_dim])
    axes.set_xlabel("channels kept")
    axes.set_title(f"{empty.mean():.0%} empty (red)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_layers(all_axes: Sequence[Axes], n_layers: int) -> None:
    """Write the numbers of layers, and draw lines between them."""
    step = max(1, -(-n_layers // 40))
    all_axes[0].set_yticks(np.arange(0, n_layers, step))
    for i, axes in enumerate(all_axes):
        axes.tick_params(axis="y", labelsize=8, length=0)
        color = ("#ffffff", "#9aa5ad", "#d5dadd")[i]
        for border in np.arange(n_layers - 1) + 0.5:
            axes.axhline(border, color=color, linewidth=0.5)


def draw_losses(path: Path, steps: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Write a picture of the losses of both stages, with mean alpha and learning rate below.

    Parameters
    ----------
    path : Path
    steps : sequence of mappings
        With the fields of `leank.learning.train.Step`, in order.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    x = np.arange(1, len(steps) + 1)
    stages = np.array([step["stage"] for step in steps])
    loss = _numbers(steps, "loss")
    loss[~(loss > 0)] = np.nan  # what a logarithm cannot show
    for stage in sorted(set(stages.tolist())):
        mine = stages == stage
        color = _STAGE.get(stage, GREY)
        top.plot(x[mine], loss[mine], color=color, alpha=0.25, linewidth=0.8)
        label = f"stage {stage}, running mean of training"
        top.plot(x[mine], _running_mean(loss[mine]), color=color, linewidth=1.8, label=label)
    _draw_validation(top, x, steps)
    if np.isfinite(loss).any():
        top.set_yscale("log")
        top.set_ylim(bottom=_bottom(loss[np.isfinite(loss)]))
    top.set_ylabel("loss: mean (h - h')²")
    top.grid(True, which="both", color="#eeeeee", linewidth=0.6)
    top.legend(frameon=False, fontsize=9)
    _draw_course(below, x, steps)
    _draw_stages((top, below), stages)
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=DPI)


def _bottom(losses: npt.NDArray[np.float64]) -> float:
    """Return where the axis of positive losses begins.

    Factors of 1 change nothing: the first loss is that of rounding alone, and would fill the axis.
    """
    return float(max(losses.min(), _DEEPEST * np.median(losses))) / 2


def _draw_validation(axes: Axes, x: np.ndarray, steps: Sequence[Mapping[str, Any]]) -> None:
    validation = _numbers(steps, "validation")
    validation[~(validation > 0)] = np.nan
    improved = np.array([bool(step.get("improved")) for step in steps])
    for which, filled, label in (
        (improved, True, "validation, the best mask so far"),
        (~improved, False, "validation, not better"),
    ):
        at = which & np.isfinite(validation)
        if at.any():
            axes.plot(
                x[at],
                validation[at],
                "o",
                color="black",
                markerfacecolor="black" if filled else "white",
                markersize=5,
                label=label,
            )


def _draw_course(axes: Axes, x: np.ndarray, steps: Sequence[Mapping[str, Any]]) -> None:
    """Draw mean alpha and the share of small ones on the left axis, the rate on the right one."""
    lines: list[Line2D] = []
    for name, label, color in (
        ("mean_alpha", "mean alpha", "#2e7d32"),
        ("low_share", "share under 0.1", "#8e44ad"),
    ):
        lines += axes.plot(x, _numbers(steps, name), color=color, linewidth=1.5, label=label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("alpha")
    axes.set_xlabel("step")
    axes.grid(True, color="#eeeeee", linewidth=0.6)
    rate = axes.twinx()
    options = {"color": GREY, "linewidth": 1, "linestyle": "--"}
    lines += rate.plot(x, _numbers(steps, "lr"), label="learning rate (right)", **options)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate", color=GREY)
    rate.tick_params(axis="y", labelcolor=GREY)
    place = {"loc": "upper left", "bbox_to_anchor": (0, -0.32), "borderaxespad": 0}
    axes.legend(handles=lines, frameon=False, fontsize=9, ncols=3, **place)


def _draw_stages(all_axes: Sequence[Axes], stages: np.ndarray) -> None:
    for border in np.flatnonzero(np.diff(stages)) + 1.5:
        for axes in all_axes:
            axes.axvline(border, color=GREY, linewidth=0.8, linestyle=":")


def _numbers(steps: Sequence[Mapping[str, Any]], name: str) -> npt.NDArray[np.float64]:
    values = (step.get(name) for step in steps)
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _running_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return exponentially weighted means, whose weights add to 1 from the first one on."""
    total = weight = 0.0
    means = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total = _SMOOTH * total + (1 - _SMOOTH) * value
            weight = _SMOOTH * weight + (1 - _SMOOTH)
        if weight:
            means[i] = total / weight
    return means
