"""Mask learning's attention, forward and backward, against the same maths in eager PyTorch.

python -m tests.bench.bench_learn [--dtype float32] [--rounds 7] [--threads 2]
python -m tests.bench.bench_learn --device cuda

Checks against the eager result first. Times alternate. Extra memory is how far the resident memory
of a fresh process (on the GPU: torch's allocated memory) rises above what inputs, outputs and
gradients take, in one forward and backward. On the GPU the default sizes are those of an 8B model,
at two lengths; times are between events on the stream, after two rounds that do not count, and
caches are as the round before left them: K and V are larger than they are.
"""

import argparse
import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from leank.learning import mixed_attention
from tests.bench import lib

SIZES = {
    "cpu": {"dtype": "float32", "lengths": [8192], "q_heads": 9, "heads": 3, "dim": 64},
    "cuda": {
        "dtype": "bfloat16",
        "lengths": [65536, 131072],
        "q_heads": 32,
        "heads": 8,
        "dim": 128,
    },
}
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}


def make_inputs(args: argparse.Namespace) -> list[torch.Tensor]:
    """Return q, the context's k and v, the span's, alpha; all but the context ask for gradients."""
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)

    def draw(n_heads: int, n_columns: int) -> torch.Tensor:
        x = torch.randn(args.rows, n_heads, n_columns, args.dim, device=args.device)
        return x.to(dtype)

    n_context = args.length - args.columns
    q, k, v = (draw(n, args.columns).requires_grad_() for n in (args.q_heads, *[args.heads] * 2))
    alpha = torch.rand(args.heads, args.dim, device=args.device, requires_grad=True)
    return [q, draw(args.heads, n_context), draw(args.heads, n_context), k, v, alpha]


def eager(
    inputs: list[torch.Tensor], kinds: tuple[torch.Tensor, torch.Tensor], n_rows_folded: int
) -> torch.Tensor:
    """Compute it plainly: query heads of a KV head as rows, one product for each kind of logit."""
    q, k_context, v_context, k, v, alpha = inputs
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    k, v = torch.cat([k_context, k], 2), torch.cat([v_context, v], 2)
    q = q.reshape(B, Hkv, n_rows_folded, D)
    middle, bias = kinds
    s = torch.where(middle, (q * alpha[:, None].to(q.dtype)) @ k.mT, q @ k.mT) / math.sqrt(D)
    A = torch.softmax(s.float() + bias, -1).to(v.dtype)
    return (A @ v).reshape(B, Hq, T, -1)


