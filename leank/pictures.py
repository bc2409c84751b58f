"""Pictures of masks: what heads keep, by channel and by rotary frequency, and what they attend to.

Nothing but this module, `leank.learning.picture` and `leank.evaluation.picture` imports matplotlib,
and they leave that library's global state alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from leank.inspection import Inspection

if TYPE_CHECKING:
    from leank.memory import MemoryReport

GREY = "#666666"
_DPI = 120
_KEPT, _DROPPED, _EMPTY = "#1b4f72", "#eceff1", "#c0392b"
_V = "#7fb3d5"
NAMES = ("mask.png", "frequencies.png", "heads.png")


def draw(folder: str | os.PathLike[str], found: Inspection, title: str = "") -> list[Path]:
    """Write mask.png, frequencies.png and heads.png into a folder, which is made if need be.

    A model without a rotary embedding has no frequencies.png; an older one is removed.
    """
    paths = [Path(folder, name) for name in NAMES]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    draw_mask(paths[0], found, title)
    draw_heads(paths[2], found, title)
    if not found.turned.any():
        paths[1].unlink(missing_ok=True)
        return [paths[0], paths[2]]
    draw_frequencies(paths[1], found, title)
    return paths


def draw_mask(path: Path, found: Inspection, title: str = "") -> None:
    """Write a picture of a mask [N, Hkv, D], and of its heads' widths.

    Each row of pixels is one KV head; a layer's heads stand together.
    """
    keep = found.keep
    n_layers, n_heads, head_dim = keep.shape
    size = (4.5 + head_dim * 0.04, heads_height(n_layers * n_heads) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 2), sharey=True)
    show_keep(left, keep)
    show_widths(right, keep)
    mark_layers({left: "#9aa5ad", right: "#d5dadd"}, found.layers)
    left.set_ylabel(f"layer, its {n_heads} KV heads from top to bottom")
    save(figure, path, title)


def draw_frequencies(path: Path, found: Inspection, title: str = "") -> None:
    """Write a picture of the share of each rotary pair that is kept, in all layers and in each."""
    layers = [layer for layer, turned in zip(found.layers, found.turned, strict=True) if turned]
    by_layer = found.kept_of_pair[found.turned].mean(1) / 2
    n_layers, n_pairs = by_layer.shape
    size = (9, 3.2 + float(np.clip(n_layers * 0.11, 1.2, 6)))
    figure = Figure(figsize=size, layout="constrained")
    ratios = (2.4, size[1] - 3.2)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    top.bar(np.arange(n_pairs), 100 * found.pair_shares, color=_KEPT, width=0.8)
    best = found.outstanding_pair
    if best is not None:
        top.bar(best[0], 100 * best[1], color=_EMPTY, width=0.8)
        text = f"pair {best[0]}: {best[1]:.0%}"
        # Over the dotted line, which may be beside it.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        place = {"ha": "center", "va": "bottom", "fontsize": 8, "color": _EMPTY, "bbox": box}
        top.text(best[0], 100 * best[1] + 1, text, **place)
    top.set_ylabel("% kept, all heads")
    top.margins(x=0.01, y=0.1)
    top.spines[["top", "right"]].set_visible(False)
    if found.low_half is not None:
        top.axvline((n_pairs + 1) // 2 - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        text = f"{found.low_half:.0%} of the kept channels are right of the dotted line"
        top.set_title(text, loc="left", fontsize=10)
    image = below.imshow(
        100 * by_layer, vmin=0, vmax=100, cmap="magma", **image_options(n_layers, n_pairs)
    )
    below.set_xlabel("rotary pair, from the highest frequency to the lowest")
    mark_layers({below: "none"}, layers)
    below.set_ylabel("layer")
    figure.colorbar(image, ax=below, pad=0.01).set_label("% kept", fontsize=9)
    save(figure, path, title)


def draw_heads(path: Path, found: Inspection, title: str = "") -> None:
    """Write a picture of what each KV head keeps and, if it is known, of its attention's mass.

    Where the mass is known, the last panel sets one against the other.
    """
    widths, mass = found.widths, found.kv_mass
    (n_layers, n_heads), head_dim = widths.shape, found.mask.head_dim
    n_maps = 1 if mass is None else 2
    size = (max(5.5, n_heads * 0.35 * n_maps + 3) + 4.5, max(4, n_layers * 0.17 + 1.4))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, n_maps + 1, width_ratios=(*[1] * n_maps, 1.2))
    maps = {"channels kept (x: none)": (panels[0], widths, head_dim)}
    if mass is not None:
        maps["attention to the middle"] = panels[1], mass, max(mass.max(), 1e-3)
    for name, (axes, values, most) in maps.items():
        options = image_options(n_layers, n_heads)
        image = axes.imshow(values, vmin=0, vmax=most, cmap="cividis", **options)
        figure.colorbar(image, ax=axes, pad=0.02)
        empty = np.argwhere(widths == 0)
        axes.plot(empty[:, 1], empty[:, 0], "x", color=_EMPTY, ms=4)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("KV head")
        axes.set_xticks(np.arange(0, n_heads, max(1, n_heads // 8)))
        mark_layers({axes: "none"}, found.layers)
    panels[0].set_ylabel("layer")
    last = panels[-1]
    if mass is None:
        _show_counts(last, found)
    else:
        last.plot(widths.reshape(-1), mass.reshape(-1), "o", color=_KEPT, alpha=0.5, ms=5)
        by_width = found.mass_relation.by_width
        means = [line[2] for line in by_width.values()]
        last.plot(list(by_width), means, "_", color=_EMPTY, ms=24, mew=2, label="mean")
        last.set_xlim(-0.15 * head_dim, 1.15 * head_dim)  # room for the marks of means
        last.set_ylim(bottom=0)
        last.set_xlabel("channels kept")
        last.set_ylabel("attention to the middle")
        correlation = found.mass_relation.correlation
        text = "" if correlation is None else f"rank correlation {correlation:+.2f}"
        last.set_title(text, loc="left", fontsize=10)
        last.legend(frameon=False, fontsize=9)
    last.spines[["top", "right"]].set_visible(False)
    save(figure, path, title)


def draw_memory(path: Path, reports: Mapping[str, MemoryReport], title: str = "") -> None:
    """Write a picture of what caches hold, a bar for each; what `leank.memory_report` returns."""
    totals = [report.total for report in reports.values()]
    figure = Figure(figsize=(8, 1.4 + 0.55 * len(totals)), layout="constrained")
    axes = figure.subplots()
    k, v = (np.array([getattr(x, name) for x in totals]) / 1e6 for name in ("k_bytes", "v_bytes"))
    names = list(reports)
    axes.barh(names, k, color=_KEPT, label="K")
    bars = axes.barh(names, v, left=k, color=_V, label="V")
    texts = [f"{x.total_bytes / 1e6:,.1f} MB, {1 - x.saved:.0%} of dense" for x in totals]
    axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_xlim(0, 1.35 * (k + v).max(initial=1e-6))
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    save(figure, path, title)


def _show_counts(axes: Axes, found: Inspection) -> None:
    names = [str(width) for width in found.heads_of_width]
    counts = list(found.heads_of_width.values())
    colors = [_EMPTY if name == "0" else _KEPT for name in names]
    axes.bar_label(axes.bar(names, counts, color=colors), fontsize=9)
    axes.set_xlabel("channels kept")
    axes.set_ylabel("heads")


# ------------------------------------------------------------------------------ parts of pictures


def heads_height(n_rows: int) -> float:
    """Return the inches that so many heads need to be told apart."""
    return float(np.clip(n_rows * 0.075, 5, 15))


def image_options(n_layers: int, n_columns: int) -> dict[str, object]:
    """Return options of imshow; a row's middle is at the layer's place, whatever its heads."""
    extent = (-0.5, n_columns - 0.5, n_layers - 0.5, -0.5)
    return {"aspect": "auto", "interpolation": "nearest", "extent": extent}


def show_keep(axes: Axes, keep: npt.NDArray[np.bool_]) -> None:
    """Show a mask [N, Hkv, D], a row of pixels for each head."""
    n_layers, _, head_dim = keep.shape
    colors = ListedColormap([_DROPPED, _KEPT])
    options = image_options(n_layers, head_dim) | {"vmin": 0, "vmax": 1}
    axes.imshow(keep.reshape(-1, head_dim), cmap=colors, **options)
    axes.set_title(f"kept (dark): {keep.mean():.1%} of K", loc="left", fontsize=10)
    mark_channels(axes, head_dim)


def mark_channels(axes: Axes, head_dim: int) -> None:
    """Write the numbers of channels."""
    axes.set_xlabel("channel")
    axes.set_xticks(np.arange(0, head_dim + 1, max(8, head_dim // 8)).clip(max=head_dim - 1))


def show_widths(axes: Axes, keep: npt.NDArray[np.bool_]) -> None:
    """Show how many channels each head of a mask keeps."""
    _, n_heads, head_dim = keep.shape
    widths = keep.sum(-1).reshape(-1)
    centres = (np.arange(len(widths)) + 0.5) / n_heads - 0.5
    axes.barh(centres, widths, height=0.86 / n_heads, color=_KEPT, linewidth=0)
    empty = widths == 0
    axes.plot(np.full(empty.sum(), head_dim * 0.02), centres[empty], ".", color=_EMPTY, ms=3)
    axes.set_xlim(0, head_dim)
    axes.set_xticks([0, head_dim // 2, head_dim])
    axes.set_xlabel("channels kept")
    axes.set_title(f"{empty.mean():.0%} empty (red)", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def mark_layers(colors: Mapping[Axes, str], layers: Sequence[int]) -> None:
    """Write the numbers of layers on the first axes, and draw lines between layers on all."""
    n_layers, first = len(layers), next(iter(colors))
    places = np.arange(0, n_layers, max(1, -(-n_layers // 40)))
    first.set_yticks(places, [str(layers[i]) for i in places])
    for axes, color in colors.items():
        axes.tick_params(axis="y", labelsize=8, length=0)
        if color != "none":
            for border in np.arange(n_layers - 1) + 0.5:
                axes.axhline(border, color=color, linewidth=0.5)


def save(figure: Figure, path: Path, title: str = "") -> None:
    """Write a figure, under its title."""
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=_DPI)
