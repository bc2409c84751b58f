"""Decode of one token per row from a pruned cache, against dense attention in PyTorch.

    python -m tests.bench.bench_decode [--mask FILE]

Without a file each head keeps as many channels as in the Llama-3.1-8B mask of the reference
implementation, but random ones: bytes and time depend on the widths alone. All layers of the mask
are measured and averaged; B is 1. Each contender walks over buffers of at least four times the
last-level cache, so that everything comes from memory. "decode" attends, "append" stores the step's
K and V; "gain" compares the dense peers with the sum of the two.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import leank
from leank import _C
from leank._arrays import as_tensor
from leank.bench.profiles import needed_bytes
from tests import compare
from tests.bench import lib

SLACK = 64


class Pruned:
    """Filled caches of all layers of a mask, `n_sets` times, and one step's q, k, v."""

    def __init__(self, keep: np.ndarray, args: argparse.Namespace, dtype: str, length: int) -> None:
        rng = np.random.default_rng(args.seed)
        n_heads, dim = keep.shape[1:]
        self.dtype, self.length, self.args = dtype, length, args
        k = lib.random_array(rng, (1, n_heads, length, dim), dtype)
        v = lib.random_array(rng, (1, n_heads, length, dim), dtype)
        self.q = lib.random_array(rng, (1, args.q_heads, 1, dim), dtype)
        self.new = [lib.random_array(rng, (1, n_heads, 1, dim), dtype) for _ in "kv"]
        self.out = np.empty_like(self.q)
        self.keep = keep
        at = {"sink": args.sink, "recent": args.recent, "elem_bytes": self.q.itemsize}
        self.bytes_per_decode = [needed_bytes(layer, 1, length, **at) for layer in keep]
        live = sum(
            _C.predict_memory(layer, np.array([length]), dtype=dtype, **self.window)["total_bytes"]
            for layer in keep
        )
        n_sets = max(1, math.ceil(args.rotate_bytes / live))
        self.caches = []
        for layer in list(keep) * n_sets:
            cache = leank.LayerCache(layer, n_rows=1, dtype=dtype, **self.window)
            # The query is that of the last token, which must not be one of the prompt.
            cache.append(k[:, :, :-1], v[:, :, :-1])
            cache.append(k[:, :, -1:], v[:, :, -1:])
            self.caches.append(cache)
        self.k, self.v = k, v

    @property
    def window(self) -> dict[str, int]:
        return {"sink": self.args.sink, "recent": self.args.recent, "slack": SLACK}

    @property
    def options(self) -> dict[str, float]:
        return {"n_threads": self.args.threads, "softcap": self.args.softcap}

    def check(self) -> float:
        """Raise if a decode is outside the error budget; return the largest error.

        The layers checked have a head of each width that the mask has.
        """
        kept, seen, worst = self.keep.sum(2), set(), 0.0
        for i, layer in enumerate(self.keep):
            if set(kept[i]) <= seen:
                continue
            seen |= set(kept[i])
            out = leank.decode(self.caches[i], self.q, **self.options)
            truth, plain = compare.truth_and_plain(
                self.q[0],
                self.k[0],
                self.v[0],
                [self.length - 1],
                layer,
                self.dtype,
                sink=self.args.sink,
                recent=self.args.recent,
                lo=self.args.sink,
                n0=0,
                scale=1 / math.sqrt(layer.shape[1]),
                softcap=self.args.softcap,
            )
            got = compare.decode(out[0], self.dtype)
            compare.assert_within_budget(got, truth, plain, self.dtype, f"layer {i}")
            worst = max(worst, float(np.abs(got - truth).max()))
        self._start_a_page_early()
        return worst

    def _start_a_page_early(self) -> None:
        """Add a token, so that appending does not allocate a page and a twin in each round."""
        for cache in self.caches:
            cache.append(*self.new)

    def _walk(self, i: int, step) -> float:
        """Seconds per call of `step` over the i-th set of layers."""
        n_layers = len(self.keep)
        at = i * n_layers % len(self.caches)
        total = 0.0
        for cache in self.caches[at : at + n_layers]:
            start = time.perf_counter()
            step(cache)
            total += time.perf_counter() - start
        return total / n_layers

    def decode(self, i: int) -> float:
        """Attend to what is stored."""
        options = self.options
        return self._walk(i, lambda cache: leank.decode(cache, self.q, out=self.out, **options))

    def append(self, i: int) -> float:
        """Store one token; the caches grow by one in each round."""
        return self._walk(i, lambda cache: cache.append(*self.new))

    def append_to_new_page(self, i: int) -> float:
        """Store a token that starts a page, as one in 64 does."""
        at = i * len(self.keep) % len(self.caches)
        full = self.length // _C.PAGE_TOKENS * _C.PAGE_TOKENS
        for cache in self.caches[at : at + len(self.keep)]:
            cache.crop(full)
        return self._walk(i, lambda cache: cache.append(*self.new))


