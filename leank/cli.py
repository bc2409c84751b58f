"""What the command ``leank`` understands; ``leank.__main__`` runs it."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from leank.cli_bench import app as bench
from leank.cli_errors import Command, CommandError, Group, needing
from leank.cli_eval import evaluate
from leank.cli_inspect import info, inspect
from leank.cli_learn import learn
from leank.cli_options import MASK, Recent, Sink

app = typer.Typer(
    name="leank",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(enum.StrEnum):
    """Names of element types, as typer wants them."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def _leank(
    debug: Annotated[
        bool, typer.Option("--debug", help="Before a command: its errors come with tracebacks.")
    ] = False,
) -> None:
    """Attention over a K cache of which a learned, static part is not stored."""


@app.command(cls=Command)
def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_PATH", help="Causal language model; default: SmolLM2-135M."),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(metavar="MASK", help=f"{MASK}; default: the one for SmolLM2-135M."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to read; default: a log.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 48,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: what torch uses.")
    ] = None,
    dtype: Annotated[
        DType,
        typer.Option(metavar="TYPE", help="float32, bfloat16 or float16 weights and cache."),
    ] = DType.float32,
    sink: Sink = None,
    recent: Recent = None,
) -> None:
    """Let a model find a fact in a long text from a dense and from a pruned cache.

    Prints both answers, the bytes of both caches, the time per token and how far the logits differ.
    """
    # Not at the top: torch takes seconds, and --help should not.
    # transformers does not start without huggingface_hub.
    with needing("hf", "torch", "transformers", "huggingface_hub"):
        from leank.demo import DemoError, Options, run
        from leank.demo_report import as_predicted, print_report
    options = Options(
        model=model,
        mask=mask,
        text=text,
        question=question,
        max_new_tokens=max_new_tokens,
        threads=threads,
        dtype=dtype.value,
        sink=sink,
        recent=recent,
    )
    try:
        result = run(options, bars=Console(stderr=True))
    except DemoError as error:
        raise CommandError(error) from error
    print_report(result, Console())
    if not as_predicted(result):
        raise typer.Exit(1)


@app.command(cls=Command)
def masks(
    name: Annotated[
        str | None, typer.Argument(metavar="MASK", help=f"{MASK}: tell all of it.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the records instead, for programs.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Made by leank.shipped.add; default: the package's."),
    ] = None,
) -> None:
    """List the masks in this package: what they keep, what they cost, how they were learned.

    In Python, leank.load_mask(MASK) returns one.
    """
    from leank.mask_source import load_mask
    from leank.masks import MaskFileError
    from leank.masks_report import print_mask, print_masks
    from leank.shipped import FOLDER, ShippedMaskError, find, numbers, shipped_masks

    try:
        lines = [record.as_json() for record in shipped_masks(folder or FOLDER)]
        if name is not None:
            is_listed = any(line["name"] == name for line in lines) and not Path(name).exists()
            if folder is not None or is_listed:
                lines = [find(name, folder or FOLDER).as_json()]
            else:
                lines = [{"name": name, **numbers(load_mask(name))}]
    except (MaskFileError, ModuleNotFoundError, ShippedMaskError) as error:
        raise CommandError(error) from error
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error
    if as_json:
        typer.echo(json.dumps(lines if name is None else lines[0], indent=1))
    elif name is None:
        print_masks(lines, Console())
    else:
        print_mask(lines[0], Console())


# After those above: --help lists them in this order, in which a newcomer needs them.
app.add_typer(bench)
app.command(cls=Command)(learn)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(inspect)
app.command(cls=Command)(info)
