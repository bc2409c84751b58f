"""Draw the README's picture, docs/picture.png: `python docs/picture.py`.

Its bytes are those of a mask's widths in the package, its times those of the table in
kernels/README.md, so that it is drawn again when a new run is recorded there.
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leank.bench.profiles import dense_bytes, load_profiles, needed_bytes

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "picture.png"
_PROFILE, _LENGTHS, _WINDOW = "llama-3.1-8b", (8, 32, 128), {"sink": 128, "recent": 896}
_DENSE, _PRUNED, _INK = "#b9c4cc", "#1b6ca8", "#333333"


def cache_gb() -> list[tuple[str, float, float]]:
    """Return (label, dense, LeanK): GB of K and V of one text in bfloat16, all layers."""
    keep = load_profiles()[_PROFILE].keep(seed=0)
    rows = []
    for thousands in _LENGTHS:
        length = thousands * 1024
        dense = sum(dense_bytes(layer, 1, length) for layer in keep)
        pruned = sum(needed_bytes(layer, 1, length, **_WINDOW) for layer in keep)
        rows.append((f"{thousands}k tokens", dense / 1e9, pruned / 1e9))
    return rows


def gains() -> list[tuple[str, float]]:
    """Return (shape, gain over the fastest dense peer) of the table in kernels/README.md."""
    lines = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| shape | byte ratio |"))
    column = _cells(lines[start]).index("gain")
    rows, model = [], ""
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = _cells(line)
        found = re.fullmatch(r"(?:([A-Z][a-z]+) \d+/\d+, )?B (\d+), L (\w+)", cells[0])
        model = found[1] or model  # rows below the first of a model have the shape alone
        rows.append((f"{model}, {found[2]} x {found[3]} tokens", float(cells[column])))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def draw(path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(8.4, 3.3), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    rows = [(name, a, b, f"{a:.1f} GB", f"{b:.1f} GB") for name, a, b in cache_gb()]
    _bars(left, rows)
    left.set_title("KV cache of Llama 3.1 8B, one text", fontsize=10, color=_INK)
    rows = [(shape, 1.0, 1 / gain, "", f"{gain:.2f}x") for shape, gain in gains()]
    _bars(right, rows)
    right.set_title("Time to attend to it, each step, on an H100", fontsize=10, color=_INK)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _bars(axes: Axes, rows: list[tuple[str, float, float, str, str]]) -> None:
    """Draw (label, dense, LeanK, what to write at either bar)."""
    places = range(len(rows))
    axes.barh([i - 0.2 for i in places], [row[1] for row in rows], 0.38, color=_DENSE,
              label="dense (time: fastest of cuDNN, FlashAttention, FlexAttention)")  # fmt: skip
    axes.barh([i + 0.2 for i in places], [row[2] for row in rows], 0.38, color=_PRUNED,
              label="LeanK")  # fmt: skip
    top = max(row[1] for row in rows)
    for i, (_, a, b, *texts) in enumerate(rows):
        for place, value, text in zip((i - 0.2, i + 0.2), (a, b), texts, strict=True):
            axes.text(value + 0.015 * top, place, text, va="center", fontsize=8, color=_INK)
    axes.set_yticks(list(places), [row[0] for row in rows], fontsize=8, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, top * 1.18)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_DENSE)


if __name__ == "__main__":
    draw(PICTURE)
