"""What ``leank masks`` prints, and the table of what a mask costs on a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_masks(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print one line for each shipped mask, `ShippedMask.as_json`; 80 columns are enough."""
    if not lines:
        console.print("No masks are shipped with this version.")
        return
    # Names are to be copied, so they get the room that a frame would take.
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for name in ("window", "align", "K kept", "KV bytes", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            line["name"],
            f"{line['sink']}+{line['recent']}",
            str(line["align"]),
            f"{line['kept_k']:.1%}",
            f"{line['kv_bytes']:.1%}",
            points(line["results"].get("loss_points")),
        )
    console.print(table)
    console.print(
        Text(
            "\nK kept and KV bytes: shares of a dense cache, outside the window. Loss: points of "
            "the mean test score, dense minus mask. `leank masks NAME` tells all of one.",
            style="dim",
        )
    )


def print_mask(
    line: Mapping[str, Any], console: Console, more: Mapping[str, str] | None = None
) -> None:
    """Print everything that is known of a mask: a shipped one's record, or another's numbers.

    more : further facts by name
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    window = "not known"
    if line["sink"] is not None and line["recent"] is not None:
        window = f"the first {line['sink']:,} and the last {line['recent']:,} tokens keep all"
    rows = {
        "name": line["name"],
        "model": line["model"] or "not known",
        "window": window,
        "K kept": f"{line['kept_k']:.2%} ({line['ratio']:.2%} dropped), "
        f"in multiples of {line['align']} channels",
        "V kept": f"{line['kept_v']:.2%}; {line['empty_heads']:.2%} of the heads are empty",
        "KV bytes": f"{line['kv_bytes']:.2%} of a dense cache, outside the window",
    }
    if "command" in line:
        rows["learned"] = (
            f"in {line['seconds']:.1f} s on {line['gpu'] or 'a CPU'}, seed {line['seed']}, "
            f"commit {line['commit']}"
        )
        rows["command"] = line["command"]
    rows |= more or {}
    for name, value in rows.items():
        grid.add_row(f" {name}", Text(value))
    console.print(grid)
    results = line.get("results", {})
    if results.get("kinds"):
        console.print(scores_table(results))


def scores_table(result: Mapping[str, Any]) -> Table:
    """Return a table of dense and mask by kind of task; 80 columns are enough.

    Parameters
    ----------
    result : mapping
        As `leank.learning.evaluate.Evaluation.as_json` gives it.
    """
    table = Table(box=box.ROUNDED, header_style="bold")
    table.add_column("kind", no_wrap=True)
    for name in ("items", "dense", "mask", "loss", "at most", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in result["kinds"]:
        # What is not counted in the mean is dim.
        style = None if kind["kind"] in result["counted"] else "dim"
        kl = f"{kind['kl']:.4f}"
        table.add_row(kind["kind"], f"{kind['n']:,}", *_scores(kind), kl, style=style)
    n = sum(kind["n"] for kind in result["kinds"] if kind["kind"] in result["counted"])
    table.add_section()
    table.add_row(f"mean of {len(result['counted'])}", f"{n:,}", *_scores(result), style="bold")
    return table


def _scores(result: Mapping[str, Any]) -> list[str]:
    shares = [percent(result[key]) for key in ("dense", "mask")]
    losses = [points(result[key]) for key in ("loss_points", "upper_points")]
    return [*shares, *losses]


def percent(share: float | None) -> str:
    """Return a share as a percentage, or "-"."""
    return "-" if share is None else f"{share:.1%}"


def points(value: float | None) -> str:
    """Return points with their sign, or "-"."""
    return "-" if value is None else f"{value:+.2f}"
