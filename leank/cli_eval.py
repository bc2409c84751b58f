"""The command ``leank eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console

from leank.cli_learn import find_device, numbers

if TYPE_CHECKING:
    from leank.evaluation.run import Request

_WHAT, _HOW, _DATA, _RUN = "What to compare", "How", "What to ask", "Where"


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="NAME_OR_PATH", help="Causal language model.")
    ] = "smollm2",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE_OR_NAME",
            help="Mask file, or a name that leank masks lists; may be repeated.",
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="For log, results and pictures.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="RULER: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, "
            "niah_multiquery, vt, cwe, fwe, qa; kinds of leank learn; default: RULER without qa, "
            "lines, table, copy, continuation (perplexity and KL of text).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of an item.", rich_help_panel=_DATA)
    ] = "4096",
    items: Annotated[
        int, typer.Option(min=1, help="Of each task and length.", rich_help_panel=_DATA)
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the items.", rich_help_panel=_DATA)] = 0,
    second_turn: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Ask after so many tokens of other text, which read a pruned cache.",
            rich_help_panel=_DATA,
        ),
    ] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, may be repeated; default: what ships with Python.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    qa: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines {"question": "...", "answers": ["..."]}, for task qa.',
            rich_help_panel=_DATA,
        ),
    ] = None,
    qa_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The text that they are about.", rich_help_panel=_DATA),
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
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_RUN)
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="TYPE",
            help="float32, bfloat16 or float16 weights; auto: bfloat16 on a GPU, else float32.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a stopped evaluation.", rich_help_panel=_RUN),
    ] = False,
) -> None:
    """Test masks on long texts against the dense model, and against other ways to prune.

    Tasks are made offline. Prints what each mask loses, with 95% intervals;
    JSON and pictures are written to the folder.
    """
    try:
        # Not at the top: torch takes seconds, and --help should not.
        from leank.evaluation.items import TASKS, SuiteSettings
        from leank.evaluation.methods import EvalError
        from leank.evaluation.run import Request
    except ImportError as error:
        if error.name not in ("torch", "transformers"):
            raise
        _fail(f"needs {error.name}: pip install 'leank[learn]'", error)
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
            text=tuple(text or ()),
            qa=qa,
            qa_text=qa_text,
            resume=resume,
        )
    except ValueError as error:
        _fail(str(error), error)
    _run(model, request, device, dtype)


def _run(name: str, request: Request, device: str, dtype: str) -> None:
    import torch

    from leank.evaluation.methods import EvalError
    from leank.evaluation.report import draw_pictures, print_report
    from leank.evaluation.run import Evaluation
    from leank.learning.bars import Bars
    from leank.learning.folder import ResumeError
    from leank.learning.plan import LearnError
    from leank.learning.text import DataError
    from leank.loading import LoadError, Source, quiet

    try:
        with quiet():
            # generate() of a patched model is on the CPU so far.
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
    except (LoadError, LearnError, DataError, EvalError, ResumeError) as error:
        _fail(str(error), error)
    except torch.OutOfMemoryError as error:
        _fail("out of memory: give smaller --lengths", error, 1)
    except OSError as error:
        _fail(f"{error.filename or 'files'}: {error.strerror or error}", error, 1)
    except KeyboardInterrupt as error:
        _fail(f"stopped; --resume goes on from {request.folder}", error, 130)
    print_report(summary, Console())
    typer.echo(f"\nResults: {request.folder}")
    if not drawn:
        typer.echo("No pictures: matplotlib is not installed (pip install 'leank[learn]').")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _fail(message: str, error: BaseException, code: int = 2) -> NoReturn:
    typer.echo(f"leank eval: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from error
