"""Models in which layers keep a state, alone or beside K and V: that stays transformers' own."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import close, forward  # noqa: E402
from .tiny_models import generate, logits, oracle, prompts  # noqa: E402

# A convolution, linear attention, Mamba, Mamba in the same layers as attention, layers of nothing.
NAMES = ("lfm2", "qwen3_next", "jamba", "falcon_h1", "nemotron_h")


class Hybrid:
    """A family's model, patched, and the same model unpatched."""

    def __init__(self, name):
        self.name, self.plain = name, FAMILIES[name].make()
        self.layout = inspect_structure(self.plain)
        self.mask = mask_for(self.layout)
        self.model = copy.deepcopy(self.plain)

    def filled(self, ids, mask=None):
        cache = leank.make_cache(self.model)
        forward(self.model, ids, cache, mask)
        return cache


@pytest.fixture(scope="module", params=NAMES)
def hybrid(request):
    hybrid = Hybrid(request.param)
    with leank.patch(hybrid.model, hybrid.mask):
        yield hybrid


def test_layers_and_bytes(hybrid):
    cache = hybrid.filled(prompts([200])[0])
    own = DynamicCache(config=hybrid.model.config).layers
    for i, (layer, theirs) in enumerate(zip(cache.layers, own, strict=True)):
        assert (type(layer) is type(theirs)) == (i in hybrid.layout.outside)
    assert len(cache.packed) == len(own) - len(hybrid.layout.outside)
    known = hybrid.model._leank_patch.mask
    assert known.outside == hybrid.layout.outside
    assert cache.memory()["total_bytes"] == known.predict_memory([200])["total_bytes"]
    assert cache.get_seq_length() == 200


def test_second_turn_after_steps(hybrid):
    """Of one token, which models move states on by in place: the next prompt begins anew."""
    (ids, mask), (more, more_mask) = prompts([30, 12]), prompts([9, 9], seed=2)
    mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long), more_mask], 1)

    def second(model):
        first = generate(model, ids, mask[:, :30], n=5)
        both = torch.cat([first.sequences, more], 1)
        return generate(model, both, mask, past_key_values=first.past_key_values)

    out = second(hybrid.model)
    with oracle(copy.deepcopy(hybrid.plain), hybrid.mask, 30) as dense:
        expected = second(dense)
    assert torch.equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(logits(out), logits(expected), atol=2e-4)


def test_second_turn_on_a_copy(hybrid):
    """Also what states are changed in place: the copies have their own."""
    prefix = prompts([30])[0]
    cache = hybrid.filled(prefix)
    for seed in (5, 6):
        ids = torch.cat([prefix, prompts([15], seed=seed)[0]], 1)
        twin = copy.deepcopy(cache)
        out = forward(hybrid.model, ids[:, 30:], twin)
        with torch.no_grad(), oracle(copy.deepcopy(hybrid.plain), hybrid.mask, 30) as dense:
            expected = DynamicCache(config=dense.config)
            forward(dense, prefix, expected)
            close(out, forward(dense, ids[:, 30:], expected))
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("rows", [[2, 0, 0], [1], [False, True, True], None])
def test_rows(hybrid, rows):
    ids, padding = prompts([30, 12, 25])
    more = prompts([1, 1, 1], seed=2)[0]
    padding = torch.cat([padding, torch.ones_like(more)], 1)
    cache = hybrid.filled(ids, padding[:, :30])
    expected = forward(hybrid.model, more, copy.deepcopy(cache), padding)
    if rows is None:
        rows = [0, 0, 1, 1, 2, 2]
        cache.batch_repeat_interleave(2)
    else:
        cache.batch_select_indices(torch.tensor(rows))
    rows = torch.arange(3)[torch.tensor(rows)]
    close(forward(hybrid.model, more[rows], cache, padding[rows]), expected[rows])


def test_crop(hybrid):
    ids, more = prompts([30])[0], prompts([1], seed=2)[0]
    cache = hybrid.filled(ids)
    expected = forward(hybrid.model, more, copy.deepcopy(cache))
    cache.crop(0)
    with pytest.raises(RuntimeError, match=r"a state .* cannot go back; .* copy\.deepcopy"):
        cache.crop(-3)
    assert cache.get_seq_length() == 30, "the cache is as it was"
    close(forward(hybrid.model, more, copy.deepcopy(cache)), expected)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    forward(hybrid.model, ids, cache)
    close(forward(hybrid.model, more, cache), expected)


