"""What ``leank bench`` is asked; needs neither torch nor a GPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import leank
from leank.bench.lines import Case, Shape
from leank.bench.profiles import load_profiles

_TABLE = [(64, 32768), (16, 32768), (1, 131072), (64, 4096), (8, 8192), (1, 1024), (1, 4096)]
_SHAPES = {
    "llama-3.1-8b": tuple(Shape(*pair) for pair in _TABLE),
    "qwen-2.5-7b": (Shape(16, 32768),),
}
# What a CPU with two cores does within half a minute.
_CPU_PROFILE, _CPU_LAYERS = "llama-3.1-8b", 4
_CPU_SHAPES = (Shape(1, 4096), Shape(1, 32768))
_GPU_DTYPES = ("bfloat16", "float16")
# A query always sees its own token whole: recent is 1 at least.
_LEAST = {
    **dict.fromkeys(
        ("q_heads", "heads", "head_dim", "layers", "rounds", "threads", "span", "chunk"), 1
    ),
    **{"sink": 0, "recent": 1, "seed": 0},
}


class BenchError(Exception):
    """A mistake in what the user asked for, or a machine that cannot do it; one line of text."""


class WrongResultError(Exception):
    """LeanK's result is outside its error bound; one line of text."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``leank bench decode`` and ``leank bench append``."""

    device: str = "cpu"  # or "cuda"
    profile: str | None = None  # one name or "all"; None is the device's default without a mask
    mask: str | Path | None = None
    q_heads: int | None = None
    layers: int | None = None  # None: some on a CPU, all on a GPU
    shapes: tuple[str, ...] = ()
    rounds: int = 15
    sink: int = 128
    recent: int = 896
    dtype: str = "bfloat16"
    seed: int = 0
    threads: int | None = None  # of the CPU; None is what torch uses
    per_layer: bool = False
    append: bool = False
    mixed: bool = False

    @property
    def window(self) -> dict[str, int]:
        """S0 and W, as keyword arguments."""
        return {"sink": self.sink, "recent": self.recent}


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One mask to measure, bool [N, Hkv, D], and where."""

    name: str
    keep: npt.NDArray[np.bool_]
    n_q_heads: int
    shapes: tuple[Shape, ...]

    @property
    def n_heads(self) -> int:
        """KV heads of a layer, Hkv."""
        return self.keep.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head, D."""
        return self.keep.shape[2]


def check_numbers(options: object) -> None:
    """Raise BenchError where a number of any command's options is too small."""
    for name, least in _LEAST.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise BenchError(f"{name.replace('_', '-')}: expected at least {least}, got {value}")


def check_dtype(device: str, dtype: str) -> None:
    """Raise BenchError where the kernels of a device do not take a type."""
    if device == "cuda" and dtype not in _GPU_DTYPES:
        raise BenchError(f"dtype: expected one of {', '.join(_GPU_DTYPES)} on a GPU, got {dtype}")


def plan(options: Options) -> list[Work]:
    """Return what the options ask for.

    Raises
    ------
    BenchError
        If an option or the mask file cannot be used.
    """
    check_numbers(options)
    check_dtype(options.device, options.dtype)
    for name in ("per_layer", "mixed"):
        if options.device == "cpu" and getattr(options, name):
            raise BenchError(f"{name.replace('_', '-')}: expected --device cuda, got cpu")
    shapes = tuple(parse_shape(text) for text in options.shapes)
    if options.mask is not None:
        if options.profile is not None:
            raise BenchError(f"profile: expected none with --mask, got {options.profile}")
        return [_work_of_mask(options, shapes)]
    if options.q_heads is not None:
        raise BenchError(f"q-heads: expected none without --mask, got {options.q_heads}")
    chosen = options.profile or (_CPU_PROFILE if options.device == "cpu" else "all")
    works = []
    for name, profile in load_profiles().items():
        if chosen in ("all", name):
            keep = _some_layers(profile.keep(options.seed), options)
            at = shapes or _default_shapes(name, options)
            works.append(Work(name, keep, profile.n_q_heads, at))
    return works


def _default_shapes(profile: str, options: Options) -> tuple[Shape, ...]:
    return _CPU_SHAPES if options.device == "cpu" else _SHAPES[profile]


def _work_of_mask(options: Options, shapes: tuple[Shape, ...]) -> Work:
    path = options.mask
    try:
        keep = leank.load_mask(path).keep
    except (leank.MaskFileError, ModuleNotFoundError) as error:
        raise BenchError(f"mask: {error}") from error
    except OSError as error:
        raise BenchError(f"mask: {path}: {error.strerror or error}") from error
    n_heads, n_q_heads = keep.shape[1], options.q_heads
    if n_q_heads is None or n_q_heads % n_heads:
        raise BenchError(
            f"q-heads: expected a multiple of the mask's {n_heads} KV heads, "
            f"got {'none' if n_q_heads is None else n_q_heads}"
        )
    keep = _some_layers(keep, options)
    at = shapes or _default_shapes("llama-3.1-8b", options)
    return Work(Path(path).name, keep, n_q_heads, at)


