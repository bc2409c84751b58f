"""The report of a run: what the mask keeps and costs, its bytes, how to make it again, pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import leank
from leank.inspection import DTYPE, Bytes, predicted_bytes
from leank.learning.evaluate import Evaluation
from leank.masks import ChannelMask
from leank.masks_report import percent, points, scores_table

PICTURES = ("alpha.png", "losses.png")


def write_report(
    folder: Path,
    evaluations: Sequence[Evaluation],
    mask: ChannelMask,
    log_path: Path,
    alpha: npt.NDArray[np.floating],
) -> None:
    """Write report.json, report.md, alpha.png and losses.png into a folder.

    Without matplotlib the pictures are left out, and report.md says so.

    Parameters
    ----------
    folder : Path
        Made if it does not exist; files of these names are replaced.
    evaluations : sequence of Evaluation
        The first is that of `mask`; others are compared with it.
    mask : ChannelMask
        With a known window.
    log_path : Path
        JSON lines: an object with ``"kind": "header"``, then those with the fields of
        `leank.learning.train.Step`. Of a step that was made again, after a resume, the last counts.
    alpha : float array [N, Hkv, D]
        The factors that stage 1 ended with, which masks of several budgets may share.

    Raises
    ------
    ValueError
        If there is no evaluation, the first is of another mask, the window is not known, alpha has
        another shape, or the log cannot be read.
    OSError
        If a file cannot be read or written.
    """
    _check(evaluations, mask, alpha)
    header, steps = read_log(log_path)
    memory = predicted_bytes(mask)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(folder, mask, alpha, steps)
    report = {
        "leank": leank.__version__,
        "mask": {
            "model": mask.model,
            "method": mask.method,
            "shape": list(mask.keep.shape),
            "ratio": mask.ratio,
            "align": mask.align,
            "sink": mask.sink,
            "recent": mask.recent,
            "empty_heads": mask.empty_heads,
        },
        "header": header,
        "n_steps": len(steps),
        "best": _best(steps),
        "bytes": {"dtype": DTYPE, "lengths": [dataclasses.asdict(line) for line in memory]},
        "evaluations": [evaluation.as_json() for evaluation in evaluations],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# A mask for {mask.model or 'a model without a name'}",
        "",
        *_what_it_keeps(mask, evaluations[0], report["best"]),
        *_scores(evaluations[0]),
        *(_comparison(evaluations) if len(evaluations) > 1 else ()),
        *_bytes(mask, memory),
        *_pictures(drawn, header, steps),
        *_again(header),
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def print_report(evaluations: Sequence[Evaluation], console: Console) -> None:
    """Print the scores of the first mask and a line for each, in colour if the console has any.

    80 columns are enough.
    """
    first = evaluations[0]
    console.print(Text(f"\n {first.name}, dense against mask", style="bold"))
    console.print(scores_table(first.as_json()))
    table = Table(box=box.ROUNDED, header_style="bold")
    table.add_column("mask", overflow="fold")
    for name in ("K kept", "V kept", "KV bytes", "loss", "at most", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for evaluation in evaluations:
        table.add_row(Text(evaluation.name), *_line(evaluation))
    console.print(table)
    console.print(Text(_NOTE, style="dim"))


_NOTE = (
    "Scores are shares of expected values whose tokens are all the most likely ones. Loss: points, "
    "dense minus mask; at most: its upper limit, one-sided 95%, items paired. The mean is over "
    "kinds on which dense scores over 20%. KL(dense || mask): nats per answer token, over all "
    "kinds. Shares are of a dense cache, outside the window."
)


def read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the first header of a log without its kind, and the steps in order.

    A last line that a killed process did not finish is left out.

    Raises
    ------
    ValueError
        If another line is no JSON object of a header or step.
    OSError
        If the file cannot be read.
    """
    header: dict[str, Any] | None = None
    steps: dict[tuple[int, int], dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if found.get("kind") == "header":
                header = header or {key: found[key] for key in found if key != "kind"}
            else:
                steps[found["stage"], found["step"]] = found
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                continue
            raise ValueError(
                f"{path}: line {number}: expected a header or a step, got {line[:60]!r}"
            ) from error
    return header or {}, [steps[key] for key in sorted(steps)]


# -------------------------------------------------------------------------------------- parts


def _check(evaluations: Sequence[Evaluation], mask: ChannelMask, alpha: np.ndarray) -> None:
    if not evaluations:
        raise ValueError("evaluations: expected at least one, got none")
    shares = mask.kept_ratio, mask.empty_heads
    if (evaluations[0].kept_k, evaluations[0].empty_heads) != shares:
        raise ValueError(
            f"evaluations: expected the mask's first, which keeps {mask.kept_ratio:.4f} of K, got "
            f"{evaluations[0].name!r}, which keeps {evaluations[0].kept_k:.4f}"
        )
    if alpha.shape != mask.keep.shape:
        raise ValueError(f"alpha: expected {mask.keep.shape} as the mask has, got {alpha.shape}")


def _best(steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return where the mask is from: the last step that improved it."""
    improved = [step for step in steps if step.get("improved")]
    keys = ("stage", "step", "validation")
    return {key: improved[-1][key] for key in keys} if improved else None


def _draw(
    folder: Path, mask: ChannelMask, alpha: np.ndarray, steps: Sequence[dict[str, Any]]
) -> bool:
    """Draw both pictures; False without matplotlib, where those of an earlier run are removed."""
    try:
        from leank.learning.picture import draw_alpha, draw_losses
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        for name in PICTURES:
            (folder / name).unlink(missing_ok=True)
        return False
    title = f"{mask.model}: " if mask.model else ""
    title += f"{mask.ratio:.1%} of K dropped, window {mask.sink} + {mask.recent}"
    draw_alpha(folder / PICTURES[0], alpha, mask.keep, title)
    if steps:
        draw_losses(folder / PICTURES[1], steps, title)
    return True


def _what_it_keeps(
    mask: ChannelMask, evaluation: Evaluation, best: dict[str, Any] | None
) -> list[str]:
    n_layers, n_heads, head_dim = mask.keep.shape
    lines = [
        f"- {n_layers} layers x {n_heads} KV heads x {head_dim} channels; the first {mask.sink:,} "
        f"and the last {mask.recent:,} tokens keep all.",
        f"- Outside this window {evaluation.kept_k:.2%} of K is kept ({mask.ratio:.2%} dropped), "
        f"in multiples of {mask.align} channels, and {evaluation.kept_v:.2%} of V: "
        f"{evaluation.empty_heads:.2%} of the heads are empty.",
        f"- That is {evaluation.kv_bytes:.2%} of the bytes of a dense cache.",
    ]
    if best is not None:
        lines.append(
            f"- Chosen in stage {best['stage']}, step {best['step'] + 1}, where the validation "
            f"loss was {best['validation']:.4g}."
        )
    return [*lines, ""]


def _scores(evaluation: Evaluation) -> list[str]:
    rows = [
        [kind.kind, f"{kind.n:,}", *_shares(kind), f"{kind.kl:.4f}", f"{kind.loss:.4g}"]
        for kind in evaluation.kinds
    ]
    n = sum(kind.n for kind in evaluation.kinds if kind.kind in evaluation.counted)
    mean = [f"mean of {len(evaluation.counted)}", f"{n:,}", *_shares(evaluation), "", ""]
    names = ["kind", "items", "dense", "mask", "loss", "at most", "KL", "training loss"]
    return ["## Test", "", *_table(names, [*rows, [f"**{x}**" if x else "" for x in mean]]), _NOTE]


def _comparison(evaluations: Sequence[Evaluation]) -> list[str]:
    names = ["mask", "K kept", "V kept", "KV bytes", "loss", "at most", "KL"]
    rows = [[_cell(evaluation.name), *_line(evaluation)] for evaluation in evaluations]
    return ["", "## Compared with", "", *_table(names, rows)[:-1]]


def _bytes(mask: ChannelMask, memory: Sequence[Bytes]) -> list[str]:
    rows = [
        [
            f"{line.tokens:,}",
            f"{line.dense:,}",
            f"{line.mask:,}",
            f"{line.mask / line.dense:.1%}",
        ]
        for line in memory
    ]
    text = (
        f"Predicted for one row in {DTYPE}, the window of {mask.sink} + {mask.recent} tokens and "
        "whole pages included (`ChannelMask.predict_memory`)."
    )
    names = ["tokens", "dense bytes", "mask bytes", "mask / dense"]
    return ["", "## Bytes", "", *_table(names, rows), text]


def _pictures(drawn: bool, header: dict[str, Any], steps: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["", "## Pictures", ""]
    if not drawn:
        return [*lines, "None: matplotlib is not installed (`pip install 'leank[learn]'`)."]
    lines += [f"![factors and mask]({PICTURES[0]})"]
    return [*lines, "", f"![losses]({PICTURES[1]})"] if steps else lines


def _again(header: dict[str, Any]) -> list[str]:
    lines = ["", "## Again", ""]
    if command := header.get("command"):
        words = command if isinstance(command, str) else " ".join(map(str, command))
        lines += ["```", words, "```", ""]
    others = [[f"`{k}`", _cell(v)] for k, v in header.items() if k != "command"]
    return [*lines, *_table(["setting", "value"], others, right=False)] if others else lines


def _shares(result: Any) -> list[str]:
    return [
        percent(result.dense),
        percent(result.mask),
        points(result.loss_points),
        points(result.upper_points),
    ]


def _line(evaluation: Evaluation) -> list[str]:
    shares = evaluation.kept_k, evaluation.kept_v, evaluation.kv_bytes
    losses = evaluation.loss_points, evaluation.upper_points
    return [*map(percent, shares), *map(points, losses), f"{evaluation.kl:.4f}"]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """Return the lines of a table, the first column to the left, and an empty one."""
    rule = ["---", *(["---:" if right else "---"] * (len(names) - 1))]
    return [*("| " + " | ".join(row) + " |" for row in (names, rule, *rows)), ""]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
