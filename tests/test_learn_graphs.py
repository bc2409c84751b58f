"""Gradients of a step: padding to few shapes changes nothing, and neither do CUDA graphs."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from leank.learning import graphs  # noqa: E402
from leank.learning.graphs import Gradients, aligned, gradient_of  # noqa: E402
from leank.learning.sample import Sample, collate  # noqa: E402
from leank.learning.span import SpanModel  # noqa: E402

from .learn_tools import random_alpha  # noqa: E402
from .tiny_models import FAMILIES, RECENT, SINK, VOCAB, tiny  # noqa: E402

WINDOW = {"sink": SINK, "recent": RECENT}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def batch_of(*sizes, seed=0):
    """Collate samples of (context, span) tokens."""
    rng = np.random.default_rng(seed)

    def sample(n_context, n_span):
        ids = rng.integers(3, VOCAB, n_context + n_span)
        return Sample("single", ids[:n_context], ids[n_context:], (1, n_span), (), ())

    return collate([sample(*size) for size in sizes])


def tokens_of(batch):
    """Return each row's tokens without padding, and the weights that are not 0 from its end."""
    ids = torch.cat([batch.context, batch.span], 1)
    return [
        (row[start:].tolist(), w[w != 0].tolist())
        for row, start, w in zip(ids, batch.start.tolist(), batch.weights, strict=True)
    ]


@pytest.mark.parametrize(
    "sizes", [[(40, 5), (30, 19), (33, 12)], [(40, 5)], [(20, 7), (20, 7)], [(60, 4), (9, 8)]]
)
@pytest.mark.parametrize("multiples", [(64, 8), (16, 32), (1, 1)])
def test_aligned_batches_hold_the_same_samples(sizes, multiples):
    batch = batch_of(*sizes)
    new = aligned(batch, *multiples)
    assert (new.context.shape[1] + new.span.shape[1]) % multiples[0] == 0 or (
        new.context.shape[1] == 0
    )
    assert new.span.shape[1] % multiples[1] == 0
    assert new.weights.shape == new.span.shape
    assert tokens_of(new) == tokens_of(batch)
    n_own = [
        batch.span.shape[1] - b
        for b in (0 * batch.start if batch.begin is None else batch.begin).tolist()
    ]
    assert (new.span.shape[1] - new.begin).tolist() == n_own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_hidden", [False, True])
def test_aligned_batches_have_the_same_gradient(family, with_hidden):
    model, batch = SpanModel(tiny(family), **WINDOW), batch_of((40, 5), (30, 19), (15, 8))
    hidden = torch.tensor([[True, False], [False, False], [False, True]]) if with_hidden else None
    alpha, weight = random_alpha(), torch.tensor(3.0)
    loss, gradient = gradient_of(model, batch, alpha, hidden, weight)
    assert gradient.abs().max() > 0
    for multiples in ((64, 32), (128, 64)):
        new = gradient_of(model, aligned(batch, *multiples), alpha, hidden, weight, padded=True)
        torch.testing.assert_close(new[0], loss, rtol=1e-4, atol=0)
        scale = gradient.abs().max()
        torch.testing.assert_close(new[1] / scale, gradient / scale, rtol=0, atol=2e-4)


def test_on_a_cpu_nothing_is_captured():
    model, batch = SpanModel(tiny(), **WINDOW), batch_of((40, 5), (30, 9))
    arguments = batch, random_alpha(), None, torch.tensor(1.0)
    gradients = Gradients(model)
    for _ in range(3):
        for got, expected in zip(
            gradients(*arguments), gradient_of(model, *arguments), strict=True
        ):
            assert torch.equal(got, expected)
    assert not gradients.n_graphs


def on_gpu(batches, monkeypatch, family="llama"):
    """Return (model, arguments of each batch) with shapes that come up soon."""
    monkeypatch.setattr(graphs, "_COLUMNS", 64)
    monkeypatch.setattr(graphs, "_SPAN", 32)
    model = tiny(family, dtype=torch.bfloat16, head_dim=64).cuda()
    model = SpanModel(model, **WINDOW)
    rng = np.random.default_rng(1)
    arguments = []
    for i, batch in enumerate(batches):
        alpha = torch.tensor(rng.uniform(0, 1, model.layout.mask_shape), dtype=torch.float32)
        hidden = torch.tensor(rng.random(model.layout.mask_shape[:2]) < 0.3) if i % 2 else None
        hidden = None if hidden is None else hidden.cuda()
        arguments.append((batch.to(model.device), alpha.cuda(), hidden, torch.tensor(2.0).cuda()))
    return model, arguments


@pytest.mark.cuda
@needs_gpu
def test_graphs_equal_plain_steps(monkeypatch):
    """Shapes take turns; each result is that of its own batch, factors and hidden heads."""
    sizes = [[(40, 5), (30, 19)], [(100, 5), (90, 7)], [(41, 6), (52, 9)], [(300, 40), (290, 33)]]
    batches = [batch_of(*sizes[i % 4], seed=i) for i in range(16)]
    model, arguments = on_gpu(batches, monkeypatch)
    gradients = Gradients(model)
    for i, (batch, *others) in enumerate(arguments):
        got = gradients(batch, *others)
        for x, y in zip(got, gradient_of(model, aligned(batch, 64, 32), *others), strict=True):
            assert torch.equal(x, y), i
        loss, gradient = gradient_of(model, batch, *others)
        torch.testing.assert_close(got[0], loss, rtol=0.05, atol=0)
        cosine = torch.nn.functional.cosine_similarity(got[1].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.99, i
    assert gradients.n_graphs == 3  # two of the sizes have one shape


@pytest.mark.cuda
@needs_gpu
def test_long_contexts_are_not_captured(monkeypatch):
    model, arguments = on_gpu([batch_of((100, 5))] * 3, monkeypatch)
    model.chunk = 50
    gradients = Gradients(model)
    for one in arguments:
        for x, y in zip(gradients(*one), gradient_of(model, *one), strict=True):
            assert torch.equal(x, y)
    assert not gradients.n_graphs


@pytest.mark.cuda
@needs_gpu
def test_a_model_that_waits_is_not_captured(monkeypatch):
    model, arguments = on_gpu([batch_of((100, 5), (90, 5))] * 3, monkeypatch)
    layer = model.base.layers[1].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x) if x.sum().item() < 1e9 else x)
    gradients = Gradients(model)
    with pytest.warns(UserWarning, match="waits for the GPU"):
        first = gradients(*arguments[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = [gradients(*one) for one in arguments]
    assert torch.equal(first[1], others[0][1])
    assert not gradients.n_graphs
