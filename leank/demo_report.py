"""What ``leank demo`` prints at the end."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leank.demo import Result

_ROWS = (("K bytes", "k_bytes"), ("V bytes", "v_bytes"), ("K+V bytes", "total_bytes"))


def as_predicted(result: Result) -> bool:
    """Tell whether the pruned cache holds exactly the bytes that the mask predicts."""
    return result.measured.pruned_bytes == result.measured.predicted_bytes


def print_report(result: Result, console: Console) -> None:
    """Print the result, in colour if the console has any; 80 columns are enough."""
    console.print()
    console.print(_facts(result))
    console.print(_answers(result))
    console.print(_numbers(result))
    console.print(_conclusions(result))


def _facts(result: Result) -> Table:
    mask, grid = result.mask, Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    rows = [
        ("model", f"{result.model}, {result.dtype}, {result.n_threads} threads"),
        (
            "mask",
            f"{mask.ratio:.1%} of the K channels dropped, {mask.empty_heads:.1%} of the heads "
            f"empty; the first {mask.sink:,} and the last {mask.recent:,} tokens keep everything",
        ),
        ("text", f"{result.source}, {result.n_text:,} tokens, read before the question"),
    ]
    if result.fact is not None:
        rows.append(("fact", f"{result.fact} (near token {result.fact_token:,})"))
    rows.append(("question", result.question))
    for name, value in rows:
        grid.add_row(f" {name}", Text(value))
    return grid


def _answers(result: Result) -> Table:
    table = Table(box=box.ROUNDED, width=79, header_style="bold")
    for name in ("dense answer", "pruned answer"):
        table.add_column(name, ratio=1)
    answers = (result.measured.dense_answer, result.measured.pruned_answer)
    table.add_row(*(Text(answer or "(nothing)") for answer in answers))
    return table


def _numbers(result: Result) -> Table:
    measured = result.measured
    table = Table(box=box.ROUNDED, width=79, header_style="bold")
    table.add_column(f"{measured.n_tokens:,} tokens", no_wrap=True)
    for name in ("dense", "pruned", "predicted", "pruned/dense"):
        table.add_column(name, justify="right")
    for name, key in _ROWS:
        dense, pruned = measured.dense_bytes[key], measured.pruned_bytes[key]
        predicted = measured.predicted_bytes[key]
        table.add_row(name, f"{dense:,}", f"{pruned:,}", f"{predicted:,}", f"{pruned / dense:.1%}")
    dense, allocated = measured.dense_bytes["total_bytes"], measured.allocated_bytes
    table.add_row("allocated", f"{dense:,}", f"{allocated:,}", "", f"{allocated / dense:.1%}")
    table.add_section()
    table.add_row(
        "ms per token",
        f"{measured.dense_ms:.1f}",
        f"{measured.pruned_ms:.1f}",
        "",
        f"{measured.pruned_ms / measured.dense_ms:.1%}",
    )
    return table


def _conclusions(result: Result) -> Table:
    measured = result.measured
    dropped = 1 - measured.pruned_bytes["k_bytes"] / measured.dense_bytes["k_bytes"]
    saved = measured.dense_bytes["total_bytes"] - measured.pruned_bytes["total_bytes"]
    if dropped > 0 and saved > 0:
        gain = (
            f"{dropped:.1%} of K is not stored; K and V together take {saved / 1e6:,.2f} MB less."
        )
    else:
        gain = "Nothing is saved: whole pages are stored, and the text hardly leaves the window."
    if as_predicted(result):
        check = Text("The bytes are exactly what the mask predicts.", style="green")
    else:
        check = Text("The bytes are NOT what the mask predicts: this is a bug.", style="bold red")
    lines = [
        Text(gain, style="bold"),
        check,
        Text(
            f"Largest logit difference on the answer: {measured.logit_difference:.3g} (the logits "
            f"span {measured.logit_range:.3g}); the same best token at {measured.n_same_token} of "
            f"{measured.n_compared} steps, both fed the dense answer."
        ),
        Text(
            "Bytes are those of the live buffers; allocated is the memory taken to hold them, free "
            f"room for tokens to come included. Times are medians of {measured.n_timed} steps, "
            "dense and pruned in turns, fed the same tokens. Dense is transformers' DynamicCache, "
            "which copies itself at each step.",
            style="dim",
        ),
    ]
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row(Text("-"), line)
    return grid
