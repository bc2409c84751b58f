"""A sample for learning and testing a mask, a batch of them, and how a sample is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .text import DataError


@dataclass(frozen=True)
class Sample:
    """One sample; the model reads `context`, then `span`.

    Attributes
    ----------
    kind : str
        One of `leank.learning.tasks.ALL_KINDS`.
    context : np.ndarray
        Tokens before the question, [L] int64, with what the tokenizer puts first.
    span : np.ndarray
        Tokens of the question, the cue and the answer, or of the continuation, [T] int64.
    answer : tuple of int
        Range of the answer's tokens in `span`; what is before it is the prompt of a test.
    expected : tuple of str
        What `leank.learning.tasks.score` looks for.
    needles : tuple of (int, int)
        Ranges of the hidden texts' tokens in `context`, in the order of the puzzle.
    values : tuple of (int, int)
        Ranges of the tokens in `span` of each of `expected`, within `answer`; empty if not known.
    n_dense : int
        Tokens at the start of `span` that attend densely, since they are of the prompt as well.
    """

    kind: str
    context: np.ndarray
    span: np.ndarray
    answer: tuple[int, int]
    expected: tuple[str, ...]
    needles: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...] = ()
    n_dense: int = 0

    def __len__(self) -> int:
        """Tokens of context and span."""
        return len(self.context) + len(self.span)


class Batch(NamedTuple):
    """Left-padded samples.

    Attributes
    ----------
    context : torch.Tensor
        [B, L] int64.
    span : torch.Tensor
        [B, T] int64, T the longest span. A row with a shorter one has its last tokens of context
        here, since padding may not stand between tokens; they are read as context all the same.
    start : torch.Tensor
        First column of `context` that is no padding, [B] int64.
    weights : torch.Tensor
        Weights of the loss, [B, T] float32.
    begin : torch.Tensor, optional
        First column of `span` that is of the row's own span and not read densely, [B] int64; None:
        0 in all rows.
    """

    context: torch.Tensor
    span: torch.Tensor
    start: torch.Tensor
    weights: torch.Tensor
    begin: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the same on a device."""
        return Batch(*(None if x is None else x.to(device) for x in self))


def collate(
    batch: Sequence[Sample], pad_id: int = 0, question_weight: float = 0.0, lead_weight: float = 1.0
) -> Batch:
    """Make a left-padded batch.

    Parameters
    ----------
    batch : sequence of Sample
    pad_id : int, default 0
    question_weight : float, default 0
        Weight of the tokens of question and cue; the answer's have 1.
    lead_weight : float, default 1
        Weight of the token before the answer, whose hidden state chooses the answer's first token.

    Returns
    -------
    Batch

    Raises
    ------
    DataError
        If the batch is empty, or a sample has no more tokens than the longest span.
    """
    if not batch:
        raise DataError("batch: expected at least one sample, got none")
    n_span = max(len(sample.span) for sample in batch)
    n_all = max(map(len, batch))
    if (n_least := min(map(len, batch))) <= n_span:
        raise DataError(
            f"batch: expected samples longer than the longest span, {n_span} tokens, got {n_least}"
        )
    ids = torch.full((len(batch), n_all), pad_id, dtype=torch.int64)
    weights = torch.zeros(len(batch), n_all)
    for b, sample in enumerate(batch):
        ids[b, n_all - len(sample) :] = torch.from_numpy(
            np.concatenate([sample.context, sample.span])
        )
        first, stop = (n_all - len(sample.span) + i for i in sample.answer)
        weights[b, n_all - len(sample.span) + sample.n_dense : first] = question_weight
        weights[b, first:stop] = 1
        if sample.answer[0] > sample.n_dense:  # else context precedes it, which no mask changes
            weights[b, first - 1] = lead_weight
    start = torch.tensor([n_all - len(sample) for sample in batch])
    n_context = n_all - n_span
    begin = torch.tensor([n_span - len(sample.span) + sample.n_dense for sample in batch])
    return Batch(
        ids[:, :n_context],
        ids[:, n_context:],
        start,
        weights[:, n_context:],
        begin if begin.any() else None,
    )


def describe(sample: Sample, tokenizer: Any, n_shown: int = 24) -> str:
    """Return a sample as a few lines for people: where it begins, its needles, and its span.

    Parameters
    ----------
    sample : Sample
    tokenizer : transformers tokenizer
        The one that the sample was made with.
    n_shown : int, default 24
        Tokens shown of the beginning, and of each needle.
    """

    def shown(ids: np.ndarray, limit: int | None = None) -> str:
        rest = " ..." if limit is not None and len(ids) > limit else ""
        return repr(tokenizer.decode(ids[:limit].tolist())) + rest

    first, stop = sample.answer
    lines = [f"{sample.kind}: {len(sample.context):,} + {len(sample.span)} tokens"]
    lines.append(f"  begins    {shown(sample.context, n_shown)}")
    for a, b in sorted(sample.needles):
        lines.append(f"  at {a:<6,} {shown(sample.context[a:b], n_shown)}")
    if first:
        lines.append(f"  question  {shown(sample.span[:first])}")
    lines.append(f"  answer    {shown(sample.span[first:stop])}")
    return "\n".join(lines)
