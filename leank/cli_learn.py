"""The command ``leank learn``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from leank.learning.plan import Plan, Request, Target
    from leank.masks import ChannelMask

_MASK, _STAGES, _DATA, _RUN = "What to learn", "How", "From what", "Where and how far"


def learn(
    model: Annotated[
        str, typer.Argument(metavar="NAME_OR_PATH", help="Causal language model.")
    ] = "smollm2",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Mask file; with several masks named by {ratio} and {align}.",
            rich_help_panel=_MASK,
        ),
    ] = None,
    ratio: Annotated[
        str,
        typer.Option(
            metavar="R,...",
            help="Share to drop; several: a mask each, from one stage 1.",
            rich_help_panel=_MASK,
        ),
    ] = "0.7",
    align: Annotated[
        str,
        typer.Option(
            metavar="A,...",
            help="Heads keep multiples of it; a multiple of 8 that divides the head dim.",
            rich_help_panel=_MASK,
        ),
    ] = "16",
    budget: Annotated[
        Literal["k", "kv"],
        typer.Option(
            help="What the ratio is of: K channels, or bytes of K and V.", rich_help_panel=_MASK
        ),
    ] = "k",
    sink: Annotated[
        int, typer.Option(min=0, help="First tokens to keep whole.", rich_help_panel=_MASK)
    ] = 64,
    recent: Annotated[
        int, typer.Option(min=1, help="Last tokens to keep whole.", rich_help_panel=_MASK)
    ] = 512,
    stage1_steps: Annotated[
        int,
        typer.Option(
            "--stage1-steps", min=0, help="Steps that learn factors.", rich_help_panel=_STAGES
        ),
    ] = 200,
    stage2_steps: Annotated[
        int,
        typer.Option(
            "--stage2-steps", min=0, help="Steps that learn the mask.", rich_help_panel=_STAGES
        ),
    ] = 80,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate of stage 1.", rich_help_panel=_STAGES)
    ] = 0.03,
    stage2_lr: Annotated[
        float,
        typer.Option(
            "--stage2-lr", help="Highest learning rate of stage 2.", rich_help_panel=_STAGES
        ),
    ] = 0.005,
    penalty: Annotated[
        float, typer.Option(help="lambda of mean |alpha|.", rich_help_panel=_STAGES)
    ] = 0.06,
    gradual: Annotated[
        float,
        typer.Option(
            help="Share of stage 2 in which the ratio rises from 0.8 of itself.",
            rich_help_panel=_STAGES,
        ),
    ] = 0.0,
    fade: Annotated[
        float,
        typer.Option(
            help="Share of stage 2 in which factors turn into the mask.", rich_help_panel=_STAGES
        ),
    ] = 0.0,
    live: Annotated[
        float,
        typer.Option(
            help="With --budget kv: what a live head is worth, in channels.",
            rich_help_panel=_STAGES,
        ),
    ] = 0.0,
    zero_every: Annotated[
        int,
        typer.Option(
            min=0,
            help="Each so-manyth step lets empty heads come back; 0: never.",
            rich_help_panel=_STAGES,
        ),
    ] = 4,
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between validations.", rich_help_panel=_STAGES)
    ] = 10,
    start: Annotated[
        str,
        typer.Option(
            "--start-from",  # torchrun takes --start for an option of its own, cut short
            metavar="ones|moments|MASK|FILE",
            help="First factors: 1, by q and k statistics, a mask or .npy file.",
            rich_help_panel=_STAGES,
        ),
    ] = "ones",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, may be repeated; default: what ships with Python.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N]",
            help="Tokens of a sample; default: from twice the window to the context, or 8192.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples of a step.", rich_help_panel=_DATA)
    ] = 8,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Of single, multi_key, words, multi_query, multi_value, variables, passkey, "
            "lines, table, copy and continuation; default: all.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,...",
            help="How often each kind comes; default: equal.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.", rich_help_panel=_DATA)] = 0,
    n_validation: Annotated[
        int,
        typer.Option(
            "--validation", min=1, help="Samples that choose the best mask.", rich_help_panel=_DATA
        ),
    ] = 64,
    n_test: Annotated[
        int,
        typer.Option(
            "--test", min=0, help="Samples of the report; 0: no report.", rich_help_panel=_DATA
        ),
    ] = 64,
    show_data: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Show so many samples and stop.", rich_help_panel=_DATA
        ),
    ] = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_RUN)
    ] = "auto",
    device_map: Annotated[
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | None,
        typer.Option(
            help="Spread a model over all GPUs that is too large for one, as transformers does.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            metavar="TYPE",
            help="float32, bfloat16 or float16 weights; auto: bfloat16 on a GPU, else float32.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--run-folder",
            metavar="FOLDER",
            help="For state, log and report; default: FILE.run.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Learn which K channels a model can do without, and write a mask file.

    Text and tasks are made offline. Stage 1 learns a factor per channel, stage
    2 the mask as it will be used; the mask with the smallest validation loss is
    written. A run that was stopped goes on with --resume.
    """
    try:
        # Not at the top: torch takes seconds, and --help should not.
        from leank.learning.plan import LearnError, Request
    except ImportError as error:
        if error.name not in ("torch", "transformers"):
            raise
        _fail(f"needs {error.name}: pip install 'leank[learn]'", error)
    try:
        if output is None and not show_data:
            raise LearnError("output: expected a file for the mask, got none; give -o FILE")
        request = Request.of(
            numbers("ratio", ratio, float),
            numbers("align", align, int),
            sink=sink,
            recent=recent,
            budget=budget,
            stage1_steps=stage1_steps,
            stage2_steps=stage2_steps,
            lr=lr,
            stage2_lr=stage2_lr,
            penalty=penalty,
            gradual=gradual,
            fade=fade,
            live=live,
            zero_every=zero_every,
            validate_every=validate_every,
            start=start,
            text=tuple(text or ()),
            batch_size=batch_size,
            weights=None if weights is None else numbers("weights", weights, float),
            seed=seed,
            n_validation=n_validation,
            n_test=n_test,
            output=output,
            folder=folder,
            resume=resume,
            report=n_test > 0 and not show_data,
            **({} if kinds is None else {"kinds": tuple(k.strip() for k in kinds.split(","))}),
            **({} if lengths is None else {"lengths": _lengths(lengths)}),
        )
    except ValueError as error:
        _fail(str(error), error)
    _run(model, request, device, device_map, dtype, show_data)


