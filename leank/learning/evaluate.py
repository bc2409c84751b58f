"""What masks cost on a test: scores under teacher forcing, distance of predictions, with limits.

The context of a batch is read once for all masks, since its prefill is nearly all of the work; the
short span is then read once per mask, exactly as deployed. A value counts when each of its tokens
is the most likely one given the right tokens before it. Where an answer has one value, that is
whether greedy generation gives it word for word; of a copy, how far it does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from leank.learning.sample import Batch, Sample, collate
from leank.learning.span import Dense, SpanModel, token_errors
from leank.learning.tasks import ALL_KINDS, CONTINUATION
from leank.masks import kept_shares

LEAST_DENSE = 0.20  # a kind counts if the dense model scores more
CONFIDENCE = 0.95  # of the upper limits, one-sided
_SORTED = 64  # batches that are sorted by length together
_ROWS = 512  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class KindResult:
    """What a mask does to one kind of task.

    Attributes
    ----------
    kind : str
        One of `leank.learning.tasks.ALL_KINDS`.
    n : int
        Items.
    dense, mask : float or None
        Mean scores, 0 to 1; None for continuations, which have no score.
    loss_points : float or None
        100 * (dense - mask).
    upper_points : float or None
        Upper limit of `loss_points`, one-sided 95%: the normal approximation to the mean of paired
        differences. None also for a single item.
    kl : float
        Mean over items of the mean over answer tokens of KL(dense || mask), in nats.
    loss : float
        Mean over items of `leank.learning.span.loss_of`, by which masks are learned.
    """

    kind: str
    n: int
    dense: float | None
    mask: float | None
    loss_points: float | None
    upper_points: float | None
    kl: float
    loss: float


@dataclass(frozen=True, eq=False)
class Items:
    """What each item gave, in the order of the items.

    Attributes
    ----------
    kind : str array [n]
    dense, mask : float64 arrays [n]
        Scores; NaN for continuations.
    kl, loss : float64 arrays [n]
        As in `KindResult`.
    """

    kind: npt.NDArray[np.str_]
    dense: npt.NDArray[np.float64]
    mask: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """What one mask keeps, and what it costs.

    Attributes
    ----------
    name : str
    kept_k, kept_v : float
        Shares of K channels and of heads whose V is stored, outside the window.
    kv_bytes : float
        Share of the bytes of a dense cache that is stored outside the window: their mean.
    empty_heads : float
        Share of heads that store nothing outside the window.
    kinds : tuple of KindResult
        In the order of `leank.learning.tasks.ALL_KINDS`.
    counted : tuple of str
        Kinds that the dense model scores over 20% on; the means below are over these.
    dense, mask, loss_points, upper_points : float or None
        Means over kinds as in `KindResult`; None without a kind to count. The variance behind the
        limit is that of a mean of independent means.
    kl, loss : float
        Means over all kinds.
    items : Items
    """

    name: str
    kept_k: float
    kept_v: float
    kv_bytes: float
    empty_heads: float
    kinds: tuple[KindResult, ...]
    counted: tuple[str, ...]
    dense: float | None
    mask: float | None
    loss_points: float | None
    upper_points: float | None
    kl: float
    loss: float
    items: Items = dataclasses.field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """Return all but the items as what json.dumps takes."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["items"]
        fields["kinds"] = [dataclasses.asdict(kind) for kind in self.kinds]
        return fields | {"counted": list(self.counted)}

    def save_items(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays of `items` to an .npz file, so that comparisons can be made again.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        arrays = {f.name: getattr(self.items, f.name) for f in dataclasses.fields(self.items)}
        with open(path, "wb") as file:  # np.savez would add ".npz" to another name
            np.savez_compressed(file, **arrays)


def evaluate(
    model: SpanModel,
    masks: Mapping[str, npt.NDArray[np.bool_]],
    items: Sequence[Sample],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Test masks against the dense model on the same items.

    Parameters
    ----------
    model : SpanModel
        On any device. Its window is that of all masks.
    masks : mapping of str to bool array [N, Hkv, D]
        By name; True where a channel is kept.
    items : sequence of Sample
        Each is asked for once, in order. Those of similar length share a batch; results do not
        depend on which ones do, nor on their order, up to rounding.
    batch_size : int
        Items that are read at once.
    progress : callable, optional
        Called with the numbers of items done and of all, after each batch.

    Returns
    -------
    list of Evaluation
        One for each mask, in order.

    Raises
    ------
    ValueError
        If there is no mask, no item, a mask of another shape or type, or an item without context,
        without places of its values, without a question or without an answer.
    """
    arrays = _checked(masks, model.layout.mask_shape)
    if len(items) == 0:
        raise ValueError("items: expected at least one, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    keeps = [torch.tensor(keep, device=model.device) for keep in arrays]
    n, done = len(items), 0
    kinds: list[str] = [""] * n
    # Dense and each mask, of each item.
    measured = np.full((1 + len(keeps), len(Measures._fields), n), np.nan)
    for first in range(0, n, _SORTED * batch_size):
        numbers = range(first, min(n, first + _SORTED * batch_size))
        group = {i: items[i] for i in numbers}
        for i, item in group.items():
            _check_item(i, item)
            kinds[i] = item.kind
        order = sorted(group, key=lambda i: (len(group[i]), len(group[i].span)))
        for chosen in _cut(order, group, batch_size):
            measures = measure(model, keeps, [group[i] for i in chosen])
            measured[:, :, chosen] = np.stack(measures, axis=1)
            done += len(chosen)
            if progress is not None:
                progress(done, n)
    dense, names = measured[0, 0], np.array(kinds)
    each = (Measures(*mask) for mask in measured[1:])
    return [
        _evaluation(name, keep, Items(names, dense, of.score, of.kl, of.loss))
        for of, (name, keep) in zip(each, zip(masks, arrays, strict=True), strict=True)
    ]


# ------------------------------------------------------------------------------------- checks


def _checked(masks: Mapping[str, Any], shape: tuple[int, int, int]) -> list[np.ndarray]:
    if not masks:
        raise ValueError("masks: expected at least one, got none")
    arrays = []
    for name, keep in masks.items():
        keep = np.asarray(keep)
        if keep.shape != shape or keep.dtype != np.bool_:
            raise ValueError(
                f"masks: expected bool {shape} as the model has, got {keep.dtype} {keep.shape} "
                f"in {name!r}"
            )
        arrays.append(keep)
    return arrays


def _check_item(i: int, item: Sample) -> None:
    if not len(item.context):
        raise ValueError(f"items: expected a context, got none in item {i}")
    if item.answer[1] <= max(1, item.answer[0]):
        raise ValueError(f"items: expected an answer behind the span's first token in item {i}")
    if item.kind == CONTINUATION:
        return
    if not item.values:
        raise ValueError(f"items: expected the places of its values, got none in item {i}")
    if item.answer[0] < 1:
        raise ValueError(f"items: expected a question before the answer, got none in item {i}")


# ---------------------------------------------------------------------------------- one batch


def _cut(order: list[int], items: Mapping[int, Sample], batch_size: int) -> Iterator[list[int]]:
    """Cut items, sorted by length, into batches that `collate` takes.

    Where lengths change a batch ends, if it keeps half of its size: without padding attention takes
    its fast path.
    """
    begin = 0
    while begin < len(order):
        end = min(begin + batch_size, len(order))
        lengths = [len(items[i]) for i in order[begin:end]]
        same = lengths.count(lengths[0])
        if 2 * same >= end - begin:
            end = begin + same
        while end > begin + 1 and max(len(items[i].span) for i in order[begin:end]) >= lengths[0]:
            end -= 1
        yield order[begin:end]
        begin = end


class Measures(NamedTuple):
    """What dense and each mask give on each item of a batch: float64 arrays [1 + masks, items].

    Attributes
    ----------
    score, kl, loss : array
        As in `Items`.
    nll : array
        Mean over answer tokens of the negative log-likelihood, in nats.
    """

    score: np.ndarray
    kl: np.ndarray
    loss: np.ndarray
    nll: np.ndarray


@torch.no_grad()
def measure(model: SpanModel, keeps: Sequence[torch.Tensor], items: Sequence[Sample]) -> Measures:
    """Measure dense and masks [N, Hkv, D], bool where the model is, on the items of one batch."""
    batch = collate(items).to(model.device)
    # A hidden state predicts the token after it. The first token of a continuation is predicted by
    # the context, which is dense for every mask; so may be that of an answer.
    ranges = [(max(1, item.answer[0]), item.answer[1]) for item in items]
    # Columns of these tokens: spans end together.
    begins = [batch.span.shape[1] - len(item.span) for item in items]
    row = torch.cat([torch.full((stop - first,), b) for b, (first, stop) in enumerate(ranges)])
    at = torch.cat(
        [begin + torch.arange(*tokens) for begin, tokens in zip(begins, ranges, strict=True)]
    )
    is_dense = torch.cat(
        [torch.arange(*tokens) <= item.n_dense for item, tokens in zip(items, ranges, strict=True)]
    )
    dense = model.dense(batch)
    device = dense.target.device  # that of the last layer
    row, at, tokens = row.to(device), at.to(device), batch.span.to(device)
    is_dense = is_dense.to(device)[:, None]
    states, losses = [dense.target[row, at - 1]], [np.zeros(len(items))]
    for keep in keeps:
        out = model.mixed(batch, dense, keep.float(), ~keep.any(-1))
        states.append(torch.where(is_dense, states[0], out[row, at - 1]))
        losses.append(_losses(out, dense, batch))
    hits, kl, nll = _compare(model, states, tokens[row, at])
    result = Measures(*np.zeros((len(Measures._fields), len(states), len(items))))
    borders = np.cumsum([0, *(stop - first for first, stop in ranges)])
    for b, (item, (first, _)) in enumerate(zip(items, ranges, strict=True)):
        mine = slice(borders[b], borders[b + 1])
        result.score[:, b] = _scores(item, first, hits[:, mine])
        result.kl[:, b] = kl[:, mine].mean(1)
        result.nll[:, b] = nll[:, mine].mean(1)
    result.loss[:] = losses
    return result


def _losses(out: torch.Tensor, dense: Dense, batch: Batch) -> np.ndarray:
    """Return `loss_of` of each row, [B]."""
    error = token_errors(out, dense, batch)
    return ((error * batch.weights).sum(1) / batch.weights.sum(1)).double().cpu().numpy()


def _compare(
    model: SpanModel, states: list[torch.Tensor], tokens: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare what states predict with what came, and with what the first states predict.

    Parameters
    ----------
    states : list of tensors [M, hidden]
        Of the dense run, then of each mask.
    tokens : int64 [M]
        Which came after them.

    Returns
    -------
    hits : bool array [states, M]
        Whether the token was the most likely one.
    kl : float64 array [states, M]
        KL(dense || this).
    nll : float64 array [states, M]
        Negative log-likelihood of the token.
    """
    hits = torch.empty((len(states), len(tokens)), dtype=torch.bool, device=tokens.device)
    kl, nll = (torch.empty(hits.shape, dtype=torch.float32, device=tokens.device) for _ in "kn")
    for begin in range(0, len(tokens), _ROWS):
        part = slice(begin, begin + _ROWS)
        for i, hidden in enumerate(states):
            logits = model.logits(hidden[part])  # where the head is
            hits[i, part] = logits.argmax(-1).to(tokens.device) == tokens[part]
            log_p = logits.log_softmax(-1)
            if i == 0:
                log_dense, dense_p = log_p, log_p.exp()
            kl[i, part] = (dense_p * (log_dense - log_p)).sum(-1)
            nll[i, part] = -log_p.gather(-1, tokens[part, None].to(log_p.device))[:, 0]
    return hits.cpu().numpy(), *(x.double().cpu().numpy() for x in (kl, nll))


def _scores(item: Sample, first: int, hits: np.ndarray) -> np.ndarray | float:
    """Return the share of values that are hit in full, [states]; hits begin at token `first`.

    Of a copy, as in `leank.learning.tasks.score`, the share that is right before the first mistake.
    """
    if item.kind == CONTINUATION:
        return np.nan
    if item.kind == "copy":
        [(a, b)] = item.values
        return np.logical_and.accumulate(hits[:, a - first : b - first], axis=1).mean(1)
    return np.mean([hits[:, a - first : b - first].all(1) for a, b in item.values], axis=0)


# ---------------------------------------------------------------------------------- statistics


def _evaluation(name: str, keep: np.ndarray, items: Items) -> Evaluation:
    kinds, variances = [], {}
    for kind in ALL_KINDS:
        mine = items.kind == kind
        if mine.any():
            result, variances[kind] = _kind(kind, items, mine)
            kinds.append(result)
    counted = [k for k in kinds if k.dense is not None and k.dense > LEAST_DENSE]
    means: dict[str, float | None] = dict.fromkeys(("dense", "mask", "loss_points"))
    upper = None
    if counted:
        means = {key: float(np.mean([getattr(k, key) for k in counted])) for key in means}
        spread = [variances[k.kind] for k in counted]
        upper = _upper(means["loss_points"], sum(spread) / len(spread) ** 2)
    return Evaluation(
        name=name,
        **kept_shares(keep),
        kinds=tuple(kinds),
        counted=tuple(k.kind for k in counted),
        **means,
        upper_points=upper,
        kl=float(np.mean([k.kl for k in kinds])),
        loss=float(np.mean([k.loss for k in kinds])),
        items=items,
    )


def _kind(kind: str, items: Items, mine: np.ndarray) -> tuple[KindResult, float]:
    """Return the result of a kind, and the variance of its mean loss in points^2."""
    n = int(mine.sum())
    kl, loss = float(items.kl[mine].mean()), float(items.loss[mine].mean())
    if kind == CONTINUATION:
        return KindResult(kind, n, None, None, None, None, kl, loss), np.nan
    dense, mask = items.dense[mine], items.mask[mine]
    points = 100 * (dense - mask)
    mean = float(points.mean())
    variance = float(points.var(ddof=1)) / n if n > 1 else np.nan
    scores = float(dense.mean()), float(mask.mean()), mean, _upper(mean, variance)
    return KindResult(kind, n, *scores, kl, loss), variance


def _upper(mean: float, variance: float) -> float | None:
    """Return the one-sided upper limit of a mean, or None where its variance is not known."""
    if np.isnan(variance):
        return None
    return float(mean + NormalDist().inv_cdf(CONFIDENCE) * np.sqrt(variance))
