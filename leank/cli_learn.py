"""The command ``leank learn``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from leank.cli_errors import CommandError, needing
from leank.cli_options import DATA, RUN, Device, Model, Resume, Texts, Weights

if TYPE_CHECKING:
    from leank.learning.plan import Plan, Request, Target
    from leank.learning.run import Run
    from leank.masks import ChannelMask

_MASK, _STAGES = "What to learn", "How"


def learn(
    model: Model = "smollm2",
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
            help="Steps between those that let empty heads come back; 0: none does.",
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
    text: Texts = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N]",
            help="Tokens of a sample; default: from twice the window to the context, or 8192.",
            rich_help_panel=DATA,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples of a step.", rich_help_panel=DATA)
    ] = 8,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Of single, multi_key, words, multi_query, multi_value, variables, passkey, "
            "lines, table, copy and continuation; default: all.",
            rich_help_panel=DATA,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,...",
            help="How often each kind comes; default: equal.",
            rich_help_panel=DATA,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.", rich_help_panel=DATA)] = 0,
    n_validation: Annotated[
        int,
        typer.Option(
            "--validation", min=1, help="Samples that choose the best mask.", rich_help_panel=DATA
        ),
    ] = 64,
    n_test: Annotated[
        int,
        typer.Option(
            "--test", min=0, help="Samples of the report; 0: no report.", rich_help_panel=DATA
        ),
    ] = 64,
    show_data: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Show so many samples and stop.", rich_help_panel=DATA
        ),
    ] = 0,
    device: Device = "auto",
    device_map: Annotated[
        Literal["auto", "balanced", "balanced_low_0", "sequential"] | None,
        typer.Option(
            metavar="HOW",
            help="Spread a model over all GPUs that is too large for one, as transformers does: "
            "auto, balanced, balanced_low_0 or sequential.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dtype: Weights = "auto",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--run-folder",
            metavar="FOLDER",
            help="For state, log and report; default: FILE.run.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Learn which K channels a model can do without, and write a mask file.

    Text and tasks are made offline. Stage 1 learns a factor per channel, stage
    2 the mask as it will be used; the mask with the smallest validation loss is
    written. A run that was stopped goes on with --resume.
    """
    # Not at the top: torch takes seconds, and --help should not.
    with needing("learn", "torch", "transformers"):
        from leank.learning.plan import LearnError, Request
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
        raise CommandError(error, once=True) from error
    _run(model, request, device, device_map, dtype, show_data)


def _run(
    name: str, request: Request, device: str, device_map: str | None, dtype: str, show_data: int
) -> None:
    import torch

    from leank.learning.folder import ResumeError
    from leank.learning.plan import LearnError, Plan
    from leank.learning.run import Run
    from leank.learning.text import DataError
    from leank.learning.train import DivergedError
    from leank.loading import LoadError, Source, quiet

    run = None
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
            run = Run(weights, plan, command=shlex.join(["leank", *sys.argv[1:]]))
            _learn(run)
    except (LoadError, LearnError, DataError, ResumeError) as error:
        raise CommandError(error, once=True) from error
    except DivergedError as error:
        raise CommandError(f"diverged: {error}", 1) from error
    except torch.OutOfMemoryError as error:
        raise CommandError("out of memory: give a smaller --batch-size or --lengths", 1) from error
    except OSError as error:
        raise CommandError(f"{error.filename or 'files'}: {error.strerror or error}", 1) from error
    except KeyboardInterrupt as error:
        raise CommandError(_stopped(run), 130, once=True) from error


def _learn(run: Run) -> None:
    from leank.learning.bars import Bars
    from leank.learning.report import print_report

    with Bars(Console(stderr=True, quiet=run.world.rank > 0)) as bars:
        run.progress, run.tested = bars, bars.tested
        masks = run.go()
    if run.world.rank == 0:
        for target, mask in masks.items():
            typer.echo(_line(run.plan, target, mask))
        if run.evaluations:
            print_report(run.evaluations, Console())
            where = run.plan.folder / ("report.md" if len(masks) == 1 else "*/report.md")
            typer.echo(f"\nReport: {where}")
    run.world.leave()


def _stopped(run: Run | None) -> str:
    if run is None:
        return "stopped before the first step"
    done = f"stopped after {run.n_done} of {run.n_total} steps"
    state = run.folder.load()  # what there is, wherever a save was when the signal came
    if state is None:
        return f"{done}; none are kept"
    return f"{done}; {state['n_done']} are kept in {run.plan.folder}, --resume goes on"


def _line(plan: Plan, target: Target, mask: ChannelMask) -> str:
    from leank.masks import kept_shares

    return (
        f"{plan.outputs[target]}: {mask.ratio:.1%} of K dropped, {mask.empty_heads:.1%} of heads "
        f"empty, {kept_shares(mask.keep)['kv_bytes']:.1%} of K and V kept outside the window; "
        f"{mask.method.rsplit('; ', 1)[1]}"
    )


def _show(plan: Plan, tokenizer: Any, n: int) -> None:
    from leank.learning.sample import describe

    for i in range(min(n, len(plan.feed.train))):
        typer.echo(describe(plan.feed.train[i], tokenizer))


def _check_map(device: str) -> None:
    import torch

    if device not in ("auto", "cuda"):
        raise CommandError(
            f"device-map: expected device auto or cuda beside it, got {device}", once=True
        )
    if not torch.cuda.is_available():
        raise CommandError("device-map: expected GPUs that torch can use, got none", once=True)
    if (n := _n_processes()) > 1:
        raise CommandError(
            f"device-map: expected one process, since it takes all GPUs, got {n}", once=True
        )


def _n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_device(name: str) -> Any:
    """Return the torch device of a name; CommandError if there is none."""
    import torch

    from leank.learning.parallel import local_rank

    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"device: expected auto, cpu, cuda or cuda:N, got {name}", once=True)
    if device.type == "cpu":
        return device
    if not there:
        raise CommandError(
            f"device: expected a GPU that torch can use, got none for {name}", once=True
        )
    if device.index is not None and _n_processes() > 1:
        raise CommandError(
            f"device: expected auto or cuda, a GPU for each process, got {name}", once=True
        )
    index = local_rank() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise CommandError(
            f"device: expected cuda:0 to {torch.cuda.device_count() - 1}, got {name}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Return the numbers of an option, with commas between; CommandError names the option."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise CommandError(
            f"{name}: expected {what} with commas between, got {text!r}", once=True
        ) from None


def _lengths(text: str) -> int | tuple[int, ...]:
    found = numbers("lengths", text, int)
    return found[0] if len(found) == 1 else found
