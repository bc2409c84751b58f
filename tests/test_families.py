"""Every family of tests/families.py: dense with a mask that keeps all, else the rule; refusals."""

import contextlib
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: E402

import leank  # noqa: E402
from leank.learning.span import SpanModel  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from . import tiny_models  # noqa: E402
from .families import FAMILIES, README, REFUSED, mask_for, readme  # noqa: E402
from .learn_tools import make_batch  # noqa: E402
from .tiny_models import (  # noqa: E402
    RECENT,
    SINK,
    assert_same,
    generate,
    logits,
    prompts,
    wide,
)

# What generate() is told, with a left-padded batch of two.
CASES = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 17},
}
LENGTHS = [45, 21]
N = 8


class Case:
    """A family's model, its float64 copy and what they answer densely."""

    def __init__(self, family):
        self.model = family.make()
        self.double = wide(self.model)
        if getattr(self.double.config, "_experts_implementation", None) is not None:
            self.double.set_experts_implementation("eager")  # the default knows no float64
        self.layout = inspect_structure(self.model)
        self.ids, self.mask = prompts(LENGTHS)

    def run(self, model, name):
        return generate(model, self.ids, self.mask, N, **CASES[name])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return Case(FAMILIES[request.param])


@contextlib.contextmanager
def rule(model, mask, layout):
    """Let the model attend by the rule, also if it calls torch's function by itself."""
    n_columns = max(LENGTHS)
    if layout.interface:
        with tiny_models.oracle(model, mask, n_columns):
            yield
        return
    calls = itertools.count()

    def attend(query, key, value, attn_mask, **options):
        layer = next(calls) % layout.n_layers
        scale = query.shape[-1] ** -0.5
        return tiny_models.attend(layer, query, key, value, attn_mask[:, 0], scale)

    with pytest.MonkeyPatch.context() as patch, tiny_models.oracle(model, mask, n_columns):
        model.config._attn_implementation = "sdpa"
        patch.setattr(F, "scaled_dot_product_attention", attend)
        yield


@pytest.mark.parametrize("name", CASES)
def test_all_keeping_mask_equals_dense(case, name):
    dense = leank.ChannelMask.dense(*case.layout.mask_shape, sink=SINK, recent=RECENT)
    plain = case.run(case.model, name)
    # Eager attention rounds its softmax to float32, and is NaN for padding, in float64 too.
    is_wide = case.layout.base != "eager"
    with contextlib.nullcontext() if is_wide else rule(case.double, dense, case.layout):
        truth = case.run(case.double, name)
    with leank.patch(case.model, dense):
        out = case.run(case.model, name)
    assert isinstance(out.past_key_values, leank.LeanKCache)
    assert len(out.past_key_values.packed) == case.layout.n_layers - len(case.layout.outside)
    assert_same(out, truth, plain, name)


@pytest.mark.parametrize("name", CASES)
def test_pruned_equals_the_rule(case, name):
    mask, outs = mask_for(case.layout), []
    for model in (case.model, case.double):
        with rule(model, mask, case.layout):
            outs.append(case.run(model, name))
    with leank.patch(case.model, mask):
        out = case.run(case.model, name)
    plain, truth = outs
    assert_same(out, truth, plain, name)
    dense = case.run(case.model, name)
    np.testing.assert_allclose(logits(out)[0], logits(dense)[0], atol=1e-2)
    assert not np.allclose(logits(out)[1:], logits(dense)[1:], atol=0.02), "the mask did nothing"


def test_unpatch_is_bit_identical(case):
    before = case.run(case.model, "greedy")
    names = [config._attn_implementation for config in case.layout.configs]
    with leank.patch(case.model, mask_for(case.layout)):
        case.run(case.model, "greedy")
    assert [config._attn_implementation for config in case.layout.configs] == names
    np.testing.assert_array_equal(logits(case.run(case.model, "greedy")), logits(before))


@pytest.mark.parametrize("name", FAMILIES)
def test_learning_runs_or_is_refused(name):
    family, window = FAMILIES[name], {"sink": SINK, "recent": RECENT}
    if not family.learn:
        with pytest.raises(ValueError, match="model: learning a mask expects .*, got .* with "):
            SpanModel(family.make(), **window)
        return
    model, batch = SpanModel(family.make(), **window), make_batch()
    mask, shape = mask_for(model.layout), model.layout.mask_shape
    dense = model.dense(batch)
    out = model.mixed(batch, dense, torch.ones(shape))
    torch.testing.assert_close(out, dense.target, rtol=0, atol=2e-4)
    keep = torch.tensor(mask.keep)
    out = model.mixed(batch, dense, keep.float(), ~keep.any(-1))
    assert (out - dense.target).abs().max() > 0.01, "the mask did nothing"
    ids = torch.cat([batch.context, batch.span], 1)[:1]
    with torch.no_grad():
        whole = family.make()
        expected = whole(ids).logits
        logits = model.logits(whole.model(ids).last_hidden_state)
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_family_refused(name):
    model = REFUSED[name].make()
    before = model.config._attn_implementation
    mask = leank.ChannelMask.dense(3, 4, 16, sink=SINK, recent=RECENT)
    with pytest.raises(ValueError, match="^model: expected .*" + REFUSED[name].message):
        leank.patch(model, mask)
    assert model.config._attn_implementation == before


def test_readme_says_what_is_tested():
    text = README.read_text()
    assert readme(text) == text, "run python -m tests.families"
