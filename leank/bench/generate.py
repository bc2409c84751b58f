"""``leank bench generate``: decode of generate() with random weights, against dense caches.

Caches are filled with random K and V, since speed does not depend on them and a dense model may
have no room to read such a prompt; then generate() goes on from the prompt's last token. With
--prompt it reads the prompt: that also gives the time to the first token. Steps after the first new
token are timed; the rounds of a contender follow each other, after one that compiles and captures.
Peak memory is that of the timed steps.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from rich.console import Console
from transformers import DynamicCache, LogitsProcessor, StaticCache

import leank
from leank.bench import machine
from leank.bench.clock import read_gb_s
from leank.bench.lines import Case, GenerateLine, Refusal, Result, Table, Timing
from leank.bench.profiles import load_profiles, needed_bytes
from leank.bench.random_models import draw_model
from leank.bench.work import PEERS, GenerateOptions, WrongResultError
from leank.cache_layer import LeanKLayer
from leank.loading import quiet

# What generate() is told beyond the cache.
_TOLD: dict[str, dict[str, Any]] = {"eager": {"disable_compile": True}}
# Norm of the difference of the first logits by that of the logits: how far two ways to compute them
# may be apart. On an H100 the static cache is 0.049 from the dynamic one in bfloat16.
_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@torch.no_grad()
def run(options: GenerateOptions, progress: Console) -> Iterator[Result]:
    """Draw a model and measure; yield the growing result after each case.

    Parameters
    ----------
    options : GenerateOptions
    progress : Console
        Gets a line for each contender.

    Raises
    ------
    BenchError
        If there is no GPU that is asked for.
    WrongResultError
        If a cache that keeps everything has other first logits than a dense one; with a prompt
        that is read, also if one that prunes has.
    """
    say = functools.partial(progress.print, highlight=False, markup=False)
    if options.device == "cuda":
        machine.need_gpu()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with machine.threads(options.threads), quiet():
        peak_gb_s = read_gb_s(options.device, max(5, options.rounds))
        settings = {
            "transformers": transformers.__version__,
            "model": f"random weights, shape {options.shape}",
            "dtype": options.dtype,
            **options.window,
            "rounds": options.rounds,
        }
        facts = machine.facts(options.device, options.seed, **settings)
        result = Result(facts, _how(options, peak_gb_s))
        longest = max(case.length + case.n_new for case in options.cases)
        model = draw_model(options.shape, longest, options.seed, device, dtype)
        masks = _masks(model, options)
        for case in options.cases:
            run_case = _Case(case, model, masks, options, say)
            result.tables.append(run_case.table)
            if (line := run_case.line(peak_gb_s)) is not None:
                run_case.table.lines.append(line)
            yield result


def _how(options: GenerateOptions, peak_gb_s: float) -> str:
    filled = "" if options.prompt else "Caches were filled with random K and V. "
    if options.chunk is not None:
        filled = f"Prompts were read {options.chunk} columns at a time. "
    return (
        f"Steps after the first new token: medians of {options.rounds} rounds, those of a "
        f"contender after each other. {filled}dynamic, static: transformers' caches, as generate() "
        "runs them by itself (on a GPU static is compiled). pages: LeanK with a mask that keeps "
        "everything; eager: LeanK without CUDA graphs. Bytes of a step: weights but the embedding, "
        f"and the K and V that are read. Peak: torch.sum, {peak_gb_s:,.0f} GB/s."
    )


def _masks(
    model: transformers.PreTrainedModel, options: GenerateOptions
) -> dict[str, leank.ChannelMask]:
    """Return the masks of our contenders."""
    keep = keep_for(model.config, options.seed)
    pruned = leank.ChannelMask(keep, **options.window)
    all_kept = leank.ChannelMask(np.ones_like(keep), **options.window)
    return {"leank": pruned, "eager": pruned, "pages": all_kept}


def keep_for(config: transformers.PretrainedConfig, seed: int) -> npt.NDArray[np.bool_]:
    """Return the widths of the Llama-3.1-8B mask, or as many of a smaller model."""
    n_layers, head_dim = config.num_hidden_layers, config.head_dim
    keep = load_profiles()["llama-3.1-8b"].keep(seed)[:n_layers, :, :head_dim].copy()
    if head_dim != 128:
        counts = keep.sum(-1, keepdims=True) // 8 * 8
        keep = np.arange(head_dim) < counts
    return keep


class _Measured(NamedTuple):
    """What the rounds of a contender gave."""

    us: Timing  # of a step
    first_s: float
    peak_memory: int | None
    cache_bytes: int | None


class _Case:
    """One case: its contenders in order, the check, and the line."""

    def __init__(
        self,
        case: Case,
        model: transformers.PreTrainedModel,
        masks: dict[str, leank.ChannelMask],
        options: GenerateOptions,
        say: Any,
    ) -> None:
        self._case, self._model, self._masks, self._options = case, model, masks, options
        self._weight_bytes = sum(x.nbytes for x in model.parameters())
        config, n_tokens = model.config, case.n_rows * (case.length + case.n_new - 1)
        elements = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self._dense_bytes = 2 * n_tokens * elements * model.dtype.itemsize
        about = f"weights {self._weight_bytes / 2**30:.2f} GiB, dense KV "
        about += f"{self._dense_bytes / 2**30:.2f} GiB"
        self.table = Table(str(case), about, _BOUNDS[options.dtype], "of the first logits, by norm")
        self._say = say

    def line(self, peak_gb_s: float) -> GenerateLine | None:
        """Measure the contenders; None where LeanK has no room."""
        found: dict[str, _Measured] = {}
        dense_logits = None
        for name in self._options.contenders:
            clear(self._model)
            try:
                found[name], logits = self._measure(name)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                self.table.refusals.append(Refusal(name, self._case, reason))
                self._say(f"{self._case} {name}: {reason}")
                continue
            # A prompt attends densely whatever the mask keeps.
            alike = self._options.prompt or name in (*PEERS, "pages")
            if dense_logits is not None and alike:
                self._check(name, logits, dense_logits)
            if dense_logits is None and name in PEERS:
                dense_logits = logits
            us = found[name].us
            self._say(f"{self._case} {name}: {us.median / 1e3:,.2f} ms a step")
        if "leank" not in found:
            return None
        read = {name: self._read_bytes(name) for name in ("dynamic", *self._masks)}
        own = [name for name in ("pages", "eager") if name in found]
        peaks = {name: x.peak_memory for name, x in found.items() if x.peak_memory is not None}
        sizes = {name: x.cache_bytes or self._dense_bytes for name, x in found.items()}
        first = {name: x.first_s for name, x in found.items() if self._options.prompt}
        return GenerateLine(
            shape=self._case,
            us=found["leank"].us,
            needed_bytes=read["leank"],
            dense_us={name: found[name].us for name in PEERS if name in found},
            dense_bytes=read["dynamic"],
            peak_gb_s=peak_gb_s,
            own_us={name: found[name].us for name in own},
            own_bytes={name: read[name] for name in own},
            weight_bytes=self._weight_bytes,
            dense_cache_bytes=self._dense_bytes,
            cache_bytes=sizes,
            peak_memory=peaks,
            first_s=first,
        )

    def _check(self, name: str, logits: torch.Tensor, dense: torch.Tensor) -> None:
        error = ((logits - dense).norm() / dense.norm()).item()
        # Written so that NaN fails.
        if not error <= self.table.bound:
            raise WrongResultError(
                f"{self._case} {name}: expected first logits at most {self.table.bound:.1e} of "
                f"their norm off dense ones, got {error:.1e}"
            )
        self.table.checked(error)

    def _read_bytes(self, name: str) -> float:
        """Return what a step reads in the mean: weights, and K and V."""
        config, case = self._model.config, self._case
        embedding = self._model.get_input_embeddings().weight.nbytes
        masks = self._masks.get(name)
        shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        keep = np.ones(shape, np.bool_) if masks is None else masks.keep
        at = {**self._options.window, "elem_bytes": self._model.dtype.itemsize}
        # In the middle of the steps that are timed.
        length = case.length + case.n_new // 2
        kv = sum(needed_bytes(layer, case.n_rows, length, **at) for layer in keep)
        return self._weight_bytes - embedding + kv

    def _measure(self, name: str) -> tuple[_Measured, torch.Tensor]:
        """Return what the rounds gave, and the first logits."""
        patch = leank.patch(self._model, self._masks[name]) if name in self._masks else None
        try:
            contender = _Contender(name, self._model, self._case, self._options)
            contender.run()
            runs = [contender.run() for _ in range(self._options.rounds)]
        finally:
            if patch is not None:
                leank.unpatch(self._model)
        peaks = [x.peak_memory for x in runs if x.peak_memory is not None]
        measured = _Measured(
            us=Timing.of([x.us.median for x in runs]),
            first_s=statistics.median(x.first_s for x in runs),
            peak_memory=max(peaks, default=None),
            cache_bytes=runs[-1].cache_bytes,
        )
        return measured, contender.logits.cpu()


class _Mark(LogitsProcessor):
    """Notes when the first logits are there, and starts to measure memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.logits, self.at = device, None, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note it once; scores stay."""
        if self.logits is None:
            self.logits = scores.clone()
            _wait(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.at = time.perf_counter()
        return scores


class _Contender:
    """One way to decode a case."""

    def __init__(
        self, name: str, model: transformers.PreTrainedModel, case: Case, options: GenerateOptions
    ) -> None:
        self._name, self._model, self._case, self._prompt = name, model, case, options.prompt
        self._told = dict(_TOLD.get(name, {}))
        if options.chunk is not None:
            self._told["prefill_chunk_size"] = options.chunk
        self._device = model.device
        self._cache = None
        self.logits = None
        generator = torch.Generator().manual_seed(2)
        most = min(100_000, model.config.vocab_size)
        ids = torch.randint(3, most, (case.n_rows, case.length), generator=generator)
        self._ids = ids.to(self._device)

    def _ready(self) -> transformers.Cache:
        """Return the cache: a reset one, so that graphs find it where it was."""
        room = self._case.length + self._case.n_new - 1
        if self._name == "dynamic":
            self._cache = None  # first, so that there is room
            self._cache = DynamicCache(config=self._model.config)
        elif self._cache is not None:
            self._cache.reset()
        elif self._name == "static":
            self._cache = StaticCache(config=self._model.config, max_cache_len=room)
        else:
            self._cache = leank.make_cache(self._model, max_cache_len=room)
        if not self._prompt:
            fill(self._cache, self._model, self._case.n_rows, self._case.length - 1)
        return self._cache

    def run(self) -> _Measured:
        """Generate once."""
        cache, mark, case = self._ready(), _Mark(self._device), self._case
        _wait(self._device)
        start = time.perf_counter()
        out = self._model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            past_key_values=cache,
            max_new_tokens=case.n_new,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[mark],
            **self._told,
        )
        _wait(self._device)
        us = (time.perf_counter() - mark.at) / (case.n_new - 1) * 1e6
        if out.shape != (case.n_rows, case.length + case.n_new):
            raise WrongResultError(f"{case} {self._name}: generated {tuple(out.shape)}")
        self.logits = mark.logits
        on_gpu = self._device.type == "cuda"
        return _Measured(
            us=Timing.of([us]),
            first_s=mark.at - start,
            peak_memory=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            cache_bytes=None if self._name in PEERS else cache.memory()["total_bytes"],
        )


def fill(
    cache: transformers.Cache, model: transformers.PreTrainedModel, n_rows: int, length: int
) -> None:
    """Store random K and V of so many columns; rows are the same, and so are spans of 1024."""
    if length == 0:
        return
    config, generator = model.config, torch.Generator(model.device).manual_seed(1)
    shape = (1, config.num_key_value_heads, min(length, 1024), config.head_dim)
    like = {"device": model.device, "dtype": model.dtype}
    repeats = -(-length // shape[2])
    for i, layer in enumerate(cache.layers):
        k, v = (
            torch.randn(shape, generator=generator, **like)
            .repeat(1, 1, repeats, 1)[:, :, :length]
            .expand(n_rows, -1, -1, -1)
            for _ in "kv"
        )
        if isinstance(layer, LeanKLayer):
            layer.open(k, v)
            layer.append(k, v, None)
        else:
            cache.update(k, v, i)


def clear(model: transformers.PreTrainedModel) -> None:
    """Free what a contender left: graphs, and the compiled forward that generate() keeps."""
    for name in ("_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
    gc.collect()
    if model.device.type == "cuda":  # generate() compiles nothing on a CPU
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
