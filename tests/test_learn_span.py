"""SpanModel: the dense run, runs with factors, against the dense model and a patched one."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.learning import span  # noqa: E402
from leank.learning.sample import Sample, collate  # noqa: E402
from leank.learning.span import SpanModel, error_of, loss_of  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .learn_tools import eager_mixed, make_batch, random_alpha  # noqa: E402
from .tiny_models import FAMILIES, RECENT, SINK, VOCAB, pruned, tiny  # noqa: E402

WINDOW = {"sink": SINK, "recent": RECENT}


def model_of(family="llama", **options):
    return SpanModel(tiny(family), **WINDOW, **options)


def close(actual, expected, tolerance=2e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ones_is_the_dense_model(family):
    model, batch = model_of(family, chunk=9), make_batch()
    dense = model.dense(batch)
    ids = torch.cat([batch.context, batch.span], 1)
    for b, start in enumerate(batch.start.tolist()):
        alone = model.base(input_ids=ids[b : b + 1, start:]).last_hidden_state
        close(dense.target[b], alone[0, -batch.span.shape[1] :])
    close(model.mixed(batch, dense, torch.ones(3, 2, 16)), dense.target)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_what_a_patched_model_computes(family):
    """The span after a prompt that was read densely, as in generate()."""
    model, batch, mask = model_of(family), make_batch(), pruned()
    keep = torch.tensor(mask.keep)
    out = model.mixed(batch, model.dense(batch), keep.float(), ~keep.any(-1))
    whole = tiny(family)
    columns = torch.arange(batch.context.shape[1] + batch.span.shape[1])
    attention_mask = (columns >= batch.start[:, None]).long()
    n_context = batch.context.shape[1]
    positions = (columns - batch.start[:, None]).clamp(min=0)
    with leank.patch(whole, mask), torch.no_grad():
        cache = leank.make_cache(whole)
        options = {"past_key_values": cache}
        whole.model(
            batch.context,
            attention_mask=attention_mask[:, :n_context],
            position_ids=positions[:, :n_context],
            **options,
        )
        expected = whole.model(
            batch.span,
            attention_mask=attention_mask,
            position_ids=positions[:, n_context:],
            **options,
        ).last_hidden_state
    close(out, expected)
    # The mask does something.
    assert (out - model.dense(batch).target).abs().max() > 0.1


@pytest.mark.parametrize("with_hidden", [False, True])
def test_gradient_is_that_of_plain_pytorch(monkeypatch, with_hidden):
    model, batch = model_of(), make_batch()
    dense = model.dense(batch)
    hidden = torch.tensor([[True, False], [False, False], [False, True]]) if with_hidden else None
    results = []
    for attention in (span.mixed_attention, eager_mixed):
        monkeypatch.setattr(span, "mixed_attention", attention)
        alpha = random_alpha().requires_grad_()
        loss = loss_of(model.mixed(batch, dense, alpha, hidden), dense, batch)
        loss.backward()
        results.append((loss.detach(), alpha.grad))
    close(results[0][0], results[1][0], 1e-5)
    scale = results[1][1].abs().max()
    close(results[0][1] / scale, results[1][1] / scale, 1e-4)
    if with_hidden:
        assert not results[0][1][hidden].any()


def test_a_sample_has_its_loss_whatever_is_in_its_batch():
    """The context is read densely also where another sample's longer span reaches into it."""
    rng = np.random.default_rng(0)

    def sample(n_context, n_span):
        ids = rng.integers(3, VOCAB, n_context + n_span)
        parts = ids[:n_context], ids[n_context:]
        return Sample("single", *parts, (1, n_span), (), ())

    samples = [sample(40, 5), sample(30, 19), sample(33, 12)]
    model, keep = model_of(), torch.tensor(pruned().keep)

    def loss_and_gradient(part):
        batch, alpha = collate(part), keep.float().requires_grad_()
        dense = model.dense(batch)
        loss = error_of(model.mixed(batch, dense, alpha, ~keep.any(-1)), dense, batch)
        loss.backward()
        return loss.detach(), alpha.grad

    together = loss_and_gradient(samples)
    alone = [loss_and_gradient([one]) for one in samples]
    for i in range(2):
        close(together[i], sum(one[i] for one in alone))
    assert collate(samples).begin.tolist() == [14, 0, 7] and collate(samples[:1]).begin is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of kernels that a CPU does not have
