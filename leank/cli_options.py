"""Arguments and options that several commands of ``leank`` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# What `leank.load_mask` takes.
MASK = "Mask file, name that `leank masks` lists, or Hub repository (ORG/NAME)"
# Panels of --help.
DATA, RUN = "From what", "Where and how far"

Model = Annotated[
    str,
    typer.Argument(
        metavar="NAME_OR_PATH",
        help="Causal language model; smollm2 is SmolLM2-135M-Instruct.",
    ),
]
Sink = Annotated[
    int | None, typer.Option(min=0, help="First tokens to keep whole; default: the mask's.")
]
Recent = Annotated[
    int | None, typer.Option(min=1, help="Last tokens to keep whole; default: the mask's.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text, may be repeated; default: what ships with Python.",
        rich_help_panel=DATA,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)]
Weights = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="TYPE",
        help="float32, bfloat16 or float16 weights; auto: bfloat16 on a GPU, else float32.",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what was stopped.", rich_help_panel=RUN)
]
CacheType = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(metavar="TYPE", help="float32, bfloat16 or float16, of the cache."),
]
