"""The gradient of a training step, and the same from CUDA graphs.

A step of a small model is thousands of kernels, each shorter than its launch. Batches are padded so
that few shapes come up; a shape's second step is captured, and from then on it is one launch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from leank.learning.sample import Batch
from leank.learning.span import SpanModel, error_of

# Shapes are multiples of these. Few enough that they come again, and little more to compute.
_COLUMNS, _SPAN = 1024, 128
# Of larger models the GPU computes longer than the host takes to launch.
_MOST_PARAMETERS = 1_000_000_000


def gradient_of(
    model: SpanModel,
    batch: Batch,
    factor: torch.Tensor,
    hidden: torch.Tensor | None,
    weight: torch.Tensor,
    padded: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a batch and its gradient for the factors.

    Parameters
    ----------
    model : SpanModel
    batch : Batch
    factor : float32 [N, Hkv, D]
        Of the channels of middle keys.
    hidden : bool [N, Hkv], optional
        Heads that attend to no middle key.
    weight : float32 scalar
        What the sum over the batch's tokens is divided by.
    padded : bool, optional
        As in `SpanModel.dense`.
    """
    dense = model.dense(batch, padded)
    factor = factor.detach().requires_grad_()
    loss = error_of(model.mixed(batch, dense, factor, hidden), dense, batch) / weight
    (gradient,) = torch.autograd.grad(loss, factor)
    return loss.detach(), gradient


def aligned(batch: Batch, columns: int, span: int) -> Batch:
    """Return the same samples with more padding, and with columns of context in the span.

    Parameters
    ----------
    batch : Batch
    columns, span : int
        The columns of context and span together, and those of the span, become multiples of these.
    """
    n_context, n_span = batch.context.shape[1], batch.span.shape[1]
    new_span = -(-n_span // span) * span
    n_all = max(-(-(n_context + n_span) // columns) * columns, new_span)
    left = n_all - n_context - n_span
    ids = torch.cat([batch.context, batch.span], 1)
    ids = torch.nn.functional.pad(ids, (left, 0))
    begin = torch.zeros_like(batch.start) if batch.begin is None else batch.begin
    return Batch(
        context=ids[:, : n_all - new_span],
        span=ids[:, n_all - new_span :],
        start=batch.start + left,
        weights=torch.nn.functional.pad(batch.weights, (new_span - n_span, 0)),
        begin=begin + (new_span - n_span),
    )


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, torch.Tensor]


class Gradients:
    """`gradient_of` a model, by CUDA graphs where that is faster and can be done.

    It can not if the context is read in several chunks, if layers are on several GPUs, or if the
    model looks at values on the way, as mixtures of experts do; the last gives a warning.

    Parameters
    ----------
    model : SpanModel
    """

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        n_parameters = sum(x.numel() for x in model.base.parameters())
        on_one_gpu = model.device.type == "cuda" and len(model.devices) == 1
        self._captures = on_one_gpu and n_parameters <= _MOST_PARAMETERS
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], _Captured] = {}
        self._pool = None

    @property
    def n_graphs(self) -> int:
        """Shapes that were captured."""
        return len(self._graphs)

    def __call__(
        self,
        batch: Batch,
        factor: torch.Tensor,
        hidden: torch.Tensor | None,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `gradient_of` does."""
        if not self._captures:
            return gradient_of(self.model, batch, factor, hidden, weight)
        padded = aligned(batch, _COLUMNS, _SPAN)
        shape = *padded.context.shape, padded.span.shape[1]
        if shape[1] > self.model.chunk:
            return gradient_of(self.model, batch, factor, hidden, weight)
        if hidden is None:
            hidden = torch.zeros(factor.shape[:2], dtype=torch.bool, device=factor.device)
        inputs = *padded, factor.detach(), hidden, weight
        if not self._seen and not self._can_capture(inputs):
            self._captures = False
            return self(batch, factor, hidden, weight)
        if shape not in self._seen:
            self._seen.add(shape)
            return self._compute(inputs)  # all that its kernels need once is there after this
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(inputs)
        captured = self._graphs[shape]
        for static, x in zip(captured.inputs, inputs, strict=True):
            static.copy_(x)
        captured.graph.replay()
        return tuple(x.clone() for x in captured.outputs)  # the next replay writes over them

    def _can_capture(self, inputs: tuple) -> bool:
        try:
            with _no_waiting():
                self._compute(inputs)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            warnings.warn(
                "the model waits for the GPU inside its forward, so that steps cannot be CUDA "
                f"graphs and take longer: {error}",
                stacklevel=3,
            )
            return False
        return True

    def _compute(self, inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        *batch, factor, hidden, weight = inputs
        return gradient_of(self.model, Batch(*batch), factor, hidden, weight, padded=True)

    def _capture(self, inputs: tuple) -> _Captured:
        static = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        # One pool for all, which never run at once. Other threads, as NCCL's, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._compute(static)
        self._pool = graph.pool()
        return _Captured(graph, static, outputs)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise where the host would wait for the GPU, which cannot be captured."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
