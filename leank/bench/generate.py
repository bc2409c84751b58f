"""Decode of generate() on a GPU: an 8B-shaped model with random weights, against dense caches.

python -m leank.bench.generate
python -m leank.bench.generate --cases 16x32768x128 --rounds 5
python -m leank.bench.generate --cases 1x4096x256 --prompt

A case is rows x prompt x new tokens. Caches are filled with random K and V, since speed does not
depend on them and a dense model may have no room to read such a prompt; then generate() goes on
from the prompt's last token. With --prompt it reads the prompt: that also gives the time to the
first token. Steps after the first new token are timed; the rounds of a contender follow each other,
after one that compiles and captures. Peak memory is that of the timed steps.

static: transformers' static cache, compiled as generate() does it by itself. pages: LeanK with a
mask that keeps everything. eager: LeanK without graphs. --shape tiny tries the script, also on a
CPU, where memory is not measured.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DynamicCache, LogitsProcessor, StaticCache

import leank
from leank.cache_layer import LeanKLayer
from tests.bench import lib
from tests.bench.bench_learn_scale import SHAPES

CASES = ("16x32768x128", "52x4096x128", "1x4096x256", "1x32768x256")
PEERS, OURS = ("dynamic", "static"), ("eager", "pages", "leank")
# Eager ones first: a compiler that was loaded makes Python slower.
ORDER = ("dynamic", "eager", "static", "pages", "leank")
# What generate() is told beyond the cache.
OPTIONS = {
    "dynamic": {},
    "static": {},
    "pages": {},
    "leank": {},
    "eager": {"disable_compile": True},
}
# Norm of the difference of the first logits by that of the logits: how far two ways to compute them
# in bfloat16 may be apart. On an H100 the static cache is 0.049 from the dynamic one.
BOUND = 0.1


class Mark(LogitsProcessor):
    """Notes when the first logits are there, and starts to measure memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.logits, self.at = device, None, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note it once; scores stay."""
        if self.logits is None:
            self.logits = scores.clone()
            wait(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.at = time.perf_counter()
        return scores


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_model(shape: str, length: int, seed: int, device: torch.device):
    """Draw the weights where they are used."""
    sizes = SHAPES[shape] | ({"head_dim": 64} if shape == "tiny" else {})
    config = transformers.LlamaConfig(
        max_position_embeddings=length,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    torch.manual_seed(seed)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def keep_for(model, seed: int) -> np.ndarray:
    """Return the widths of the Llama-3.1-8B mask, or as many of a smaller model."""
    config = model.config
    keep = lib.load_keep(None, seed)[: config.num_hidden_layers, :, : config.head_dim].copy()
    if config.head_dim != 128:
        counts = keep.sum(-1, keepdims=True) // 8 * 8
        keep = np.arange(config.head_dim) < counts
    return keep


def fill(cache, model, n_rows: int, length: int, device: torch.device) -> None:
    """Store random K and V of so many columns; rows are the same, and so are spans of 1024."""
    config, generator = model.config, torch.Generator(device).manual_seed(1)
    shape = (1, config.num_key_value_heads, min(length, 1024), config.head_dim)
    repeats = -(-length // shape[2])
    for i, layer in enumerate(cache.layers):
        k, v = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            .repeat(1, 1, repeats, 1)[:, :, :length]
            .expand(n_rows, -1, -1, -1)
            for _ in "kv"
        )
        if isinstance(layer, LeanKLayer):
            layer.open(k, v)
            layer.append(k, v, None)
        else:
            cache.update(k, v, i)


class Contender:
    """One way to decode a case."""

    def __init__(self, name: str, model, case: tuple[int, int, int], prompt: bool) -> None:
        self.name, self.model, self.prompt = name, model, prompt
        self.n_rows, self.length, self.n_new = case
        self.device = model.device
        self.cache = None
        generator = torch.Generator().manual_seed(2)
        shape = (self.n_rows, self.length)
        self.ids = torch.randint(3, 100_000, shape, generator=generator).to(self.device)

    def _ready(self):
        """Return the cache: a reset one, so that graphs find it where it was."""
        room = self.length + self.n_new - 1
        if self.name == "dynamic":
            self.cache = None  # first, so that there is room
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is not None:
            self.cache.reset()
        elif self.name == "static":
            self.cache = StaticCache(config=self.model.config, max_cache_len=room)
        else:
            self.cache = leank.make_cache(self.model, max_cache_len=room)
        if not self.prompt:
            fill(self.cache, self.model, self.n_rows, self.length - 1, self.device)
        return self.cache

    def run(self) -> dict[str, float]:
        """Generate once."""
        cache, mark = self._ready(), Mark(self.device)
        wait(self.device)
        start = time.perf_counter()
        out = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=cache,
            max_new_tokens=self.n_new,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[mark],
            **OPTIONS[self.name],
        )
        wait(self.device)
        seconds = time.perf_counter() - mark.at
        assert out.shape == (self.n_rows, self.length + self.n_new), out.shape
        self.logits = mark.logits
        result = {"ms": seconds / (self.n_new - 1) * 1e3, "first_s": mark.at - start}
        if self.device.type == "cuda":
            result["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.name in OURS:
            result["kv_gib"] = cache.memory()["total_bytes"] / 2**30
        return result


def measure(name: str, model, case, args, masks) -> tuple[dict, torch.Tensor] | str:
    """Return medians and the first logits of a contender, or why there are none."""
    patch = leank.patch(model, masks[name]) if name in OURS else None
    try:
        contender = Contender(name, model, case, args.prompt)
        contender.run()
        runs = [contender.run() for _ in range(args.rounds)]
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    finally:
        if patch is not None:
            leank.unpatch(model)
    result = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    times = [run["ms"] for run in runs]
    return result | {"low": min(times), "high": max(times)}, contender.logits.cpu()


def clear(model) -> None:
    """Free what a contender left: graphs, and the compiled forward that generate() keeps."""
    for name in ("_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check(name: str, logits: torch.Tensor, dense: torch.Tensor) -> None:
    """Compare the first logits of a cache that keeps everything with those of a dense one."""
    error = ((logits - dense).norm() / dense.norm()).item()
    # Written so that NaN fails.
    if not error <= BOUND:
        raise SystemExit(
            f"{name}: WRONG RESULT: the first logits are off by {error:.1e} of their norm"
        )


def describe(result: dict, n_rows: int) -> str:
    """Return one line of numbers."""
    text = f"{result['ms']:8.2f} ms a step ({result['low']:.2f} to {result['high']:.2f}), "
    text += f"{n_rows / result['ms'] * 1e3:8.1f} tokens/s, first token {result['first_s']:.2f} s"
    for key, what in (("peak_gib", "peak"), ("kv_gib", "KV")):
        text += f", {what} {result[key]:.2f} GiB" if key in result else ""
    return text


def run_case(text: str, model, args, masks) -> dict:
    """Measure and print the contenders of one case."""
    case = tuple(int(x) for x in text.split("x"))
    config, weights = model.config, sum(x.nbytes for x in model.parameters()) / 2**30
    elements = case[0] * (case[1] + case[2] - 1) * config.num_key_value_heads * config.head_dim
    dense = 4 * config.num_hidden_layers * elements / 2**30
    print(f"\n{text}: weights {weights:.2f} GiB, dense KV {dense:.2f} GiB", flush=True)
    results, logits = {}, {}
    for name in args.contenders:
        clear(model)
        measured = measure(name, model, case, args, masks)
        if isinstance(measured, str):
            results[name] = {"refused": measured}
            print(f"{name:8} {measured}", flush=True)
            continue
        results[name], logits[name] = measured
        print(f"{name:8} {describe(results[name], case[0])}", flush=True)
    for name in ("static", "pages"):
        if {"dynamic", name} <= logits.keys():
            check(name, logits[name], logits["dynamic"])
    times = {name: result["ms"] for name, result in results.items() if "ms" in result}
    peers = {name: times[name] for name in PEERS if name in times}
    if "leank" in times:
        if peers:
            best = min(peers, key=peers.get)
            print(f"leank against {best}: {peers[best] / times['leank']:.2f}x")
        if "pages" in times:
            print(f"leank against pages: {times['pages'] / times['leank']:.2f}x")
        result = results["leank"]
        print(f"KV of dense: {result['kv_gib'] / dense:.3f}", end="")
        if "peak_gib" in result:
            most = 1.02 * (weights + result["kv_gib"]) + 1
            print(f", peak {result['peak_gib']:.2f} of at most {most:.2f} GiB", end="")
        print()
    if {"eager", "dynamic"} <= times.keys():
        print(f"eager against dynamic: {times['dynamic'] / times['eager']:.2f}x", flush=True)
    return {"case": text, "weights_gib": weights, "dense_kv_gib": dense, "results": results}


@torch.no_grad()
def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="BxLxN")
    parser.add_argument("--contenders", nargs="+", default=ORDER, choices=ORDER)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", action="store_true", help="read the prompt, do not fill caches")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--recent", type=int, default=896)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to it")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine = lib.machine(torch.get_num_threads(), args.seed)
    machine |= lib.gpu() if device.type == "cuda" else {}
    machine |= {"transformers": transformers.__version__}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    longest = max(sum(int(x) for x in case.split("x")[1:]) for case in args.cases)
    model = draw_model(args.shape, longest, args.seed, device)
    window = {"sink": args.sink, "recent": args.recent}
    keep = keep_for(model, args.seed)
    pruned = leank.ChannelMask(keep, **window)
    masks = {"leank": pruned, "eager": pruned}
    masks["pages"] = leank.ChannelMask(np.ones_like(keep), **window)
    tables = []
    for case in args.cases:
        tables.append(run_case(case, model, args, masks))
        if args.json is not None:
            args.json.write_text(json.dumps({"machine": machine, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()