@pytest.mark.parametrize("n_new", [1, 7, 20])
def test_a_chunk_attends_to_all_before_it(n_new):
    """What GPUs use instead of a mask; the last query sees the last key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, n_new), (2, 20), (2, 20)))
    out, _ = span._attend_chunk(None, q, k, v, None, scaling=0.3)
    seen = torch.arange(20) <= torch.arange(20 - n_new, 20)[:, None]
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    weights = (0.3 * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
    close(out, (weights @ v).transpose(1, 2), 1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_on_a_gpu(padded):
    """Many chunks are as near to float32 as one is."""
    lengths = (700, 300) if padded else (700, 700)
    batch, family = make_batch(lengths), {"head_dim": 64}
    truth = SpanModel(tiny(dtype=torch.float32, **family), **WINDOW).dense(batch)
    size = truth.target.square().mean().sqrt()
    errors = []
    for chunk in (8192, 96):
        model = SpanModel(tiny(dtype=torch.bfloat16, **family).cuda(), **WINDOW, chunk=chunk)
        target = model.dense(batch.to(model.device)).target.cpu().float()
        errors.append(((target - truth.target).square().mean().sqrt() / size).item())
    assert errors[1] < 1.5 * errors[0] + 1e-3, errors


def test_only_tokens_with_a_weight_count():
    batch, model = make_batch(), model_of()
    dense = model.dense(batch)
    out = dense.target + 1
    assert float(loss_of(out, dense, batch)) == pytest.approx(1)
    out = torch.where(batch.weights[..., None] == 0, dense.target + 1e3, dense.target + 2)
    assert float(loss_of(out, dense, batch)) == pytest.approx(4, rel=1e-4)


def test_the_model_is_as_before_also_after_an_error(monkeypatch):
    whole = tiny()
    model, batch = SpanModel(whole, **WINDOW), make_batch()
    dense = model.dense(batch)

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(span, "mixed_attention", fail)
    with pytest.raises(RuntimeError, match="no"):
        model.mixed(batch, dense, torch.ones(3, 2, 16))
    assert whole.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in whole.parameters())
    with leank.patch(whole, pruned()):
        pass


@pytest.mark.parametrize("chunk", [0, -1])
def test_bad_chunks_are_named(chunk):
    with pytest.raises(ValueError, match="chunk: expected at least 1"):
        model_of(chunk=chunk)


def test_a_patched_model_is_refused():
    whole = tiny()
    with leank.patch(whole, pruned()), pytest.raises(ValueError, match="patched already"):
        SpanModel(whole, **WINDOW)


def test_memory_of_the_context_is_shared():
    """Keys of the context are views: the dense run keeps each of them once."""
    batch, model = make_batch(), model_of()
    dense = model.dense(batch)
    assert len(dense.keys) == 3 and dense.keys[0].shape == (3, 2, 40, 16)
    assert np.all([k.untyped_storage().nbytes() == 3 * 2 * 47 * 16 * 4 for k in dense.keys])


def test_structure_is_known_without_weights():
    with torch.device("meta"):
        empty = type(tiny())(tiny().config)
    assert inspect_structure(empty) == dataclasses.replace(
        inspect_structure(tiny()), configs=(empty.config,)
    )
    with pytest.raises(ValueError, match="expected all weights on the CPU"):
        leank.patch(empty, pruned())
    mixed = tiny()
    mixed.lm_head.to("meta")
    with pytest.raises(ValueError, match="all weights on GPUs or all on the CPU, got cpu, meta"):
        SpanModel(mixed, **WINDOW)