def find_kinds(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (middle, -inf where a key is not seen), both [R * T, L]; made outside the timing."""
    key = torch.arange(args.length, device=args.device)
    query = key[-args.columns :, None]
    seen = key <= query
    middle = seen & (key >= args.sink) & (query - key >= args.recent)
    bias = torch.zeros(seen.shape, device=args.device).masked_fill(~seen, -torch.inf)
    R = args.q_heads // args.heads
    return middle.repeat(R, 1), bias.repeat(R, 1)


def make_contenders(args: argparse.Namespace) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Return functions that do one forward and backward, and return o and the gradients."""
    inputs = make_inputs(args)
    learned = [x for x in inputs if x.requires_grad]
    kinds = find_kinds(args)
    weights = torch.randn_like(inputs[0])
    window = {"sink": args.sink, "recent": args.recent}

    def run(forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        o = forward()
        return [o.detach(), *torch.autograd.grad(o, learned, weights)]

    return {
        "leank": lambda: run(lambda: mixed_attention(*inputs, **window)),
        "eager": lambda: run(lambda: eager(inputs, kinds, len(kinds[0]))),
    }


def check(
    contenders: dict[str, Callable[[], list[torch.Tensor]]], args: argparse.Namespace
) -> float:
    """Raise where both differ by more than rounding; return the largest relative difference."""
    worst = 0.0
    for x, y in zip(contenders["leank"](), contenders["eager"](), strict=True):
        error = ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
        # Written so that a NaN fails.
        if not error <= LARGEST_ERROR[args.dtype]:
            raise SystemExit(f"results differ by {error:.1e} of the largest value")
        worst = max(worst, error)
    return worst


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {field}")


def measure_memory(args: argparse.Namespace) -> None:
    """Print how many bytes one forward and backward of args.memory_of needs beyond its results."""
    run = make_contenders(args)[args.memory_of]
    small = argparse.Namespace(**vars(args) | {"length": 2 * args.columns})
    make_contenders(small)[args.memory_of]()  # code and thread pools are loaded
    ctypes.CDLL(None).malloc_trim(0)  # or what the small run gave back would serve this one
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_bytes("VmRSS")
    results = run()
    kept = sum(x.nbytes for x in results)
    print(max(0, resident_bytes("VmHWM") - before - kept))


def memory_of(name: str, args: argparse.Namespace, run: Callable[[], list[torch.Tensor]]) -> int:
    """Return the bytes that one forward and backward needs beyond its results."""
    if args.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = sum(x.nbytes for x in run())
        return torch.cuda.max_memory_allocated() - before - kept
    # What measure_memory prints in a process of its own.
    command = [sys.executable, "-m", "tests.bench.bench_learn", *sys.argv[1:], "--memory-of", name]
    command += ["--length", str(args.length)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def timed(run: Callable[[], object], device: str) -> Callable[[int], int | float]:
    """Return what lib.alternate calls."""

    def on_cuda(_: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_cuda if device == "cuda" else lambda _: run() and 1


def measure(args: argparse.Namespace) -> None:
    """Check, time and print one length; say so where eager does not fit in memory."""
    print(
        f"{args.dtype}: B {args.rows}, Hq/Hkv {args.q_heads}/{args.heads}, T {args.columns}, "
        f"L {args.length}, D {args.dim}, sink {args.sink}, recent {args.recent}; "
        f"medians of {args.rounds} rounds, forward and backward"
    )
    contenders = make_contenders(args)
    try:
        error = check(contenders, args)
    except torch.OutOfMemoryError as reason:
        print(f"  eager: {str(reason).splitlines()[0]}\n  leank was not checked at this length")
        error = None
    if error is None:
        del contenders["eager"]
        torch.cuda.empty_cache()
    times = lib.alternate(
        {name: timed(run, args.device) for name, run in contenders.items()}, args.rounds
    )
    extra = {name: memory_of(name, args, run) for name, run in contenders.items()}
    n_pairs = args.rows * args.q_heads * args.columns * (args.length - args.columns / 2)
    for name in contenders:
        rate = 10 * args.dim * n_pairs / times[name].median / 1e12
        print(
            f"  {name:6s} {times[name]}   {rate:.2f} TFLOP/s of the 5 products that are needed   "
            f"extra memory {extra[name] / 2**20:.1f} MiB"
        )
    if error is not None:
        print(
            f"  leank takes {times['leank'].median / times['eager'].median:.3f} of the time of "
            f"eager and {extra['leank'] / max(1, extra['eager']):.3f} of its extra memory; "
            f"largest difference {error:.1e} of the largest value"
        )


def main() -> None:
    """Check, time, measure memory, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=SIZES)
    parser.add_argument("--dtype", choices=LARGEST_ERROR)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--columns", type=int, default=256, help="T")
    parser.add_argument("--length", type=int, help="L, context and span")
    parser.add_argument("--q-heads", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", choices=("leank", "eager"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = SIZES[args.device]
    for name, default in sizes.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, default)
    lengths = sizes["lengths"] if args.length is None else [args.length]
    torch.set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(args)
        return
    machine = lib.machine(args.threads, args.seed)
    if args.device == "cuda":
        machine |= lib.gpu()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    for length in lengths:
        measure(argparse.Namespace(**vars(args) | {"length": length}))


if __name__ == "__main__":
    main()
