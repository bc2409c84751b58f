"""The commands ``leank bench``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from leank.cli_errors import Command, CommandError, Group, needing
from leank.cli_options import MASK

if TYPE_CHECKING:
    from leank.bench.lines import Result

app = typer.Typer(
    name="bench",
    cls=Group,
    no_args_is_help=True,
    help="Measure LeanK on this machine, against dense attention and the bound from bytes.",
)

_Profile = Annotated[
    Literal["llama-3.1-8b", "qwen-2.5-7b", "all"] | None,
    typer.Option(
        metavar="NAME",
        help="Widths in the package: llama-3.1-8b, qwen-2.5-7b, all; default: the first on a CPU.",
        show_default=False,
    ),
]
_Mask = Annotated[str | None, typer.Option(metavar="MASK", help=f"{MASK}, instead of a profile.")]
_QHeads = Annotated[int | None, typer.Option(help="Query heads of the mask's model.")]
_Layers = Annotated[
    int | None,
    typer.Option(help="So many layers, evenly spaced; default: 4 on a CPU, all on a GPU."),
]
_Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="BxL,...", help="Rows x tokens, as 8x8192,1x4096."),
]
_Device = Annotated[
    Literal["cpu", "cuda"], typer.Option(metavar="cpu|cuda", help="Where to measure.")
]
_DType = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(metavar="TYPE", help="float32 (on a CPU), bfloat16 or float16."),
]
_DeviceDType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        metavar="TYPE",
        help="float32 (on a CPU, its default), bfloat16 (a GPU's default) or float16.",
    ),
]
_Rounds = Annotated[int, typer.Option(help="Rounds that a median is of.")]
_Sink = Annotated[int, typer.Option(help="First tokens to keep whole.")]
_Recent = Annotated[int, typer.Option(help="Last tokens to keep whole.")]
_Seed = Annotated[int, typer.Option(help="Of the values and channels.")]
_Threads = Annotated[int | None, typer.Option(help="CPU threads; default: what torch uses.")]
_Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers to it.")
]
_Png = Annotated[
    Path | None, typer.Option("--png", metavar="FILE", help="Draw rates against bytes into it.")
]


@app.command(cls=Command)
def decode(
    device: _Device = "cpu",
    profile: _Profile = None,
    mask: _Mask = None,
    q_heads: _QHeads = None,
    layers: _Layers = None,
    shapes: _Shapes = None,
    dtype: _DType = "bfloat16",
    sink: _Sink = 128,
    recent: _Recent = 896,
    rounds: _Rounds = 15,
    threads: _Threads = None,
    seed: _Seed = 0,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="On a GPU: time each layer alone, instead.")
    ] = False,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="On a GPU: heads of different widths against equal ones."),
    ] = False,
    json_file: _Json = None,
    png: _Png = None,
) -> None:
    """Time decode of one token per row against dense attention of other libraries.

    Results are checked first. Prints time, bytes, their share of what memory
    reaches, and the gain over the best dense peer.
    """
    _decode(json_file, png, **_but_files(locals()))


@app.command(cls=Command)
def append(
    device: _Device = "cpu",
    profile: _Profile = None,
    mask: _Mask = None,
    q_heads: _QHeads = None,
    layers: _Layers = None,
    shapes: _Shapes = None,
    dtype: _DType = "bfloat16",
    sink: _Sink = 128,
    recent: _Recent = 896,
    rounds: _Rounds = 15,
    threads: _Threads = None,
    seed: _Seed = 0,
    json_file: _Json = None,
    png: _Png = None,
) -> None:
    """Time what storing a new token's K and V adds to a step of decode.

    Against a write into a dense static cache, and on a CPU against one that
    copies itself.
    """
    _decode(json_file, png, append=True, **_but_files(locals()))


@app.command(cls=Command)
def learn(
    device: _Device = "cpu",
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxL,...", help="Rows x tokens; default: 1x8192, on a GPU 1x65536,1x131072."
        ),
    ] = None,
    span: Annotated[int, typer.Option(help="Tokens at the end that are learned from, T.")] = 256,
    q_heads: Annotated[int | None, typer.Option(help="Default: 9, on a GPU 32.")] = None,
    heads: Annotated[int | None, typer.Option(help="KV heads; default: 3, on a GPU 8.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Default: 64, on a GPU 128.")] = None,
    dtype: _DeviceDType = None,
    sink: _Sink = 64,
    recent: _Recent = 512,
    rounds: _Rounds = 7,
    threads: _Threads = None,
    seed: _Seed = 0,
    json_file: _Json = None,
    png: _Png = None,
) -> None:
    """Time mask learning's attention, forward and backward, against eager PyTorch.

    Results are checked first. Prints time, operations, their share of what a
    product of matrices reaches, and memory beyond inputs and results.
    """
    options = _but_files(locals())

    def start(progress: Console) -> Iterator[Result]:
        from leank.bench.work import learn_options

        asked = learn_options(**options | {"shapes": _parts(options["shapes"])})
        from leank.bench.learn import run

        return run(asked, progress)

    _run(start, json_file, png)


@app.command(cls=Command)
def generate(
    device: _Device = "cpu",
    cases: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxLxNEW,...",
            help="Rows x prompt x new tokens; default: 1x8192x8, on a GPU "
            "16x32768x128, 52x4096x128, 1x4096x256, 1x32768x256.",
        ),
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...", help="Some of dynamic, eager, static, pages, leank; leank is one."
        ),
    ] = None,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Read the prompt, do not fill caches.")
    ] = False,
    chunk: Annotated[
        int | None, typer.Option(help="With --prompt: read so many columns of it at a time.")
    ] = None,
    shape: Annotated[
        Literal["8b", "small", "tiny"] | None,
        typer.Option(metavar="NAME", help="Sizes of the model: 8b (a GPU's default), small, tiny."),
    ] = None,
    dtype: _DeviceDType = None,
    sink: _Sink = 128,
    recent: _Recent = 896,
    rounds: _Rounds = 3,
    threads: _Threads = None,
    seed: _Seed = 0,
    json_file: _Json = None,
    png: _Png = None,
) -> None:
    """Time decode of generate() against transformers' caches, with random weights.

    Prints ms a step, tokens per second, bytes of the caches, peak memory on a
    GPU and, with --prompt, the time to the first token.
    """
    options = _but_files(locals())

    def start(progress: Console) -> Iterator[Result]:
        from leank.bench.work import generate_options

        names = {name: _parts(options[name]) for name in ("cases", "contenders")}
        asked = generate_options(**options | names)
        from leank.bench.generate import run

        return run(asked, progress)

    _run(start, json_file, png)


def _but_files(options: dict[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in options.items() if k not in ("json_file", "png")}


def _decode(json_file: Path | None, png: Path | None, **options: Any) -> None:
    def start(progress: Console) -> Iterator[Result]:
        from leank.bench.work import BenchError, Options, plan

        if png is not None and (options.get("per_layer") or options.get("mixed")):
            raise BenchError(
                "png: expected none with --per-layer or --mixed, whose lines have no peers"
            )
        shapes = options.pop("shapes")
        asked = Options(**options, shapes=_parts(shapes))
        works = plan(asked)
        # When the options are known to be right: torch takes seconds.
        from leank.bench.decode import run

        return run(asked, works, progress)

    _run(start, json_file, png)


def _parts(options: list[str] | None) -> tuple[str, ...]:
    return tuple(text.strip() for option in options or () for text in option.split(","))


def _run(
    start: Callable[[Console], Iterator[Result]],
    json_file: Path | None,
    png: Path | None,
) -> None:
    """Measure, save after each step, print and draw."""
    from leank.bench.work import BenchError, WrongResultError

    try:
        with (
            needing("hf", "torch", "transformers", "huggingface_hub"),
            needing("learn", "matplotlib"),
        ):
            _measure(start, json_file, png)
    except BenchError as error:
        raise CommandError(error) from error
    except ModuleNotFoundError as error:
        if error.name != "leank._cuda":
            raise
        raise CommandError(error) from error  # it says what to do
    except WrongResultError as error:
        raise CommandError(f"WRONG RESULT: {error}", status=1) from error


def _measure(
    start: Callable[[Console], Iterator[Result]], json_file: Path | None, png: Path | None
) -> None:
    _check_files(json_file, png)  # before what takes minutes
    if png is not None:
        from leank.bench.picture import draw
    steps = start(Console(stderr=True))
    from leank.bench.report import print_report

    for result in steps:
        if json_file is not None:
            _save(json_file, result)
    print_report(result, Console(), peers=json_file is None)
    if png is not None:
        _draw(draw, png, result)


def _check_files(json_file: Path | None, png: Path | None) -> None:
    from leank.bench.work import BenchError

    for name, path in (("json", json_file), ("png", png)):
        if path is not None and not path.parent.is_dir():
            raise BenchError(f"{name}: {path.parent}: no such folder")
    if png is not None and png.suffix != ".png":
        raise BenchError(f"png: expected a name that ends in .png, got {png}")


def _save(path: Path, result: Result) -> None:
    from leank.bench.lines import as_json
    from leank.bench.work import BenchError

    try:
        path.write_text(json.dumps(as_json(result), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"json: {path}: {error.strerror or error}") from error


def _draw(draw: Callable[[Path, Result], bool], path: Path, result: Result) -> None:
    from leank.bench.work import BenchError

    try:
        drawn = draw(path, result)
    except OSError as error:
        raise BenchError(f"png: {path}: {error.strerror or error}") from error
    if not drawn:
        raise BenchError("png: nothing was measured that a picture could show")
