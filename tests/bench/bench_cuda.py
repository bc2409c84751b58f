"""CUDA decode of one token per row from a pruned cache, against dense attention in PyTorch.

    python -m tests.bench.bench_cuda [--mask FILE]

LeanK's time is that of decode with the new token stored, mean over the layers of the mask (without
a file: random channels with the widths of the Llama-3.1-8B mask of the reference implementation).
Each contender is captured in CUDA graphs of as many layers as fit in memory, one after the other.
Before each replay a write of twice the L2 cache evicts what was read before. Medians.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from leank.cuda import LayerCache, decode
from tests import compare
from tests.bench import lib
from tests.cuda_tools import to_coded

# B and L.
SHAPES = [(1, 1024), (1, 4096), (8, 8192), (64, 4096), (1, 131072), (16, 32768), (64, 32768)]
# Dense K and V of the layers that share a graph, at most (but one layer at least).
GRAPH_BYTES = 24 << 30
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Timer:
    """Microseconds of captured work, with L2 evicted before each replay."""

    def __init__(self, n_rounds: int) -> None:
        self.n_rounds = n_rounds
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, work) -> float:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        times = []
        for i in range(3 + self.n_rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)


def needed_bytes(keep: np.ndarray, length: int, n_rows: int, args: argparse.Namespace) -> int:
    """Bytes that one decode of a layer must read: kept K and V, the window whole."""
    dim, kept = keep.shape[1], keep.sum(1)
    window = min(length, args.sink + args.recent)
    per_token = sum(int(n) + dim for n in kept if n)
    return n_rows * 2 * (window * 2 * dim * len(kept) + (length - window) * per_token)


def filled(keep: np.ndarray, n_rows: int, length: int, args: argparse.Namespace) -> LayerCache:
    """Return a cache of length - 1 tokens; all rows and all spans of 1024 tokens are the same."""
    window = {"sink": args.sink, "recent": args.recent}
    n_steps = 2 * (args.rounds + 8)
    cache = LayerCache(keep, n_rows=n_rows, max_tokens=length + n_steps, **window)
    shape = (1, len(keep), min(length, 1024), keep.shape[1])
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    k, v = (x.expand(n_rows, -1, -1, -1) for x in (k, v))
    left = length - 1
    while left > 0:
        n = min(left, shape[2])
        cache.append(k[:, :, :n], v[:, :, :n])
        left -= n
    return cache


def check(keep: np.ndarray, args: argparse.Namespace) -> float:
    """Raise if a decode is outside the error budget; return the largest error.

    The work is large enough to be cut into several chunks per block.
    """
    n = 40_000
    cache = LayerCache(keep, n_rows=1, sink=args.sink, recent=args.recent, max_tokens=n)
    shape = (1, len(keep), n, keep.shape[1])
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(1, args.q_heads, 1, shape[3], device="cuda", dtype=torch.bfloat16)
    cache.append(k[:, :, :-1], v[:, :, :-1])
    out = decode(cache, q, k[:, :, -1:].contiguous(), v[:, :, -1:].contiguous())
    truth, plain = compare.truth_and_plain(
        *(to_coded(x[0]) for x in (q, k, v)),
        [n - 1],
        keep,
        "bfloat16",
        sink=args.sink,
        recent=args.recent,
        lo=args.sink,
        n0=0,
        scale=shape[3] ** -0.5,
    )
    got = compare.decode(to_coded(out[0]), "bfloat16")
    compare.assert_within_budget(got, truth, plain, "bfloat16", "check")
    return float(np.abs(got - truth).max())


def measure_leank(
    keep: np.ndarray, n_rows: int, length: int, n: int, time, args: argparse.Namespace
) -> float:
    """Microseconds of one layer, mean over the layers; n of them share a graph."""
    dim = keep.shape[2]
    q = torch.randn(n_rows, args.q_heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(n_rows, keep.shape[1], 1, dim, device="cuda", dtype=torch.bfloat16)
        for _ in "kv"
    )
    total = 0.0
    for first in range(0, len(keep), n):
        caches = [filled(layer, n_rows, length, args) for layer in keep[first : first + n]]

        def work(caches=caches):
            for cache in caches:
                decode(cache, q, k, v)

        total += time(work)
    return total / len(keep)


def measure_dense(
    n_heads: int, dim: int, n_rows: int, length: int, n: int, time, args: argparse.Namespace
) -> dict[str, float]:
    """Microseconds of one layer by each backend that takes the shape."""
    shape = (n_rows, n_heads, length, dim)
    q = torch.randn(n_rows, args.q_heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    pairs = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv"] for _ in range(n)
    ]

    def work():
        for k, v in pairs:
            sdpa(q, k, v, enable_gqa=True)

    times = {}
    for name, backend in DENSE.items():
        try:
            with sdpa_kernel(backend):
                times[name] = time(work) / n
        except RuntimeError as error:
            print(f"  {name} does not take this shape: {str(error).splitlines()[0]}")
    return times


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mask", type=Path, help=".pth or .safetensors mask file")
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--layers", type=int, help="only every N/LAYERS-th layer of the mask")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--recent", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", help="only these, as 8x8192 (B x L)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    keep = lib.load_keep(args.mask, args.seed)
    if args.layers:
        keep = keep[:: max(1, len(keep) // args.layers)]
    machine = {"gpu": torch.cuda.get_device_name(), **lib.machine(1, args.seed)}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    n_heads, dim = keep.shape[1:]
    print(
        f"{len(keep)} layers, Hq/Hkv {args.q_heads}/{n_heads}, D {dim}, sink {args.sink}, "
        f"recent {args.recent}; largest error {check(keep[0], args):.1e}"
    )
    time, lines = Timer(args.rounds), []
    for n_rows, length in SHAPES:
        if args.shapes and f"{n_rows}x{length}" not in args.shapes:
            continue
        n = min(len(keep), max(1, GRAPH_BYTES // (n_rows * length * n_heads * dim * 4)))
        us = measure_leank(keep, n_rows, length, n, time, args)
        torch.cuda.empty_cache()
        dense = measure_dense(n_heads, dim, n_rows, length, n, time, args)
        needed = float(np.mean([needed_bytes(layer, length, n_rows, args) for layer in keep]))
        ratio = n_rows * length * n_heads * dim * 4 / needed
        best = min(dense, key=dense.get)
        lines.append({"B": n_rows, "L": length, "us": us, "dense": dense, "bytes": needed})
        print(
            f"B {n_rows:3d}  L {length:6d}  leank {us:8.1f} us, {needed / us / 1e6:5.2f} TB/s;  "
            f"{best} {dense[best]:8.1f} us;  gain {dense[best] / us:.2f} of byte ratio {ratio:.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
