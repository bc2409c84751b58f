"""Asking a model one item: by its real generate(), or teacher-forced for all masks at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache

import leank
from leank.cache import patch_of
from leank.evaluation import ruler
from leank.evaluation.items import Item
from leank.evaluation.methods import Method, cache_bytes
from leank.learning import tasks
from leank.learning.evaluate import measure
from leank.learning.span import SpanModel
from leank.learning.tasks import CONTINUATION
from leank.masks import ChannelMask
from leank.models import DTYPES


@dataclass(frozen=True)
class Answer:
    """What one method gave on one item.

    Attributes
    ----------
    score : float, optional
        0 to 1; None for plain text.
    kl, nll : float, optional
        Means over answer tokens, in nats, of KL(dense || this) and of the negative log-likelihood;
        None for what was generated.
    share : float
        Bytes of its cache behind the prompt, as a share of those of a dense one.
    said : str, optional
        What was generated.
    """

    score: float | None = None
    kl: float | None = None
    nll: float | None = None
    share: float = 1.0
    said: str | None = None


# ------------------------------------------------------------------------------- generate()


class Reply(NamedTuple):
    """What generate() said, its score from 0 to 1, and the cache behind it."""

    said: str
    score: float
    cache: Cache


@torch.no_grad()
def reply_to(model: nn.Module, tokenizer: Any, item: Item, **options: Any) -> Reply:
    """Generate the answer to an item, greedily, by a model that may be patched.

    Parameters
    ----------
    model : nn.Module
    tokenizer : transformers tokenizer
    item : Item
        Not plain text, which has no answer.
    **options
        More for ``generate``, such as ``past_key_values``.
    """
    ids = torch.from_numpy(item.prompt)[None].to(model.device)
    pad = tokenizer.pad_token_id
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=item.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        return_dict_in_generate=True,
        **options,
    )
    said = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    score = tasks.score if item.task in tasks.KINDS else ruler.score
    return Reply(said, score(item.task, said, item.sample.expected), out.past_key_values)


class Generating:
    """Each method by itself, by generate() of the patched model.

    Parameters
    ----------
    model : nn.Module
        Not patched.
    tokenizer : transformers tokenizer
    methods : sequence of Method
        The first is dense; at least one has a mask.
    prefill : {"dense", "pruned"}
        As in `leank.patch`.
    chunk : int
        Tokens of each call that reads a prompt, with ``prefill="pruned"``.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, methods: Sequence[Method], prefill: str, chunk: int
    ) -> None:
        self.model, self.tokenizer, self.methods = model, tokenizer, methods
        self.prefill, self.chunk = prefill, chunk if prefill == "pruned" else None

    @torch.no_grad()
    def __call__(self, item: Item) -> list[Answer]:
        """Return what each method gives."""
        ask = self._predict if item.task == CONTINUATION else self._generate
        dense: list[torch.Tensor] = []  # of the first method, for the others
        answers = []
        for method in self.methods:
            mask = method.mask_of(self.model, item.prompt[: item.n_first])
            with self._patched(mask):
                answers.append(ask(item, method, mask, dense))
        return answers

    @contextlib.contextmanager
    def _patched(self, mask: ChannelMask | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if mask is not None:
                stack.enter_context(leank.patch(self.model, mask, prefill=self.prefill))
            yield

    def _cache(self, method: Method, mask: ChannelMask | None, n_columns: int) -> Cache:
        """Return an empty cache, in which so many columns fit."""
        if method.backend is not None:
            return QuantizedCache(method.backend, self.model.config)
        if mask is None:
            return DynamicCache(config=self.model.config)
        grows = not patch_of(self.model).gpus()
        return leank.make_cache(self.model, max_cache_len=None if grows else n_columns)

    def _read(self, cache: Cache, ids: torch.Tensor) -> None:
        """Read the first call's tokens; in chunks if only the first of them is to be dense."""
        chunk = ids.shape[1] if self.chunk is None else self.chunk
        for piece in ids.split(chunk, 1):
            self.model(piece, past_key_values=cache, logits_to_keep=1)

    def _generate(
        self, item: Item, method: Method, mask: ChannelMask | None, dense: list[torch.Tensor]
    ) -> Answer:
        ids = torch.from_numpy(item.prompt)[None].to(self.model.device)
        # Each method is patched anew for each item: what is compiled would serve one answer.
        options: dict[str, Any] = {"disable_compile": True}
        if item.n_first < ids.shape[1] or method.backend is not None:
            n_columns = ids.shape[1] + item.max_new_tokens
            options["past_key_values"] = self._cache(method, mask, n_columns)
        if item.n_first < ids.shape[1]:
            self._read(options["past_key_values"], ids[:, : item.n_first])
        elif self.chunk is not None:
            options["prefill_chunk_size"] = self.chunk
        reply = reply_to(self.model, self.tokenizer, item, **options)
        share = self._share(method, mask, reply.cache, reply.cache.get_seq_length())
        return Answer(reply.score, share=share, said=reply.said)

    def _predict(
        self, item: Item, method: Method, mask: ChannelMask | None, dense: list[torch.Tensor]
    ) -> Answer:
        """Read the text after the first call, and compare what is predicted."""
        sample = item.sample
        cache = self._cache(method, mask, len(sample.context) + len(sample.span))
        device = self.model.device
        self._read(cache, torch.from_numpy(sample.context)[None].to(device))
        # As in `measure`, the first token is left out where the context predicts it.
        first, stop = max(1, sample.answer[0]), sample.answer[1]
        span = torch.from_numpy(sample.span)[None].to(device)
        keep = span.shape[1] - (first - 1)
        out = self.model(span, past_key_values=cache, logits_to_keep=keep)
        log_p = out.logits[0, : stop - first].float().log_softmax(-1)
        dense += [] if dense else [log_p]
        kl = (dense[0].exp() * (dense[0] - log_p)).sum(-1).mean()
        nll = -log_p.gather(-1, span[0, first:stop, None]).mean()
        share = self._share(method, mask, cache, cache.get_seq_length())
        return Answer(kl=float(kl), nll=float(nll), share=share)

    def _share(
        self, method: Method, mask: ChannelMask | None, cache: Cache, n_tokens: int
    ) -> float:
        if method.backend is not None:
            n_values = next(m.mask.keep.size for m in self.methods if m.mask is not None)
            return cache_bytes(cache) / (2 * n_values * n_tokens * self.model.dtype.itemsize)
        return bytes_share(mask, n_tokens, self.model.dtype)


def bytes_share(mask: ChannelMask | None, n_tokens: int, dtype: torch.dtype) -> float:
    """Return the predicted bytes of a row with a mask, as a share of a dense cache."""
    if mask is None:
        return 1.0
    dense = 2 * mask.inside.size * n_tokens * dtype.itemsize
    return mask.predict_memory([n_tokens], DTYPES[dtype])["total_bytes"] / dense


# --------------------------------------------------------------------------- teacher-forced


class Forcing:
    """All methods at once, given the right answer token by token; also where there is a GPU.

    A value counts when each of its tokens is the most likely one: where an answer has one value,
    that is whether generate() begins with it. Values that may come in any order, as those of cwe,
    are asked for in the order of the item, which no model can know: such scores are low.

    Parameters
    ----------
    model : nn.Module
        What `SpanModel` accepts.
    methods : sequence of Method
        The first is dense, the others, at least one, have masks.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method]) -> None:
        self.model, self.methods = model, methods
        windows = dict.fromkeys((m.mask.sink, m.mask.recent) for m in methods if m.mask is not None)
        self._spans = {
            (sink, recent): SpanModel(model, sink=sink, recent=recent) for sink, recent in windows
        }

    @torch.no_grad()
    def __call__(self, item: Item) -> list[Answer]:
        """Return what each method gives."""
        masks = [m.mask_of(self.model, item.prompt[: item.n_first]) for m in self.methods]
        n_tokens = len(item.prompt) + item.sample.answer[1] - item.sample.answer[0]
        dtype = next(self.model.parameters()).dtype
        answers: dict[int, Answer] = {}
        for window, span in self._spans.items():
            mine = [
                i
                for i, mask in enumerate(masks)
                if mask is not None and (mask.sink, mask.recent) == window
            ]
            keeps = [torch.tensor(masks[i].keep, device=span.device) for i in mine]
            measures = measure(span, keeps, [item.sample])
            for i, values in zip([0, *mine], np.stack(measures)[:, :, 0].T, strict=True):
                score, kl, _, nll = values.tolist()
                answers[i] = Answer(
                    score=None if item.task == CONTINUATION else score,
                    kl=kl,
                    nll=nll,
                    share=bytes_share(masks[i], n_tokens, dtype),
                )
        return [answers[i] for i in range(len(self.methods))]