def _run(
    name: str, request: Request, device: str, device_map: str | None, dtype: str, show_data: int
) -> None:
    import torch

    from leank.learning.folder import ResumeError
    from leank.learning.plan import LearnError, Plan
    from leank.learning.text import DataError
    from leank.loading import LoadError, Source, quiet

    try:
        with quiet():
            if device_map is not None:
                _check_map(device)
            place = find_device(device)
            source = Source(name)
            tokenizer = source.tokenizer()
            plan = Plan(source.skeleton(), tokenizer, request, source.name)
            if show_data:
                _show(plan, tokenizer, show_data)
                return
            kind = dtype
            if kind == "auto":
                kind = "float32" if place.type == "cpu" else "bfloat16"
            plan.check_device(getattr(torch, kind), place)
            weights = source.model(getattr(torch, kind), place, device_map)
            _learn(weights, plan)
    except (LoadError, LearnError, DataError, ResumeError) as error:
        _fail(str(error), error)
    except torch.OutOfMemoryError as error:
        _fail("out of memory: give a smaller --batch-size or --lengths", error, 1)
    except OSError as error:
        _fail(f"{error.filename or 'files'}: {error.strerror or error}", error, 1)


def _learn(model: Any, plan: Plan) -> None:
    from leank.learning.bars import Bars
    from leank.learning.report import print_report
    from leank.learning.run import Run
    from leank.learning.train import DivergedError

    run = Run(model, plan, command=shlex.join(["leank", *sys.argv[1:]]))
    try:
        with Bars(Console(stderr=True, quiet=run.world.rank > 0)) as bars:
            run.progress, run.tested = bars, bars.tested
            masks = run.go()
    except DivergedError as error:
        _fail(f"diverged: {error}", error, 1)
    except KeyboardInterrupt as error:
        done = f"stopped after {run.n_done} of {run.n_total} steps; --resume goes on"
        _fail(done, error, 130)
    if run.world.rank == 0:
        for target, mask in masks.items():
            typer.echo(_line(plan, target, mask))
        if run.evaluations:
            print_report(run.evaluations, Console())
            where = plan.folder / ("report.md" if len(masks) == 1 else "*/report.md")
            typer.echo(f"\nReport: {where}")
    run.world.leave()


def _line(plan: Plan, target: Target, mask: ChannelMask) -> str:
    from leank.masks import kept_shares

    return (
        f"{plan.outputs[target]}: {mask.ratio:.1%} of K dropped, {mask.empty_heads:.1%} of heads "
        f"empty, {kept_shares(mask.keep)['kv_bytes']:.1%} of K and V kept outside the window; "
        f"{mask.method.rsplit('; ', 1)[1]}"
    )


def _show(plan: Plan, tokenizer: Any, n: int) -> None:
    from leank.learning.data import describe

    for i in range(min(n, len(plan.feed.train))):
        typer.echo(describe(plan.feed.train[i], tokenizer))


def _check_map(device: str) -> None:
    import torch

    from leank.learning.plan import LearnError

    if device not in ("auto", "cuda"):
        raise LearnError(f"device-map: expected device auto or cuda beside it, got {device}")
    if not torch.cuda.is_available():
        raise LearnError("device-map: expected GPUs that torch can use, got none")
    if (n := _n_processes()) > 1:
        raise LearnError(f"device-map: expected one process, since it takes all GPUs, got {n}")


def _n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_device(name: str) -> Any:
    """Return the torch device of a name; LearnError if there is none."""
    import torch

    from leank.learning.parallel import local_rank
    from leank.learning.plan import LearnError

    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise LearnError(f"device: expected auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cpu":
        return device
    if not there:
        raise LearnError(f"device: expected a GPU that torch can use, got none for {name}")
    if device.index is not None and _n_processes() > 1:
        raise LearnError(f"device: expected auto or cuda, a GPU for each process, got {name}")
    index = local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise LearnError(f"device: expected cuda:0 to {torch.cuda.device_count() - 1}, got {name}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Return the numbers of an option, with commas between; LearnError names the option."""
    from leank.learning.plan import LearnError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise LearnError(f"{name}: expected {what} with commas between, got {text!r}") from None


def _lengths(text: str) -> int | tuple[int, ...]:
    found = numbers("lengths", text, int)
    return found[0] if len(found) == 1 else found


def _fail(message: str, error: BaseException, code: int = 2) -> NoReturn:
    typer.echo(f"leank learn: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from error