class Dense:
    """Dense K and V of one layer, several times, for PyTorch's attention."""

    def __init__(self, pruned: Pruned, args: argparse.Namespace) -> None:
        n_sets = max(2, math.ceil(args.rotate_bytes / (pruned.k.nbytes + pruned.v.nbytes)))
        self.pairs = [
            tuple(as_tensor(x.copy()) for x in (pruned.k, pruned.v)) for _ in range(n_sets)
        ]
        self.q = as_tensor(pruned.q)
        n_heads = pruned.k.shape[1]
        self.folded = self.q.reshape(1, n_heads, args.q_heads // n_heads, -1)
        self.n_calls = min(4, n_sets)

    def _walk(self, i: int, call) -> int:
        for j in range(self.n_calls):
            call(*self.pairs[(i * self.n_calls + j) % len(self.pairs)])
        return self.n_calls

    def gqa(self, i: int) -> int:
        """As a model calls it."""
        return self._walk(i, lambda k, v: sdpa(self.q, k, v, enable_gqa=True))

    def folded_rows(self, i: int) -> int:
        """Query heads of a KV head as rows of one query: the fastest arrangement known to us."""
        return self._walk(i, lambda k, v: sdpa(self.folded, k, v))


def measure(keep: np.ndarray, args: argparse.Namespace, dtype: str, length: int) -> dict:
    """Check, then time one shape; return its line of the table."""
    pruned = Pruned(keep, args, dtype, length)
    error = pruned.check()
    dense = Dense(pruned, args)
    bandwidth = lib.ReadBandwidth(args.rotate_bytes)
    contenders = {
        "decode": pruned.decode,
        "append": pruned.append,
        "append, new page": pruned.append_to_new_page,
        "sdpa enable_gqa": dense.gqa,
        "sdpa folded": dense.folded_rows,
        **bandwidth.contenders(),
    }
    times = lib.alternate(contenders, args.rounds)
    read = 1 / min(times[name].median for name in bandwidth.contenders())
    needed = float(np.mean(pruned.bytes_per_decode))
    n = _C.PAGE_TOKENS
    append = ((n - 1) * times["append"].median + times["append, new page"].median) / n
    step = times["decode"].median + append
    dense_bytes = pruned.k.nbytes + pruned.v.nbytes
    return {
        "dtype": dtype,
        "L": length,
        "times": times,
        "bytes": needed,
        "byte_ratio": dense_bytes / needed,
        "read_gb_s": read / 1e9,
        "decode_gb_s": needed / times["decode"].median / 1e9,
        "bandwidth_share": needed / times["decode"].median / read,
        "bound_us": needed / read * 1e6,
        "gain_gqa": times["sdpa enable_gqa"].median / step,
        "gain_folded": times["sdpa folded"].median / step,
        "append_share": append / times["decode"].median,
        "error": error,
    }


def report(line: dict) -> None:
    """Print one shape."""
    print(f"\n{line['dtype']}  L {line['L']}   byte ratio {line['byte_ratio']:.2f}")
    for name in ("decode", "append", "append, new page", "sdpa enable_gqa", "sdpa folded"):
        print(f"  {name:16s} {line['times'][name]}")
    print(
        f"  {line['bytes'] / 1e6:.1f} MB per decode, {line['decode_gb_s']:.2f} GB/s"
        f" = {line['bandwidth_share']:.0%} of the {line['read_gb_s']:.2f} GB/s that reading reaches"
        f" (bound {line['bound_us']:.0f} us)"
    )
    print(
        f"  gain over sdpa enable_gqa {line['gain_gqa']:.2f}x, folded {line['gain_folded']:.2f}x;"
        f" append {line['append_share']:.2%} of decode; largest error {line['error']:.1e}"
    )


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mask", type=Path, help=".pth or .safetensors mask file")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--layers", type=int, help="only the first LAYERS layers of the mask")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--recent", type=int, default=896)
    parser.add_argument("--softcap", type=float, default=0.0, help="of decode; the peers have none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.rotate_bytes = 4 * lib.last_level_cache_bytes()
    keep = lib.load_keep(args.mask, args.seed)[: args.layers]
    machine = lib.machine(args.threads, args.seed)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    name = args.mask.name if args.mask else "of Llama-3.1-8B widths"
    print(
        f"mask {name}: {len(keep)} layers, mean over them; Hq/Hkv {args.q_heads}/{keep.shape[1]},"
        f" D {keep.shape[2]}, B 1, sink {args.sink}, recent {args.recent};"
        f" medians of {args.rounds} rounds, buffers rotate over {args.rotate_bytes >> 20} MiB"
    )
    lines = []
    with torch.inference_mode():
        for dtype in args.dtypes:
            for length in args.lengths:
                lines.append(measure(keep, args, dtype, length))
                report(lines[-1])
    if args.json:
        plain = [{**x, "times": {n: vars(t) for n, t in x["times"].items()}} for x in lines]
        args.json.write_text(json.dumps({"machine": machine, "lines": plain}, indent=1) + "\n")


if __name__ == "__main__":
    main()
