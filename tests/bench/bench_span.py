"""The bars of attention with several tokens per row, and of head dim 256, on one GPU.

python -m tests.bench.bench_span
python -m tests.bench.bench_span --only drafts --rounds 9

drafts: T 8 against T 1, both stored, B 8, L 32k: at most 1.5 times the time. turn: T 2048 on 30k
cached tokens, B 1, against cuDNN's dense attention of the same call: at most twice the time. torch
gives it a mask in memory for what is causal at the lower right; without a mask, so that every query
sees every key, it does 3% more work. The faster of the two counts. wide: decode at D 256, Hq/Hkv
8/1, B 32, L 32k: at least 85% of the bandwidth that a sum over the same pages reaches.

drafts and turn are means over every 4th layer of the Llama-3.1-8B widths (--layers: others), bf16.
A call is timed with CUDA events around it, from the same lengths each time and after a write of
twice the L2 cache; medians of the rounds. Before, each is compared with float64 on fewer tokens.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from leank.bench.machine import facts
from leank.bench.profiles import load_profiles, needed_bytes
from leank.bench.truth import attend64, error_bound, relative_error
from leank.cuda import LayerCache, decode

WINDOW = {"sink": 128, "recent": 896}
R = 4
DTYPE = torch.bfloat16


def draw(*shape: int) -> torch.Tensor:
    """Return standard normal values on the GPU."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def filled(keep: np.ndarray, n_rows: int, length: int, room: int) -> LayerCache:
    """Return a cache with `length` tokens per row; spans of 1024 are the same."""
    n_heads, head_dim = keep.shape
    cache = LayerCache(keep, n_rows=n_rows, max_tokens=length + room, dtype=DTYPE, **WINDOW)
    span = [draw(1, n_heads, 1024, head_dim).expand(n_rows, -1, -1, -1) for _ in "kv"]
    for first in range(0, length, 1024):
        cache.append(*(x[:, :, : min(1024, length - first)] for x in span))
    return cache


class Timer:
    """Microseconds of a call, median; L2 is evicted before each."""

    def __init__(self, n_rounds: int) -> None:
        self.n_rounds = n_rounds
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, work: Callable[[], object], prepare: Callable[[], object] = int) -> float:
        seen = []
        for i in range(3 + self.n_rounds):
            prepare()
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # So that the host, which launches many kernels, is ahead of the GPU.
            torch.cuda._sleep(10_000_000)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                seen.append(start.elapsed_time(end) * 1e3)
        return statistics.median(seen)


def check(keep: np.ndarray, n_q_heads: int, n_columns: int) -> float:
    """Return the error of a call on 3000 tokens, of the largest output; exit if it is too large."""
    length, (n_heads, head_dim) = 3000, keep.shape
    cache = LayerCache(keep, n_rows=1, max_tokens=length + n_columns, dtype=DTYPE, **WINDOW)
    k, v = (draw(1, n_heads, length + n_columns, head_dim) for _ in "kv")
    q = draw(1, n_q_heads, n_columns, head_dim)
    cache.append(k[:, :, :length], v[:, :, :length])
    out = decode(cache, q, k[:, :, length:], v[:, :, length:])
    error = 0.0
    for t in np.unique(np.linspace(0, n_columns - 1, 9).astype(int)):
        end = length + t + 1
        truth = attend64(q[0, :, t], k[0, :, :end], v[0, :, :end], keep, **WINDOW)
        error = np.maximum(error, relative_error(out[0, :, t], truth))  # NaN stays
    # Written so that NaN fails.
    if not error <= error_bound(DTYPE):
        sys.exit(f"T {n_columns}, D {head_dim}: error {error:.1e}, above {error_bound(DTYPE):.1e}")
    return float(error)


def call(cache: LayerCache, n_q_heads: int, n_columns: int, time: Timer) -> float:
    """Microseconds of a call of so many columns, which are stored too."""
    q = draw(cache.n_rows, n_q_heads, n_columns, cache.head_dim)
    k, v = (draw(cache.n_rows, cache.n_heads, n_columns, cache.head_dim) for _ in "kv")
    state, length = cache._state.clone(), cache.n_columns

    def rewind() -> None:
        # Not by a crop, which leaves less of the window. Twins hold later tokens then.
        cache._state.copy_(state)
        cache._columns = length

    us = time(lambda: decode(cache, q, k, v), rewind)
    rewind()
    return us