def _some_layers(keep: npt.NDArray[np.bool_], options: Options) -> npt.NDArray[np.bool_]:
    """Return as many of the layers as are asked for, as far apart as they can be."""
    n = options.layers
    if n is None:
        n = len(keep) if options.device == "cuda" else min(len(keep), _CPU_LAYERS)
    if n > len(keep):
        raise BenchError(f"layers: expected at most the mask's {len(keep)}, got {n}")
    return keep[[i * len(keep) // n for i in range(n)]]


def parse_shape(text: str) -> Shape:
    """Return the shape that an option names; BenchError if it names none."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise BenchError(f"shapes: expected BxL as 8x8192, got {text!r}")
    return Shape(*(int(n) for n in found.groups()))


# ------------------------------------------------------------------- mask learning's attention

# A layer of SmolLM2-135M, and of an 8B model.
_LEARN_SIZES = {
    "cpu": {"shapes": ("1x8192",), "q_heads": 9, "heads": 3, "head_dim": 64, "dtype": "float32"},
    "cuda": {
        "shapes": ("1x65536", "1x131072"),
        "q_heads": 32,
        "heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """The options of ``leank bench learn``; L of a shape counts context and span."""

    device: str
    shapes: tuple[Shape, ...]
    span: int
    q_heads: int
    heads: int
    head_dim: int
    dtype: str
    sink: int
    recent: int
    rounds: int
    threads: int | None
    seed: int

    @property
    def window(self) -> dict[str, int]:
        """S0 and W, as keyword arguments."""
        return {"sink": self.sink, "recent": self.recent}


def learn_options(device: str, shapes: tuple[str, ...], **options: Any) -> LearnOptions:
    """Return what is asked, with the device's default where an option is None.

    Raises
    ------
    BenchError
        If an option cannot be used.
    """
    given = {**options, "shapes": shapes or None}
    chosen = {k: x for k, x in given.items() if x is not None or k == "threads"}
    asked = LearnOptions(device=device, **_LEARN_SIZES[device] | chosen)
    check_numbers(asked)
    check_dtype(device, asked.dtype)
    if asked.q_heads % asked.heads:
        raise BenchError(f"q-heads: expected a multiple of {asked.heads}, got {asked.q_heads}")
    asked = dataclasses.replace(asked, shapes=tuple(map(parse_shape, asked.shapes)))
    for shape in asked.shapes:
        if shape.length < asked.span:
            raise BenchError(
                f"shapes: expected at least the span's {asked.span} tokens, got {shape}"
            )
    return asked


# ------------------------------------------------------------------------------------- generate()

PEERS = ("dynamic", "static")
# Eager ones first: a compiler that was loaded makes Python slower.
_CONTENDERS = ("dynamic", "eager", "static", "pages", "leank")
_GENERATE_SIZES = {
    "cpu": {
        "cases": ("1x8192x8",),
        # Nothing is captured on a CPU: eager would be leank.
        "contenders": (*PEERS, "pages", "leank"),
        "shape": "small",
        "dtype": "float32",
    },
    "cuda": {
        "cases": ("16x32768x128", "52x4096x128", "1x4096x256", "1x32768x256"),
        "contenders": _CONTENDERS,
        "shape": "8b",
        "dtype": "bfloat16",
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of ``leank bench generate``; a case is rows x prompt x new tokens."""

    device: str
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    prompt: bool  # read it, instead of filling caches
    chunk: int | None  # so many columns at a time
    shape: str
    dtype: str
    sink: int
    recent: int
    rounds: int
    threads: int | None
    seed: int

    @property
    def window(self) -> dict[str, int]:
        """S0 and W, as keyword arguments."""
        return {"sink": self.sink, "recent": self.recent}


def generate_options(
    device: str, cases: tuple[str, ...], contenders: tuple[str, ...], **options: Any
) -> GenerateOptions:
    """Return what is asked, with the device's default where an option is None or empty.

    Contenders come in the order of ``_CONTENDERS``.

    Raises
    ------
    BenchError
        If an option cannot be used.
    """
    given = {**options, "cases": cases or None, "contenders": contenders or None}
    chosen = {k: x for k, x in given.items() if x is not None or k in ("threads", "chunk")}
    asked = GenerateOptions(device=device, **_GENERATE_SIZES[device] | chosen)
    check_numbers(asked)
    check_dtype(device, asked.dtype)
    if asked.chunk is not None and not asked.prompt:
        raise BenchError(f"chunk: expected none without --prompt, got {asked.chunk}")
    for name in asked.contenders:
        if name not in _CONTENDERS:
            raise BenchError(f"contenders: expected some of {', '.join(_CONTENDERS)}, got {name!r}")
    if "leank" not in asked.contenders:
        raise BenchError(
            f"contenders: expected leank among them, got {', '.join(asked.contenders)}"
        )
    ordered = tuple(name for name in _CONTENDERS if name in asked.contenders)
    cases = tuple(_case(text) for text in asked.cases)
    return dataclasses.replace(asked, cases=cases, contenders=ordered)


def _case(text: str) -> Case:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise BenchError(f"cases: expected BxLxNEW as 16x32768x128, got {text!r}")
    case = Case(*(int(n) for n in found.groups()))
    if case.n_new < 2:
        raise BenchError(f"cases: expected at least 2 new tokens, got {case}")
    return case
