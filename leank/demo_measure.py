"""The measurements of ``leank demo``: two caches of one model, fed the same tokens step by step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from leank._patch import Patch

TIMED_STEPS = 32
"""Decode steps that are timed at least: after a shorter answer both caches are fed on."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the two caches did; bytes are those of the live buffers when both held `n_tokens`."""

    dense_answer: str
    pruned_answer: str
    n_tokens: int
    dense_bytes: dict[str, int]
    pruned_bytes: dict[str, int]
    predicted_bytes: dict[str, int]
    allocated_bytes: int  # what the pruned cache took from the allocator to hold its bytes
    dense_ms: float
    pruned_ms: float
    n_timed: int
    logit_difference: float
    logit_range: float
    n_compared: int
    n_same_token: int


class Bars:
    """Progress bars, one below the other."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(36), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)

    def __enter__(self) -> Bars:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop drawing; the bars stay."""
        self._progress.stop()

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Draw one more bar while the block runs; it yields a function that advances it."""
        task = self._progress.add_task(name, total=total)
        yield lambda: self._progress.advance(task)
        # An answer may end early: what there was to do is done.
        self._progress.update(task, total=total, completed=total)
        self._progress.stop_task(task)


def measure(
    patched: Patch,
    tokenizer: Any,
    head: torch.Tensor,
    tail: torch.Tensor,
    max_new_tokens: int,
    bars: Bars,
) -> Measured:
    """Read `head` [1, T] into both caches, ask `tail` [1, T], and compare.

    With a DynamicCache a patched model computes what it did before, so both caches can take turns.
    """
    model, mask = patched.model, patched.mask
    ends = _end_tokens(model, tokenizer)
    dense = transformers.DynamicCache(config=model.config)
    pruned = patched.make_cache()
    for name, cache in (("Dense: reading", dense), ("Pruned: reading", pruned)):
        with bars.bar(name, mask.n_layers) as step, _after_each_layer(model, step):
            model(head, past_key_values=cache, logits_to_keep=1)
    with bars.bar("Pruned: answering", max_new_tokens) as step:
        # A copy shares what was read, so the answer costs no second reading.
        pruned_answer = _answer(model, tail, copy.deepcopy(pruned), max_new_tokens, ends, step)

    # From here on both are fed the dense model's tokens. They take turns in going first, since the
    # second finds the processor's caches in another state.
    dense_answer: list[int] = []
    times: tuple[list[float], list[float]] = ([], [])
    differences, ranges, same = [], [], []
    tokens, answering = tail, True
    with bars.bar("Both, step by step", max(max_new_tokens, TIMED_STEPS + 1)) as advance:
        for i in range(max(max_new_tokens, TIMED_STEPS + 1)):
            logits: dict[int, torch.Tensor] = {}
            for which in (0, 1) if i % 2 else (1, 0):
                logits[which], seconds = _forward(model, tokens, (dense, pruned)[which])
                if i:  # the first step is the question, several tokens at once
                    times[which].append(seconds)
            best = int(logits[0].argmax())
            if answering:
                differences.append(float((logits[0] - logits[1]).abs().max()))
                ranges.append(float(logits[0].max() - logits[0].min()))
                same.append(best == int(logits[1].argmax()))
                answering = best not in ends and len(differences) < max_new_tokens
                if best not in ends:
                    dense_answer.append(best)
            advance()
            if not answering and len(times[0]) >= TIMED_STEPS:
                break
            tokens = torch.tensor([[best]])
    n_tokens = dense.get_seq_length()
    dtype = str(model.dtype).removeprefix("torch.")
    memory = pruned.memory()
    return Measured(
        dense_answer=_text(tokenizer, dense_answer),
        pruned_answer=_text(tokenizer, pruned_answer),
        n_tokens=n_tokens,
        dense_bytes=_dense_bytes(dense),
        pruned_bytes=_three(memory),
        predicted_bytes=_three(mask.predict_memory([n_tokens], dtype)),
        allocated_bytes=memory["slab_bytes"],
        dense_ms=1e3 * statistics.median(times[0]),
        pruned_ms=1e3 * statistics.median(times[1]),
        n_timed=len(times[0]),
        # max() passes a NaN over, a tensor's max does not
        logit_difference=float(torch.tensor(differences).max()),
        logit_range=max(ranges),
        n_compared=len(differences),
        n_same_token=sum(same),
    )


def _forward(model: Any, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, float]:
    """Return the logits [V] that follow the tokens, and the seconds this took."""
    start = time.perf_counter()
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return logits.float(), time.perf_counter() - start


def _answer(
    model: Any,
    tokens: torch.Tensor,
    cache: Any,
    max_new_tokens: int,
    ends: set[int],
    step: Callable[[], None],
) -> list[int]:
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        logits, _ = _forward(model, tokens, cache)
        best = int(logits.argmax())
        step()
        if best in ends:
            break
        answer.append(best)
        tokens = torch.tensor([[best]])
    return answer


@contextlib.contextmanager
def _after_each_layer(model: Any, step: Callable[[], None]) -> Iterator[None]:
    """Call `step` whenever an attention layer is done."""
    layers = [m for m in model.modules() if hasattr(m, "num_key_value_groups")]
    hooks = [layer.register_forward_hook(lambda *_: step()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    return (ends | {tokenizer.eos_token_id}) - {None}


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _dense_bytes(cache: transformers.DynamicCache) -> dict[str, int]:
    k = sum(layer.keys.nbytes for layer in cache.layers)
    v = sum(layer.values.nbytes for layer in cache.layers)
    return {"k_bytes": k, "v_bytes": v, "total_bytes": k + v}


def _three(memory: Any) -> dict[str, int]:
    return {key: memory[key] for key in ("k_bytes", "v_bytes", "total_bytes")}