def test_reset_for_another_number_of_rows(hybrid):
    cache = hybrid.filled(prompts([30, 12, 25])[0])
    cache.reset()
    ids = prompts([30])[0]
    close(forward(hybrid.model, ids, cache), hybrid.plain(ids).logits.detach())


def test_crop_of_recorded_convolutions():
    hybrid = Hybrid("lfm2")
    ids, more = prompts([30])[0], prompts([6], seed=2)[0]
    with leank.patch(hybrid.model, hybrid.mask):
        cache = hybrid.filled(ids)
        expected = forward(hybrid.model, more, copy.deepcopy(cache))
        cache.activate_past_recording()
        forward(hybrid.model, more.flip(1), cache)
        cache.crop(-6)
        close(forward(hybrid.model, more, cache), expected)


def test_crop_of_recorded_states_is_refused(hybrid):
    if hybrid.name == "lfm2":
        pytest.skip("convolutions go back")
    cache = hybrid.filled(prompts([30])[0])
    cache.activate_past_recording()
    forward(hybrid.model, prompts([6], seed=2)[0], cache)
    with pytest.raises(RuntimeError, match="a state .* cannot go back"):
        cache.crop(-6)
    cache.crop(0)
    assert cache.get_seq_length() == 36


@pytest.mark.parametrize(("n_past", "n_new"), [(0, 3), (30, 3), (30, 1)])
def test_forward_that_stopped_half_way(hybrid, n_past, n_new):
    """States have moved on and cannot go back, wherever it stopped: only a new begin is right."""

    def stop(module, inputs):
        raise KeyboardInterrupt

    ids, more = prompts([30])[0], prompts([n_new], seed=2)[0]
    expected = forward(hybrid.model, more, hybrid.filled(ids))
    for layer in hybrid.model.base_model.layers[1:]:
        cache = hybrid.filled(ids) if n_past else leank.make_cache(hybrid.model)
        hook = layer.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            forward(hybrid.model, more, cache)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"did not finish; cache\.(crop|reset)\("):
            forward(hybrid.model, more, cache)
        if n_past:
            with pytest.raises(RuntimeError, match=r"cache\.reset\(\) and feed everything again"):
                cache.crop(0)
        cache.reset()
        forward(hybrid.model, ids, cache)
        close(forward(hybrid.model, more, cache), expected)


def test_refused_mask_leaves_a_forward_that_did_not_finish(hybrid):
    """The states before the first attention moved on, although no column was stored."""
    ids, more = prompts([30])[0], prompts([3], seed=2)[0]
    cache = hybrid.filled(ids)
    mask = torch.zeros(1, 1, 3, 33).index_fill_(3, torch.tensor([2]), -1.5)
    others = dict.fromkeys(("conv", "linear_attention"))
    with pytest.raises(ValueError, match="attention_mask: expected only 0 and -inf"):
        forward(hybrid.model, more, cache, {"full_attention": mask} | others)
    with pytest.raises(RuntimeError, match=r"states moved on .*; cache\.reset\(\)"):
        forward(hybrid.model, more, cache)


def test_assisted_decoding(hybrid):
    """Convolutions go back, and give greedy's tokens; other states are refused."""
    ids = prompts([10])[0].repeat(1, 4)
    if hybrid.name == "lfm2":
        out = generate(hybrid.model, ids, n=24, prompt_lookup_num_tokens=4)
        assert torch.equal(out.sequences, generate(hybrid.model, ids, n=24).sequences)
    else:
        with pytest.raises(ValueError, match="[Aa]ssisted generation is not supported"):
            generate(hybrid.model, ids, prompt_lookup_num_tokens=4)


def test_fixed_length_is_refused(hybrid):
    with pytest.raises(ValueError, match="max_cache_len: expected None .* keep a state"):
        leank.make_cache(hybrid.model, max_cache_len=64)
    with pytest.raises(ValueError, match="max_cache_len: expected None .* keep a state"):
        generate(hybrid.model, prompts([10])[0], cache_implementation="static")
