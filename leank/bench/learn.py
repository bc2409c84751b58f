"""``leank bench learn``: mask learning's attention, forward and backward, against eager PyTorch.

Eager is the same maths with all logits in memory. Extra memory is how far the resident memory of a
fresh process (on a GPU: torch's allocated memory) rises above what inputs, outputs and gradients
take, in one forward and backward.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from leank.bench import machine
from leank.bench.clock import alternate, product_tflop_s, read_gb_s, timed
from leank.bench.lines import LearnLine, Refusal, Result, Shape, Table
from leank.bench.work import BenchError, LearnOptions, WrongResultError
from leank.learning import mixed_attention

# Of the largest value of an output or a gradient.
_BOUNDS = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}
_STATUS = Path("/proc/self/status")  # Linux tells there how much memory a process has

# One forward and backward: o and the gradients.
Step = Callable[[], list[torch.Tensor]]


def run(options: LearnOptions, progress: Console) -> Iterator[Result]:
    """Check and measure; yield the growing result after each shape.

    Parameters
    ----------
    options : LearnOptions
    progress : Console
        Gets a line for each shape.

    Raises
    ------
    BenchError
        If there is no GPU that is asked for, or its kernels do not take a number.
    WrongResultError
        If LeanK and eager differ by more than rounding.
    """
    say = functools.partial(progress.print, highlight=False, markup=False)
    if options.device == "cuda":
        _check_gpu(options)
    with machine.threads(options.threads):
        settings = {"dtype": options.dtype, **options.window, "rounds": options.rounds}
        dtype = getattr(torch, options.dtype)
        rates = {
            "product_tflop_s": product_tflop_s(options.device, dtype, options.rounds),
            "peak_gb_s": read_gb_s(options.device, options.rounds),
        }
        result = Result(
            machine.facts(options.device, options.seed, **settings), _how(options, rates)
        )
        about = f"T {options.span}, Hq/Hkv {options.q_heads}/{options.heads}, D {options.head_dim}"
        table = Table(
            "mixed attention", about, _BOUNDS[options.dtype], "of the largest value of its kind"
        )
        result.tables.append(table)
        for shape in options.shapes:
            line = _measure(shape, options, table, rates)
            table.lines.append(line)
            peers = "".join(f", {name} {us.median:,.0f} us" for name, us in line.dense_us.items())
            say(f"{shape}: leank {line.us.median:,.0f} us{peers}")
            yield result


def _check_gpu(options: LearnOptions) -> None:
    from leank.learning.ops_cuda import check_kind

    machine.need_gpu()
    try:
        check_kind(getattr(torch, options.dtype), options.head_dim)
    except (TypeError, ValueError) as error:
        raise BenchError(str(error)) from error


def _how(options: LearnOptions, rates: dict[str, float]) -> str:
    return (
        "Times are us of one forward and backward of a layer for a span of T tokens after "
        f"L - T others: medians of {options.rounds} rounds, in which all take turns; caches are as "
        "the round before left them. Operations are those of the 5 products that are needed. "
        f"Matmul: torch's product of square matrices, {rates['product_tflop_s']:.3g} TFLOP/s. "
        f"Bound: of the bytes, read at {rates['peak_gb_s']:,.0f} GB/s. Eager: the same maths in "
        "torch. Extra memory: beyond inputs, outputs and gradients."
    )


def _measure(
    shape: Shape, options: LearnOptions, table: Table, rates: dict[str, float]
) -> LearnLine:
    """Check and time one shape; eager is left out where it does not fit in memory."""
    steps = _make_steps(shape, options)
    try:
        table.checked(_check(steps, options, str(shape)))
    except torch.OutOfMemoryError as error:
        reason = f"{str(error).splitlines()[0]} leank was not checked there."
        table.refusals.append(Refusal("eager", shape, reason))
        del steps["eager"]
        torch.cuda.empty_cache()
    times = alternate(
        {name: timed(step, options.device) for name, step in steps.items()}, options.rounds
    )
    extra = {name: _extra_bytes(name, shape, options, step) for name, step in steps.items()}
    n_pairs = shape.n_rows * options.q_heads * options.span * (shape.length - options.span / 2)
    return LearnLine(
        shape=shape,
        us=times.pop("leank"),
        needed_bytes=_needed_bytes(shape, options),
        dense_us=times,
        dense_bytes=_needed_bytes(shape, options),
        n_flop=10 * options.head_dim * n_pairs,
        extra_bytes=extra,
        **rates,
    )


def _needed_bytes(shape: Shape, options: LearnOptions) -> int:
    """Return the bytes that forward and backward must move.

    Both read q, K and V; the forward writes o, the backward reads it and its gradient, and writes
    the gradients of q and of the span's K and V.
    """
    q = options.q_heads * options.span
    kv, span = (2 * options.heads * n for n in (shape.length, options.span))
    elements = 2 * (q + kv) + 3 * q + q + span
    elem_bytes = getattr(torch, options.dtype).itemsize
    return shape.n_rows * options.head_dim * elements * elem_bytes


# ----------------------------------------------------------------------------------- contenders


def _make_steps(shape: Shape, options: LearnOptions) -> dict[str, Step]:
    inputs = _inputs(shape, options)
    learned = [x for x in inputs if x.requires_grad]
    kinds = _kinds(shape, options)
    weights = torch.randn_like(inputs[0])

    def step(forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        o = forward()
        return [o.detach(), *torch.autograd.grad(o, learned, weights)]

    return {
        "leank": lambda: step(lambda: mixed_attention(*inputs, **options.window)),
        "eager": lambda: step(lambda: _eager(inputs, kinds)),
    }


def _inputs(shape: Shape, options: LearnOptions) -> list[torch.Tensor]:
    """Return q, the context's k and v, the span's, alpha; all but the context ask for gradients."""
    torch.manual_seed(options.seed)
    device, dtype = options.device, getattr(torch, options.dtype)

    def draw(n_heads: int, n_columns: int) -> torch.Tensor:
        at = (shape.n_rows, n_heads, n_columns, options.head_dim)
        return torch.randn(at, device=device).to(dtype)

    heads, n_context = options.heads, shape.length - options.span
    q, k, v = (draw(n, options.span).requires_grad_() for n in (options.q_heads, heads, heads))
    alpha = torch.rand(heads, options.head_dim, device=device, requires_grad=True)
    return [q, draw(heads, n_context), draw(heads, n_context), k, v, alpha]


def _kinds(shape: Shape, options: LearnOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (middle, -inf where a key is not seen), both [R * T, L]; made outside the timing."""
    key = torch.arange(shape.length, device=options.device)
    query = key[-options.span :, None]
    seen = key <= query
    middle = seen & (key >= options.sink) & (query - key >= options.recent)
    bias = torch.zeros(seen.shape, device=options.device).masked_fill(~seen, -torch.inf)
    R = options.q_heads // options.heads
    return middle.repeat(R, 1), bias.repeat(R, 1)


