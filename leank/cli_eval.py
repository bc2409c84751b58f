"""The command ``leank eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from leank.cli_errors import CommandError, needing
from leank.cli_learn import find_device, numbers
from leank.cli_options import DATA, MASK, RUN, Device, Model, Recent, Resume, Sink, Texts, Weights

if TYPE_CHECKING:
    from leank.evaluation.run import Evaluation, Request

_WHAT, _ASK, _HOW = "What to compare", "What to ask", "How"


def evaluate(
    model: Model = "smollm2",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MASK",
            help=f"{MASK}; may be repeated.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="random, lowest (rotary frequencies), moments (q-k norms) and think, made like "
            "the first mask; quanto, hqq and fp8, transformers' QuantizedCache.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    sink: Sink = None,
    recent: Recent = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="RULER: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, "
            "niah_multiquery, vt, cwe, fwe, qa; kinds of leank learn; default: RULER without qa, "
            "lines, table, copy, continuation (perplexity and KL of text).",
            rich_help_panel=_ASK,
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of an item.", rich_help_panel=_ASK)
    ] = "4096",
    items: Annotated[
        int, typer.Option(min=1, help="Of each task and length.", rich_help_panel=_ASK)
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the items.", rich_help_panel=_ASK)] = 0,
    second_turn: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Ask after so many tokens of other text, which read a pruned cache.",
            rich_help_panel=_ASK,
        ),
    ] = 0,
    text: Texts = None,
    qa: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines {"question": "...", "answers": ["..."]}, for task qa.',
            rich_help_panel=DATA,
        ),
    ] = None,
    qa_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The text that they are about.", rich_help_panel=DATA),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Teacher-forced, for all masks at once, instead of generate(); also on a GPU.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    prefill: Annotated[
        Literal["dense", "pruned"],
        typer.Option(help="As in leank.patch.", rich_help_panel=_HOW),
    ] = "dense",
    chunk: Annotated[
        int,
        typer.Option(
            min=1, help="With --prefill pruned: tokens of each call.", rich_help_panel=_HOW
        ),
    ] = 1024,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="For log, results and pictures.",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Weights = "auto",
    resume: Resume = False,
) -> None:
    """Test masks on long texts against the dense model, and against other ways to prune.

    Tasks are made offline. Prints what each mask loses, with 95% intervals;
    JSON and pictures are written to the folder.
    """
    # Not at the top: torch takes seconds, and --help should not.
    with needing("learn", "torch", "transformers"):
        from leank.evaluation.items import TASKS, SuiteSettings
        from leank.evaluation.methods import EvalError
        from leank.evaluation.run import Request
    try:
        if output is None:
            raise EvalError("output: expected a folder, got none; give -o FOLDER")
        request = Request(
            masks=tuple(mask or ()),
            folder=output,
            suite=SuiteSettings(
                tasks=TASKS if tasks is None else _names(tasks),
                lengths=numbers("lengths", lengths, int),
                n_items=items,
                seed=seed,
                second_turn=second_turn,
            ),
            baselines=() if baseline is None else _names(baseline),
            fast=fast,
            prefill=prefill,
            chunk=chunk,
            sink=sink,
            recent=recent,
            text=tuple(text or ()),
            qa=qa,
            qa_text=qa_text,
            resume=resume,
        )
    except ValueError as error:
        raise CommandError(error) from error
    _run(model, request, device, dtype)


def _run(name: str, request: Request, device: str, dtype: str) -> None:
    import torch

    from leank.evaluation.methods import EvalError
    from leank.evaluation.report import draw_pictures, print_report
    from leank.evaluation.run import Evaluation
    from leank.learning.bars import Bars
    from leank.learning.folder import ResumeError
    from leank.learning.text import DataError
    from leank.loading import LoadError, Source, quiet

    evaluation = None
    try:
        with quiet():
            # Answers of generate() are compared in float32, unless a GPU is asked for.
            place = find_device("cpu" if device == "auto" and not request.fast else device)
            source = Source(name)
            evaluation = Evaluation(request, source.tokenizer(), source.name)
            evaluation.check_model(source.skeleton().config)
            if dtype == "auto":
                dtype = "float32" if place.type == "cpu" else "bfloat16"
            model = source.model(getattr(torch, dtype), place)
            with Bars(Console(stderr=True)) as bars:
                summary = evaluation.run(model, bars.tested)
            drawn = draw_pictures(request.folder, summary, source.name)
    except (LoadError, DataError, EvalError, ResumeError) as error:
        raise CommandError(error) from error
    except torch.OutOfMemoryError as error:
        raise CommandError("out of memory: give smaller --lengths", 1) from error
    except OSError as error:
        raise CommandError(f"{error.filename or 'files'}: {error.strerror or error}", 1) from error
    except KeyboardInterrupt as error:
        raise CommandError(_stopped(evaluation), 130) from error
    print_report(summary, Console())
    typer.echo(f"\nResults: {request.folder}")
    if not drawn:
        typer.echo("No pictures: matplotlib is not installed (pip install 'leank[learn]').")


def _stopped(evaluation: Evaluation | None) -> str:
    if evaluation is None or evaluation.n_done == 0:
        return "stopped before the first item was done"
    done = f"stopped after {evaluation.n_done} of {len(evaluation.suite)} items"
    return f"{done}; they are kept in {evaluation.request.folder}, --resume goes on"


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
