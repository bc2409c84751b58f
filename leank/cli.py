"""What the command ``leank`` understands; ``leank.__main__`` runs it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="leank", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class DType(enum.StrEnum):
    """Names of element types, as typer wants them."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def _leank() -> None:
    """Attention over a K cache of which a learned, static part is not stored."""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_PATH", help="Llama or Qwen2 model; default: SmolLM2-135M."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Mask file or .pth; default: the one for SmolLM2-135M."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to read; default: a log.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 48,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: what torch uses.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Type of weights and cache.")] = DType.float32,
    sink: Annotated[
        int | None, typer.Option(min=0, help="First tokens to keep whole; default: the mask's.")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=1, help="Last tokens to keep whole; default: the mask's.")
    ] = None,
) -> None:
    """Let a model find a fact in a long text from a dense and from a pruned cache.

    Prints both answers, the bytes of both caches, the time per token and how far the logits differ.
    """
    try:
        # Not at the top: torch takes seconds, and --help should not.
        from leank.demo import DemoError, Options, run
        from leank.demo_report import as_predicted, print_report
    except ImportError as error:
        if error.name not in ("torch", "transformers"):
            raise
        typer.echo(f"leank demo: needs {error.name}: pip install 'leank[hf]'", err=True)
        raise typer.Exit(2) from error
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
        typer.echo(f"leank demo: {error}", err=True)
        raise typer.Exit(2) from error
    print_report(result, Console())
    if not as_predicted(result):
        raise typer.Exit(1)
