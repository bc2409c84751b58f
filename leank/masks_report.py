"""What ``leank masks`` prints, and the table of what a mask costs on a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leank.shipped import ShippedMask


def print_masks(records: Sequence[ShippedMask], console: Console) -> None:
    """Print one line for each shipped mask; 80 columns are enough."""
    if not records:
        console.print("No masks are shipped with this version.")
        return
    # Names are to be copied, so they get the room that a frame would take.
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for name in ("window", "align", "K kept", "KV bytes", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            record.name,
            f"{record.sink}+{record.recent}",
            str(record.align),
            f"{record.kept_k:.1%}",
            f"{record.kv_bytes:.1%}",
            points(record.results.get("loss_points")),
        )
    console.print(table)
    console.print(
        Text(
            "\nK kept and KV bytes: shares of a dense cache, outside the window. Loss: points of "
            "the mean test score, dense minus mask. `leank masks NAME` tells all of one.",
            style="dim",
        )
    )


def print_mask(record: ShippedMask, console: Console) -> None:
    """Print everything that is known of a shipped mask."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    where = record.gpu or "a CPU"
    rows = {
        "name": record.name,
        "model": record.model,
        "window": f"the first {record.sink:,} and the last {record.recent:,} tokens keep all",
        "K kept": f"{record.kept_k:.2%} ({record.ratio:.2%} dropped), "
        f"in multiples of {record.align} channels",
        "V kept": f"{record.kept_v:.2%}; {record.empty_heads:.2%} of the heads are empty",
        "KV bytes": f"{record.kv_bytes:.2%} of a dense cache, outside the window",
        "learned": f"in {record.seconds:.1f} s on {where}, seed {record.seed}, "
        f"commit {record.commit}",
        "command": record.command,
    }
    for name, value in rows.items():
        grid.add_row(f" {name}", Text(value))
    console.print(grid)
    if record.results.get("kinds"):
        console.print(scores_table(record.results))


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
