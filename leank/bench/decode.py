"""``leank bench decode`` and ``leank bench append``: the loop over masks and shapes.

What is measured on a device is in `decode_cpu` and `decode_cuda`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from leank.bench import machine
from leank.bench.decode_cpu import OnCpu
from leank.bench.lines import AppendLine, LayerLine, Line, MixedLine, Refusal, Result, Table
from leank.bench.truth import MEASURE, error_bound
from leank.bench.work import Options, Work

if TYPE_CHECKING:
    from leank.bench.decode_cuda import OnCuda


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
        If there is no GPU that is asked for, or the kernels do not take a mask or a shape.
    WrongResultError
        If a result is outside its error bound.
    ImportError
        If the kernels for GPUs were not built.
    """
    say = functools.partial(progress.print, highlight=False, markup=False)
    with machine.threads(options.threads):
        device = _device(options, works)
        torch.manual_seed(options.seed)
        settings = {"dtype": options.dtype, **options.window, "rounds": options.rounds}
        result = Result(machine.facts(options.device, options.seed, **settings), device.how)
        for work in works:
            table = _table(work, options)
            device.check(work, table)
            result.tables.append(table)
            for shape in work.shapes:
                try:
                    for line in device.lines(work, shape, table):
                        table.lines.append(line)
                        say(f"{work.name} {_in_words(line)}")
                        yield result
                except (torch.OutOfMemoryError, MemoryError) as error:
                    reason = (str(error) or "out of memory").splitlines()[0]
                    table.refusals.append(Refusal("leank", shape, reason))
                    say(f"{work.name} {shape}: {reason}")
                    yield result


def _device(options: Options, works: list[Work]) -> OnCpu | OnCuda:
    if options.device == "cpu":
        return OnCpu(options)
    from leank.bench.decode_cuda import OnCuda

    return OnCuda(options, works)


def _table(work: Work, options: Options) -> Table:
    return Table(
        name=work.name,
        about=f"{len(work.keep)} layers, Hq/Hkv {work.n_q_heads}/{work.n_heads}, D {work.head_dim}",
        bound=error_bound(getattr(torch, options.dtype)),
        measure=MEASURE,
    )


def _in_words(line: Line | LayerLine | MixedLine) -> str:
    """Return one line about what was measured, for those who wait."""
    if isinstance(line, LayerLine):
        rate = f"{line.tb_s:.2f} TB/s, {line.share:.0%} of a sum's"
        return f"{line.shape}: layer {line.layer} {line.us:.1f} us, {rate}"
    if isinstance(line, MixedLine):
        return f"{line.shape}: mixed {line.mixed_us:.1f} us, equal {line.equal_us:.1f} us"
    peers = "".join(f", {name} {us.median:.1f} us" for name, us in line.dense_us.items())
    if isinstance(line, AppendLine):
        return f"{line.shape}: storing adds {line.added:.1%} to attending{peers}"
    return f"{line.shape}: leank {line.us.median:.1f} us{peers}"
