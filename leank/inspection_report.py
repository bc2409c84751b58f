"""What ``leank inspect`` and ``leank info`` print; 80 columns are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leank.inspection import LENGTHS, Inspection, Relation
from leank.mask_overlap import Comparison, Overlap
from leank.masks_report import percent, print_mask
from leank.shipped import numbers

_NO_WINDOW = "Bytes depend on the window, which the mask does not tell: give --sink and --recent."


def print_inspection(
    found: Inspection,
    name: str,
    console: Console,
    *,
    lengths: Sequence[int] = LENGTHS,
    dtype: str,
    n_queries: int = 0,
) -> None:
    """Print what a mask keeps, by head and altogether, and what it costs.

    n_queries : that the mass is a mean over
    """
    mask = found.mask
    print_mask({"name": name, **numbers(mask)}, console, _facts(found))
    console.print()
    console.print(_heads(found))
    notes = "K kept: share of the layer. "
    if found.turned.any():
        notes += (
            "Numbers such as 0-15: rotary pairs from the highest frequency on, and % of their "
            "channels that are kept. Whole, half: pairs with both channels or one. "
        )
    if found.mass is not None:
        notes += (
            f"Middle: % of attention that the dense model's heads give to tokens outside the "
            f"window, mean over {n_queries:,} queries. "
        )
    console.print(Text(notes.strip(), style="dim"))
    if mask.sink is None or mask.recent is None:
        console.print(Text(f"\n{_NO_WINDOW}"))
    else:
        console.print()
        console.print(_bytes(found, lengths, dtype))
        note = (
            f"One row in {dtype}; stored: whole pages, window included. Decode: how much faster "
            "attention is if time goes by the bytes that it reads."
        )
        console.print(Text(note, style="dim"))
    if found.mass is not None:
        console.print()
        console.print(_masses(found.mass_relation))
        correlation = found.mass_relation.correlation
        if correlation is not None:
            text = f"Rank correlation of middle and channels kept: {correlation:+.2f}"
            console.print(Text(text, style="dim"))


def _facts(found: Inspection) -> dict[str, str]:
    widths = [f"{n} keep {width}" for width, n in found.heads_of_width.items()]
    n_layers, n_heads = found.widths.shape
    n_outside = len(found.mask.outside)
    shape = f"{n_layers} layers x {n_heads} KV heads x {found.mask.head_dim} channels"
    shape += f"; {n_outside} layers are outside" if n_outside else ""
    facts = {"shape": shape, "heads": ", ".join(widths) + " channels"}
    n_pairs = len(found.rotary.pairs)
    if not found.turned.any():
        return facts | {"frequencies": "no rotary embedding"}
    if found.low_half is not None:
        facts["frequencies"] = (
            f"{found.low_half:.1%} of the kept channels are in the lower half of the {n_pairs} "
            "rotary pairs"
        )
    n_all = n_pairs * n_heads * int(found.turned.sum())
    whole, half = (int(n.sum()) for n in (found.whole_pairs, found.half_pairs))
    facts["pairs"] = f"{whole / n_all:.1%} kept whole, {half / n_all:.1%} half"
    if found.outstanding_pair is not None:
        pair, share, usual = found.outstanding_pair
        facts["stands out"] = f"pair {pair}: {share:.1%} kept, {usual:.1%} of those around it"
    return facts


def _heads(found: Inspection) -> Table:
    table = _table("layer", "kept by head", "K kept")
    table.columns[1].justify = "left"
    table.columns[1].no_wrap = False
    bands = found.rotary.bands() if found.turned.any() else []
    names = [f"{band[0]}-{band[-1]}" for band in bands]
    for name in [*names, *(["whole", "half"] if bands else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    if found.mass is not None:
        table.add_column("middle by head, %", overflow="fold")
    for i, layer in enumerate(found.layers):
        kept = found.keep[i]
        cells = [str(layer), " ".join(map(str, found.widths[i])), f"{kept.mean():.0%}"]
        if bands and found.turned[i]:
            cells += [f"{share:.0%}" for share in found.bands[i].mean(0)]
            cells += [str(found.whole_pairs[i].sum()), str(found.half_pairs[i].sum())]
        elif bands:
            cells += ["-"] * (len(bands) + 2)
        if found.mass is not None:
            cells.append(" ".join(f"{100 * mass:.0f}" for mass in found.kv_mass[i]))
        table.add_row(*cells)
    return table


def _bytes(found: Inspection, lengths: Sequence[int], dtype: str) -> Table:
    table = _table("tokens", "dense bytes", "stored bytes", "saved", "decode")
    for line in found.bytes(lengths, dtype):
        held = f"{line.dense:,}", f"{line.mask:,}"
        table.add_row(f"{line.tokens:,}", *held, f"{line.saved:.1%}", f"{line.speedup:.2f}x")
    return table


def _masses(relation: Relation) -> Table:
    table = _table("channels kept", "heads", "least middle", "mean", "most")
    for width, (n, *masses) in relation.by_width.items():
        table.add_row(str(width), str(n), *map(percent, masses))
    return table


def print_comparison(found: Comparison, names: Sequence[str], console: Console) -> None:
    """Print the overlap of two masks by layer and in total."""
    for letter, name in zip("AB", names, strict=True):
        console.print(Text(f" {letter}  {name}", style="bold"))
    table = _table("layer", "A", "B", "both", "chance", "share", "above", "empty A", "B", "both")
    for overlap in found.layers:
        table.add_row(*_overlap(overlap))
    table.add_section()
    table.add_row(*_overlap(found.total), style="bold")
    console.print(table)
    note = (
        "A, B, both: channels kept. Chance: both, if each head kept as many but random channels. "
        "Share: both by either. Above: 0% is chance, 100% as alike as the widths allow; - where "
        "they leave no choice. Empty: heads that keep nothing."
    )
    console.print(Text(note, style="dim"))


def _overlap(overlap: Overlap) -> list[str]:
    counts = overlap.kept_a, overlap.kept_b, overlap.both, round(overlap.chance)
    empty = overlap.empty_a, overlap.empty_b, overlap.empty_both
    return [
        "all" if overlap.layer is None else str(overlap.layer),
        *(f"{n:,}" for n in counts),
        percent(overlap.share),
        percent(overlap.above_chance),
        *map(str, empty),
    ]


def print_info(facts: Mapping[str, Any], console: Console) -> None:
    """Print what `leank.info.facts` returned."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    variants = ", ".join(
        name if usable else f"{name} (not on this machine)"
        for name, usable in facts["isa_built"].items()
    )
    threads = f"{facts['threads']} of {facts['cpus']} CPUs"
    if facts["torch_threads"] is not None:
        threads += f"; {facts['torch_threads']} in a patched model, as torch has"
    gpus = [
        f"{gpu['name']} ({'.'.join(map(str, gpu['capability']))}"
        f"{'' if gpu['built'] else ', nothing built for it'})"
        for gpu in facts["gpus"]
    ]
    rows = {
        **{name: version or "not installed" for name, version in facts["versions"].items()},
        "CPU": f"{facts['machine']}, {facts['isa']}; built: {variants}",
        "compiler": facts["compiler"],
        "OpenMP": str(facts["openmp"] or "built without"),
        "threads": threads,
        "kernels": ", ".join(facts["cuda_built"] or ["built without CUDA"]),
        "GPUs": "; ".join(gpus) or "none",
    }
    for name, value in rows.items():
        grid.add_row(f" {name}", Text(value))
    console.print(grid)


def _table(first: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in (first, *names):
        table.add_column(name, justify="right", no_wrap=True)
    return table