def _eager(inputs: list[torch.Tensor], kinds: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Compute it plainly: query heads of a KV head as rows, one product for each kind of logit."""
    q, k_context, v_context, k, v, alpha = inputs
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    k, v = torch.cat([k_context, k], 2), torch.cat([v_context, v], 2)
    q = q.reshape(B, Hkv, Hq // Hkv * T, D)
    middle, bias = kinds
    s = torch.where(middle, (q * alpha[:, None].to(q.dtype)) @ k.mT, q @ k.mT) / math.sqrt(D)
    A = torch.softmax(s.float() + bias, -1).to(v.dtype)
    return (A @ v).reshape(B, Hq, T, -1)


def _check(steps: dict[str, Step], options: LearnOptions, where: str) -> float:
    """Return the largest relative difference; WrongResultError where it is above the bound."""
    worst, bound = 0.0, _BOUNDS[options.dtype]
    tiny = torch.finfo(torch.float64).tiny  # without a middle alpha's gradient is 0
    for x, y in zip(steps["leank"](), steps["eager"](), strict=True):
        x, y = x.double(), y.double()
        error = ((x - y).abs().max() / y.abs().max().clamp(min=tiny)).item()
        # Written so that NaN fails.
        if not error <= bound:
            raise WrongResultError(
                f"{where}: expected an error of at most {bound:.1e} of the largest value, "
                f"got {error:.1e}"
            )
        worst = max(worst, error)
    return worst


# --------------------------------------------------------------------------------------- memory


def _extra_bytes(name: str, shape: Shape, options: LearnOptions, step: Step) -> int | None:
    """Return the bytes that one forward and backward needs beyond its results."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = sum(x.nbytes for x in step())
        return torch.cuda.max_memory_allocated() - before - kept
    if not _STATUS.exists():
        return None
    # In a process of its own; see the end of this file.
    asked = json.dumps(dataclasses.asdict(options) | {"shapes": [shape]})
    command = [sys.executable, "-m", "leank.bench.learn", name, asked]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def _own_extra_bytes(name: str, options: LearnOptions) -> int:
    """Return the extra memory of this process."""
    (shape,) = options.shapes
    step = _make_steps(shape, options)[name]
    small = Shape(shape.n_rows, 2 * options.span)
    _make_steps(small, options)[name]()  # code and thread pools are loaded
    ctypes.CDLL(None).malloc_trim(0)  # or what the small run gave back would serve this one
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident_bytes("VmRSS")
    kept = sum(x.nbytes for x in step())
    return max(0, _resident_bytes("VmHWM") - before - kept)


def _main(name: str, asked: str) -> None:
    fields = json.loads(asked)
    shapes = tuple(Shape(*shape) for shape in fields.pop("shapes"))
    options = LearnOptions(**fields, shapes=shapes)
    with machine.threads(options.threads):
        print(_own_extra_bytes(name, options))


if __name__ == "__main__":
    _main(*sys.argv[1:])
