"""``leank bench decode``: decode of one token per row on a GPU, against dense attention.

LeanK's time is that of decode with the new token stored, mean over the layers of a mask; dense
peers only attend. Each contender is captured in CUDA graphs of as many layers as fit in memory, one
after the other. Before each replay a write of twice the L2 cache evicts what was read before.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from rich.console import Console

import leank
from leank._cuda_ops import _cuda
from leank.bench import details
from leank.bench.layers import Layers, Timer, check, layers_per_graph
from leank.bench.peers import measure_peers
from leank.bench.profiles import dense_bytes, needed_bytes
from leank.bench.truth import error_bound
from leank.bench.work import (
    AppendLine,
    BenchError,
    LayerLine,
    Line,
    MixedLine,
    Options,
    Refusal,
    Result,
    Shape,
    Table,
    Work,
)


def run(options: Options, works: list[Work], progress: Console) -> Iterator[Result]:
    """Check and measure; yield the growing result after each step, so that it can be saved.

    Parameters
    ----------
    options : Options
    works : list of Work
        What `plan` made of the options.
    progress : Console
        Gets a line for each step.

    Raises
    ------
    BenchError
        If there is no GPU, or the kernels do not take a mask or a shape.
    WrongResultError
        If a result is outside its error bound.
    """
    if not torch.cuda.is_available():
        raise BenchError(f"needs an NVIDIA GPU; torch {torch.__version__} finds none")
    for work in works:
        _check_limits(work, options)
    say = functools.partial(progress.print, highlight=False, markup=False)
    torch.manual_seed(options.seed)
    result, time = Result(_facts(options)), Timer(options.rounds)
    for work in works:
        table = _checked(work, options)
        result.tables.append(table)
        say(f"{work.name}: largest error {table.error:.1e}")
        yield result
        for shape in work.shapes:
            try:
                for line in _measure(work, shape, time, options, table.refusals):
                    table.lines.append(line)
                    say(f"{work.name} {_in_words(line)}")
                    yield result
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                table.refusals.append(Refusal("leank", shape, reason))
                say(f"{work.name} {shape}: {reason}")
                yield result
            torch.cuda.empty_cache()


def _check_limits(work: Work, options: Options) -> None:
    n_per_head = work.n_q_heads // work.n_heads
    if work.head_dim not in _cuda.HEAD_DIMS:
        raise BenchError(f"mask: expected a head dim of {_cuda.HEAD_DIMS}, got {work.head_dim}")
    if n_per_head > _cuda.MAX_R:
        raise BenchError(
            f"q-heads: expected at most {_cuda.MAX_R} per KV head, got {n_per_head} in {work.name}"
        )
    most = min(65535, _cuda.MAX_UNITS // work.n_heads)
    for shape in work.shapes:
        if shape.n_rows > most:
            raise BenchError(f"shapes: expected at most {most} rows, got {shape}")
    if options.mixed:
        details.mixed_widths(work.n_heads, work.head_dim)


def _checked(work: Work, options: Options) -> Table:
    return Table(
        name=work.name,
        n_layers=len(work.keep),
        n_q_heads=work.n_q_heads,
        n_heads=work.n_heads,
        head_dim=work.head_dim,
        error=check(work, options),
        bound=error_bound(getattr(torch, options.dtype)),
    )


def _measure(
    work: Work, shape: Shape, time: Timer, options: Options, refusals: list[Refusal]
) -> Iterator[Line | LayerLine | AppendLine | MixedLine]:
    if options.per_layer:
        yield from details.per_layer(work, shape, time, options)
    if options.append:
        yield details.append_share(work, shape, time, options)
    if options.mixed:
        yield details.mixed(work, shape, time, options)
    if not (options.per_layer or options.append or options.mixed):
        yield _against_peers(work, shape, time, options, refusals)


def _against_peers(
    work: Work, shape: Shape, time: Timer, options: Options, refusals: list[Refusal]
) -> Line:
    us = _leank(work, shape, time, options)
    torch.cuda.empty_cache()
    n, dtype = layers_per_graph(work, shape), getattr(torch, options.dtype)
    dense_us, reasons = measure_peers(work, shape, n, dtype, time)
    refusals.extend(Refusal(name, shape, reason) for name, reason in reasons.items())
    needed = [needed_bytes(keep, *shape, **options.window) for keep in work.keep]
    return Line(shape, us, float(np.mean(needed)), dense_bytes(work.keep[0], *shape), dense_us)


def _leank(work: Work, shape: Shape, time: Timer, options: Options) -> float:
    """Microseconds of one layer, mean over all of them."""
    n, total = layers_per_graph(work, shape), 0.0
    for first in range(0, len(work.keep), n):
        layers = Layers(work.keep[first : first + n], work.n_q_heads, shape, options)
        total += sum(time(layers.store_and_attend))
        layers.check()
        del layers  # before the next ones are made
    return total / len(work.keep)


def _in_words(line: Line | LayerLine | AppendLine | MixedLine) -> str:
    """Return one line about what was measured, for those who wait."""
    if isinstance(line, LayerLine):
        rate = f"{line.tb_s:.2f} TB/s, {line.share:.0%} of a sum's"
        return f"{line.shape}: layer {line.layer} {line.us:.1f} us, {rate}"
    if isinstance(line, AppendLine):
        return f"{line.shape}: storing adds {line.share:.1%} to {line.attending_us:.1f} us"
    if isinstance(line, MixedLine):
        return f"{line.shape}: mixed {line.mixed_us:.1f} us, equal {line.equal_us:.1f} us"
    peers = "".join(f", {name} {us:.1f} us" for name, us in line.dense_us.items())
    return f"{line.shape}: leank {line.us:.1f} us{peers}"


def _facts(options: Options) -> dict[str, str | int]:
    """Return what a reader needs to compare numbers."""
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "cuDNN": str(torch.backends.cudnn.version()),
        "FlashInfer": _flashinfer_version(),
        "leank": leank.__version__,
        "kernels": ", ".join(leank.capabilities()["cuda_built"]),
        "date": datetime.date.today().isoformat(),
        "dtype": options.dtype,
        **options.window,
        "rounds": options.rounds,
        "seed": options.seed,
    }


def _driver() -> str:
    """Return the version of the driver; torch only knows that of the CUDA interface."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 else "unknown"


def _flashinfer_version() -> str:
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:  # built from source under another name
        return "unknown version"