def dense(n_heads: int, head_dim: int, length: int, n_columns: int, time: Timer) -> list[float]:
    """Microseconds of cuDNN's attention with the last columns of K and V: with a mask, without."""
    q = draw(1, n_heads * R, n_columns, head_dim)
    k, v = (draw(1, n_heads, length + n_columns, head_dim) for _ in "kv")
    causal = torch.ones(n_columns, length + n_columns, dtype=torch.bool, device="cuda").tril(length)

    def work(mask: torch.Tensor | None) -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return [time(lambda mask=mask: work(mask)) for mask in (causal, None)]


def drafts(keeps: list[np.ndarray], time: Timer) -> None:
    """Print the time of T 2 to 64 against T 1."""
    sizes, us = (1, 2, 8, 16, 64), []
    for keep in keeps:
        cache = filled(keep, 8, 32768, 64)
        us.append([call(cache, len(keep) * R, n, time) for n in sizes])
        del cache
    means = np.mean(us, 0)
    for n, mean in zip(sizes, means, strict=True):
        print(f"drafts: T {n:2}: {mean:8.1f} us, {mean / means[0]:.2f} times T 1")
    print(f"drafts: T 8 takes {means[2] / means[0]:.2f} times T 1; bar: 1.50")


def turn(keeps: list[np.ndarray], time: Timer) -> None:
    """Print the time of T 2048 against cuDNN's."""
    length, n_columns = 30_000, 2048
    us = []
    for keep in keeps:
        cache = filled(keep, 1, length, n_columns)
        us.append(call(cache, len(keep) * R, n_columns, time))
        del cache
    masked, unmasked = dense(*keeps[0].shape, length, n_columns, time)
    mean = float(np.mean(us))
    print(f"turn: cuDNN: {masked:.1f} us with a mask, {unmasked:.1f} us without")
    print(f"turn: T 2048: {mean:.1f} us, {mean / min(masked, unmasked):.2f} times; bar: 2.00")


def wide(time: Timer) -> None:
    """Print the bandwidth of decode at D 256."""
    length = 32768
    keep = np.arange(256)[None] < 80
    cache = filled(keep, 32, length - 1, 1)
    us = call(cache, 8, 1, time)
    needed = needed_bytes(keep, 32, length, **WINDOW)
    pages = cache.slab.view(torch.float32)
    sum_us = time(lambda: torch.sum(pages, 0))
    rate, peak = needed / us / 1e6, cache.slab.numel() / sum_us / 1e6
    print(
        f"wide: D 256: {us:.1f} us, {rate:.2f} TB/s of {peak:.2f} that a sum reaches: "
        f"{rate / peak:.0%}; bar: 85%"
    )


def main() -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("drafts", "turn", "wide"))
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(0, 32, 4)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_span: needs an NVIDIA GPU")
    print(", ".join(f"{name} {x}" for name, x in facts("cuda", args.seed).items()))
    torch.manual_seed(args.seed)
    all_keeps, time = load_profiles()["llama-3.1-8b"].keep(args.seed), Timer(args.rounds)
    keeps = [all_keeps[i] for i in args.layers]
    shapes = [(keeps[0], n) for n in (1, 8, 64, 200, 2500)] + [(np.arange(256)[None] < 80, 1)]
    for keep, n_columns in shapes:
        n_q_heads = 8 if keep.shape[1] == 256 else len(keep) * R
        error = check(keep, n_q_heads, n_columns)
        print(f"checked: T {n_columns}, D {keep.shape[1]}: error {error:.1e}")
    if args.only in (None, "drafts"):
        drafts(keeps, time)
    if args.only in (None, "turn"):
        turn(keeps, time)
    if args.only in (None, "wide"):
        wide(time)


if __name__ == "__main__":
    main()
