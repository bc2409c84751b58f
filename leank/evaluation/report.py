"""What ``leank eval`` prints, and the pictures that it draws where matplotlib is installed."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leank.masks_report import percent, points

_NOTE = (
    "Loss: points, dense minus method, on the same items, with its two-sided 95% interval (normal "
    "approximation; of a few items it is too narrow). The mean counts tasks alike. Bytes: of the "
    "cache behind a prompt, as a share of a dense one, window and whole pages included."
)


def print_report(summary: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each method but dense, and one of all; 80 columns are enough."""
    for method in summary[1:]:
        if method["tasks"]:
            console.print(Text(f"\n {method['name']}, against dense", style="bold"))
            console.print(_tasks(method))
    console.print(_methods(summary))
    console.print(Text(_NOTE, style="dim"))


def _tasks(method: dict[str, Any]) -> Table:
    table = _table("task", "items", "dense", "score", "loss", "95% interval")
    for task in method["tasks"]:
        table.add_row(task["task"], *_cells(task))
    table.add_section()
    table.add_row(f"mean of {len(method['tasks'])}", *_cells(method["mean"]), style="bold")
    if len(method["lengths"]) > 1:
        table.add_section()
        for length in method["lengths"]:
            table.add_row(f"{length['length']:,} tokens", *_cells(length))
    return table


def _methods(summary: Sequence[dict[str, Any]]) -> Table:
    has_text = summary[0]["text"] is not None
    names = ["method", "bytes", "score", "loss", "95% interval"]
    table = _table(*names, *(("ppl", "KL") if has_text else ()))
    for method in summary:
        mean = method["mean"]
        row = ["-", "-", "-"]
        if mean is not None:
            row = [percent(mean["score"]), points(mean["loss_points"]), _interval(mean)]
        if has_text:
            row += [f"{method['text']['perplexity']:.3f}", f"{method['text']['kl']:.4f}"]
        table.add_row(Text(method["name"]), percent(method["bytes_share"]), *row)
    return table


def _table(first: str, *names: str) -> Table:
    table = Table(box=box.ROUNDED, header_style="bold", padding=(0, 0, 0, 1))
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(scores: dict[str, Any]) -> list[str]:
    return [
        f"{scores['n']:,}",
        percent(scores["dense"]),
        percent(scores["score"]),
        points(scores["loss_points"]),
        _interval(scores),
    ]


def _interval(scores: dict[str, Any]) -> str:
    if scores["low_points"] is None:
        return "-"
    return f"{points(scores['low_points'])} .. {points(scores['high_points'])}"


def draw_pictures(folder: Path, summary: Sequence[dict[str, Any]], title: str) -> list[Path]:
    """Draw a heat map for each method and the plot of bytes; return the files.

    Without matplotlib none are drawn. Those of an earlier evaluation are removed.
    """
    for old in [*folder.glob("needle-*.png"), folder / "bytes.png"]:
        old.unlink(missing_ok=True)
    picture = _picture()
    if picture is None:
        return []
    drawn = []
    for method in summary:
        if method["needle"] is not None:
            safe = re.sub(r"[^\w.-]", "_", method["name"])
            drawn.append(folder / f"needle-{safe}.png")
            picture.draw_needle(
                drawn[-1], method["needle"], f"{title}: needles found, {method['name']}"
            )
    if summary[0]["mean"] is not None:
        drawn.append(folder / "bytes.png")
        picture.draw_bytes(
            drawn[-1], summary, f"{title}: mean score of {len(summary[0]['tasks'])} tasks"
        )
    return drawn


def _picture() -> Any:
    """Return the module that draws; None without matplotlib."""
    try:
        return import_module("leank.evaluation.picture")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None


# -------------------------------------------------------------------- results of experiments


def result_tables(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a table for each test function, by its name: parameters, then values.

    Parameters
    ----------
    records : sequence of dict
        As `leank.pytest_plugin` writes them.
    """
    tables = {}
    for name in dict.fromkeys(record["name"] for record in records):
        mine = [record for record in records if record["name"] == name]
        parameters, values = (
            list(dict.fromkeys(key for record in mine for key in record[part]))
            for part in ("parameters", "values")
        )
        table = _table("outcome", *parameters, *values)
        for record in mine:
            table.add_row(
                record["outcome"],
                *(_plain(record["parameters"].get(key)) for key in parameters),
                *(_plain(record["values"].get(key)) for key in values),
            )
        # Wider than any terminal: lines may wrap, but numbers must not be cut.
        console = Console(file=io.StringIO(), width=1000, color_system=None)
        console.print(table)
        tables[name] = console.file.getvalue().rstrip()
    return tables


def _plain(value: Any) -> Text:
    if value is None:
        return Text("-")
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text(f"{value:,}" if type(value) is int else str(value))


def draw_results(path: Path, records: Sequence[dict[str, Any]]) -> bool:
    """Draw results whose score and share of bytes are numbers.

    Returns whether there are any, and matplotlib is installed.
    """
    needed = ("score", "bytes_share")
    found = [r for r in records if all(isinstance(r["values"].get(k), int | float) for k in needed)]
    picture = _picture() if found else None
    if picture is not None:
        picture.draw_results(path, found)
    return picture is not None
