"""Models in which some layers have a sliding window: their cache stays transformers' own."""

import copy
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.cache_utils import DynamicSlidingWindowLayer  # noqa: E402

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import close, forward  # noqa: E402
from .tiny_models import generate, oracle, prompts  # noqa: E402

WINDOW = 8  # of the model's layers 2 and 3


@pytest.fixture(scope="module")
def plain():
    return FAMILIES["qwen2 sliding"].make()


@pytest.fixture(scope="module")
def mask(plain):
    return mask_for(inspect_structure(plain))


@pytest.fixture(scope="module")
def model(plain, mask):
    model = copy.deepcopy(plain)
    with leank.patch(model, mask):
        yield model


def test_layers_and_bytes(model, mask):
    cache, ids = leank.make_cache(model), prompts([200])[0]
    forward(model, ids, cache)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds[2:] == [DynamicSlidingWindowLayer] * 2 and cache.packed == cache.layers[:2]
    assert cache.is_sliding == [False, False, True, True]
    used, ours = (
        cache.memory(),
        leank.ChannelMask(mask.keep[:2], sink=mask.sink, recent=mask.recent),
    )
    assert used["total_bytes"] == ours.predict_memory([200])["total_bytes"]
    known = model._leank_patch.mask
    assert known.outside == (2, 3) and known.keep.shape == mask.keep.shape
    assert used["total_bytes"] == known.predict_memory([200])["total_bytes"]
    assert (known.ratio, known.empty_heads) == (ours.ratio, ours.empty_heads)


def test_mask_must_keep_their_channels(plain, mask):
    keep = mask.keep.copy()
    keep[3, 1, 8:] = False
    other = leank.ChannelMask(keep, sink=3, recent=5)
    message = "mask: expected every channel in layer 3, whose sliding window.*, got 75.0% of them"
    with pytest.raises(ValueError, match=message):
        leank.patch(plain, other)
    with pytest.raises(ValueError, match=message):
        leank.LeanKCache(other, config=plain.config)
    with pytest.raises(ValueError, match="mask: expected 4 layers, got 2"):
        leank.LeanKCache(leank.ChannelMask(keep[:2], sink=3, recent=5), config=plain.config)


def test_outside_must_be_the_windows(plain, mask):
    with pytest.raises(ValueError, match=r"mask: expected layers \[2, 3\] outside, .* got \[3\]"):
        leank.patch(plain, dataclasses.replace(mask, outside=(3,)))
    known = dataclasses.replace(mask, outside=(2, 3))
    with leank.patch(plain, known) as handle:
        assert handle.mask == known
    with pytest.raises(ValueError, match=r"config: expected the model's because layers \[2, 3\]"):
        leank.LeanKCache(known)


def test_cache_made_without_the_config_is_refused(model, mask):
    message = "layer 2: expected DynamicSlidingWindowLayer, got LeanKLayer"
    with pytest.raises(ValueError, match=message):
        generate(model, prompts([10])[0], past_key_values=leank.LeanKCache(mask))
    cache = leank.LeanKCache(mask, config=model.config)
    generate(model, prompts([10])[0], past_key_values=cache)
    assert cache.get_seq_length() == 21


def test_any_cut_equals_the_rule(plain, model, mask):
    ids, padding = prompts([50, 33])
    with torch.no_grad(), oracle(copy.deepcopy(plain), mask, 30) as dense:
        expected = dense(ids, attention_mask=padding).logits
    for cuts in ([36], [30, 31, 40], [7, 29, 45]):
        cache = leank.make_cache(model)
        cache.expect_prompt(30)
        parts = [
            forward(model, ids[:, start:stop], cache, padding[:, :stop])
            for start, stop in zip([0, *cuts], [*cuts, 50], strict=True)
        ]
        close(torch.cat(parts, 1)[padding == 1], expected[padding == 1])


def test_second_turn_on_a_copy(plain, model, mask):
    prefix = prompts([30])[0]
    cache = leank.make_cache(model)
    forward(model, prefix, cache)
    for seed in (5, 6):
        ids = torch.cat([prefix, prompts([15], seed=seed)[0]], 1)
        out = generate(model, ids, past_key_values=copy.deepcopy(cache))
        with oracle(copy.deepcopy(plain), mask, 30) as dense:
            expected = generate(dense, ids)
        assert torch.equal(out.sequences, expected.sequences)
    assert cache.get_seq_length() == 30


def test_crop(model):
    ids, more = prompts([30])[0], prompts([6], seed=2)[0]
    cache = leank.make_cache(model)
    forward(model, ids, cache)
    expected = forward(model, more, copy.deepcopy(cache))
    cache.crop(0)
    with pytest.raises(RuntimeError, match="a layer with a sliding window has dropped the tokens"):
        cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers} == {30}, "the cache is as it was"
    cache.activate_past_recording()
    forward(model, more.flip(1), cache)
    cache.crop(-6)
    close(forward(model, more, cache), expected)
    cache.crop(-1000)
    assert {layer.get_seq_length() for layer in cache.layers} == {0}
    forward(model, ids[:, :4], cache)
    cache.crop(-1)  # while the window has dropped nothing
    close(forward(model, ids[:, 3:5], cache), forward(model, ids[:, :5], fresh(model))[:, 3:])


def fresh(model):
    return leank.make_cache(model)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("n_past", [3, 30])
def test_forward_that_stopped_half_way(model, n_past, layer):
    """It is undone, unless a sliding window has moved on."""

    def stop(module, inputs):
        raise KeyboardInterrupt

    ids, more = prompts([n_past])[0], prompts([3], seed=2)[0]
    cache = fresh(model)
    forward(model, ids, cache)
    expected = forward(model, more, copy.deepcopy(cache))
    hook = model.model.layers[layer].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(model, more, cache)
    hook.remove()
    if n_past > WINDOW and layer == 3:
        with pytest.raises(RuntimeError, match=r"cache\.reset\(\) and feed everything again"):
            forward(model, more, cache)
        with pytest.raises(RuntimeError, match=r"cache\.reset\(\) and feed everything again"):
            cache.crop(0)
        cache.reset()
        forward(model, ids, cache)
    else:
        with pytest.raises(RuntimeError, match=r"cache\.crop\(0\) goes back"):
            forward(model, more, cache)
        cache.crop(0)
    close(forward(model, more, cache), expected)


@pytest.mark.parametrize("rows", [[2, 0, 0], [1]])
def test_rows(model, rows):
    ids, padding = prompts([30, 12, 25])
    more = prompts([4, 4, 4], seed=2)[0]
    padding = torch.cat([padding, torch.ones_like(more)], 1)
    cache = fresh(model)
    forward(model, ids, cache, padding[:, :30])
    expected = forward(model, more, copy.deepcopy(cache), padding)
    cache.batch_select_indices(torch.tensor(rows))
    close(forward(model, more[rows], cache, padding[rows]), expected[rows])
    np.testing.assert_array_equal(cache.packed[0].store.n_rows, len(rows))
