"""The commands ``leank inspect`` and ``leank info``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from leank.cli_errors import CommandError, needing
from leank.cli_options import MASK, CacheType, Recent, Sink

if TYPE_CHECKING:
    from leank.inspection import Inspection
    from leank.masks import ChannelMask

_TOKENS = 4096


def inspect(
    mask: Annotated[
        str,
        typer.Argument(metavar="MASK", help=f"{MASK}."),
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Compare the first one with it, instead.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH", help="Its model, or smollm2: which channels turn together."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text: what the model's heads attend to in it."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Tokens of the text; default: {_TOKENS} or the context."
        ),
    ] = None,
    sink: Sink = None,
    recent: Recent = None,
    dtype: CacheType = "bfloat16",
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw pictures into it.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all figures instead, for programs.")
    ] = False,
) -> None:
    """Tell what a mask keeps, by head and frequency, and what it saves; or compare two.

    In Python: leank.inspection, leank.mask_overlap.
    """
    if other is not None:
        given = dict(model=model, text=text, tokens=tokens, sink=sink, recent=recent)
        _refuse_beside_two(given | {"pictures": pictures})
        _compare(mask, other, as_json)
        return
    if pictures is not None:
        with needing("learn", "matplotlib", option="pictures"):
            import leank.pictures  # noqa: F401
    window = {"sink": sink, "recent": recent}
    read = _mask(mask)
    try:
        read = dataclasses.replace(read, **{key: n for key, n in window.items() if n is not None})
    except ValueError as error:  # the window
        raise CommandError(error) from error
    found, n_queries = _inspection(read, model, text, tokens)
    if as_json:
        line = {"name": mask, **found.as_json(dtype=dtype), "n_queries": n_queries}
        typer.echo(json.dumps(line, indent=1))
    else:
        from leank.inspection_report import print_inspection

        print_inspection(found, mask, Console(), dtype=dtype, n_queries=n_queries)
    if pictures is not None:
        _draw(pictures, found, Path(mask).name)


def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as JSON, for programs.")
    ] = False,
) -> None:
    """Tell versions, instruction sets, threads and GPUs, and what was built for them."""
    from leank.info import facts
    from leank.inspection_report import print_info

    try:
        found = facts()
    except ValueError as error:  # LEANK_ISA
        raise CommandError(error) from error
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_info(found, Console())


def _refuse_beside_two(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise CommandError(f"{name}: expected none with two masks, got {value}")


def _compare(a: str, b: str, as_json: bool) -> None:
    from leank.inspection_report import print_comparison
    from leank.mask_overlap import compare

    first, second = _mask(a), _mask(b)
    try:
        found = compare(first, second)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"a": a, "b": b, **found.as_json()}, indent=1))
    else:
        print_comparison(found, (a, b), Console())


def _mask(name: str) -> ChannelMask:
    from leank.mask_source import load_mask
    from leank.masks import MaskFileError

    try:
        return load_mask(name)
    except (MaskFileError, ModuleNotFoundError) as error:
        raise CommandError(f"mask: {error}") from error
    except OSError as error:
        raise CommandError(f"mask: {name}: {error.strerror or error}") from error


def _inspection(
    mask: ChannelMask, name: str | None, text: Path | None, n_tokens: int | None
) -> tuple[Inspection, int]:
    """Return what a mask keeps, and the queries that its mass is a mean over."""
    from leank.inspection import Inspection

    beside = {"--model beside it": (text, name), "--text beside it": (n_tokens, text)}
    for expected, (value, needed) in beside.items():
        if value is not None and needed is None:
            option = "text" if value is text else "tokens"
            raise CommandError(f"{option}: expected {expected}, got none")
    if name is None:
        return Inspection(mask), 0
    if text is not None and (mask.sink is None or mask.recent is None):
        raise CommandError("mask: the file does not say its window; give --sink and --recent")
    # Not at the top: torch takes seconds, and --help should not.
    with needing("hf", "torch", "transformers", option="model"):
        import torch

        from leank.loading import LoadError, Source, quiet
        from leank.model_inspection import inspect_mask
    try:
        with quiet():
            source = Source(name)
            skeleton = source.skeleton()
            found = inspect_mask(mask, skeleton)  # a mask that does not fit needs no weights
            if text is None:
                return found, 0
            ids = _ids(source.tokenizer(), text, n_tokens, skeleton.config, mask)
            on_gpu = torch.cuda.is_available()
            kind = torch.bfloat16 if on_gpu else torch.float32
            weights = source.model(kind, torch.device("cuda" if on_gpu else "cpu"))
            return inspect_mask(mask, weights, ids), ids.shape[1] - mask.sink - mask.recent
    except (LoadError, ValueError) as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CommandError("out of memory: give a smaller --tokens") from error


def _ids(tokenizer: Any, path: Path, n: int | None, config: Any, mask: ChannelMask) -> Any:
    from leank.learning.text import read_text

    [document] = read_text([path])
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if n is not None and limit is not None and n > limit:
        raise CommandError(f"tokens: expected at most the model's context of {limit}, got {n}")
    n = n or min(_TOKENS, limit or _TOKENS)
    ids = tokenizer(document, return_tensors="pt", verbose=False).input_ids[:, :n]
    if ids.shape[1] <= mask.sink + mask.recent:
        raise CommandError(
            f"text: expected more tokens than the window of {mask.sink} + {mask.recent}, "
            f"got {ids.shape[1]}"
        )
    return ids


def _draw(folder: Path, found: Inspection, name: str) -> None:
    from leank.pictures import draw

    try:
        paths = draw(folder, found, f"{name}: {found.mask.ratio:.1%} of K dropped")
    except OSError as error:
        where = error.filename or folder
        raise CommandError(f"pictures: {where}: {error.strerror or error}") from error
    for path in paths:
        typer.echo(path, err=True)
