"""A LeanKCache of fixed length, not compiled: as one that grows, but reserved and limited."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402
from leank.static_layer import PIECE, LeanKStaticLayer  # noqa: E402

from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import close, forward  # noqa: E402
from .test_generate import CASES, case  # noqa: E402
from .tiny_models import (  # noqa: E402
    VOCAB,
    assert_same,
    generate,
    logits,
    oracle,
    prompts,
    pruned,
    tiny,
    wide,
)

STATIC = {"cache_implementation": "static"}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny(attn_implementation=request.param)
    with leank.patch(model, pruned()):
        yield model


def ids_of(n_rows, n_columns, seed=7):
    return torch.randint(
        3, VOCAB, (n_rows, n_columns), generator=torch.Generator().manual_seed(seed)
    )


def both(model, max_cache_len, lengths=(40, 12, 25)):
    """Return a growing and a static cache with the same padded prompt, and its mask."""
    ids, mask = prompts(list(lengths))
    caches = leank.make_cache(model), leank.make_cache(model, max_cache_len=max_cache_len)
    for cache in caches:
        forward(model, ids, cache, mask)
    return *caches, mask


def stored(cache):
    """What the store of each pruned layer holds: lengths, and K and V of all rows."""
    stores = [layer.store for layer in cache.packed]
    return [
        [store.lengths, *(x for row in range(store.n_rows) for x in store.gather(row))]
        for store in stores
    ]


def assert_stored(cache, expected, atol=0):
    for layer, other in zip(stored(cache), expected, strict=True):
        for x, y in zip(layer, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("name", CASES)
def test_generate_equals_the_rule(name):
    model = tiny()
    double = wide(model)
    ids, mask, options = case(name)
    n_columns = ids.shape[1]
    with oracle(model, pruned(), n_columns), oracle(double, pruned(), n_columns):
        plain, truth = (generate(m, ids, mask, **options) for m in (model, double))
    with leank.patch(model, pruned()):
        out = generate(model, ids, mask, **STATIC, **options)
    cache = out.past_key_values
    assert isinstance(cache, leank.LeanKCache) and cache.is_compileable
    assert all(type(layer) is LeanKStaticLayer for layer in cache.layers)
    assert_same(out, truth, plain, name)


def test_length_is_what_generate_needs_or_what_it_is_told_or_had():
    model = tiny()
    ids, _ = prompts([30])
    with leank.patch(model, pruned()) as handle:
        lengths = [
            generate(model, ids, n=n, **STATIC, **more).past_key_values.get_max_length()
            for n, more in ((5, {}), (5, {"max_cache_len": 70}), (3, {}), (90, {}))
        ]
        assert lengths[0] in (34, 35) and lengths[1:3] == [70, 70] and lengths[3] in (119, 120)
        assert handle.make_cache().get_max_length() == -1


def test_own_cache_and_second_turn(model):
    ids, mask = prompts([40, 12])
    new = torch.ones(2, 105, dtype=torch.long)
    results = []
    for cache in (leank.make_cache(model), leank.make_cache(model, max_cache_len=200)):
        out = generate(model, ids, mask, 5, past_key_values=cache)
        more = torch.cat([out.sequences, ids_of(2, 100)], 1)
        again = generate(model, more, torch.cat([mask, new], 1), past_key_values=cache)
        results.append(again)
    assert torch.equal(results[0].sequences, results[1].sequences)
    np.testing.assert_allclose(logits(results[0]), logits(results[1]), atol=2e-4)


# ------------------------------------------------------------------------------ operations


def test_reserved_once(model):
    cache = leank.make_cache(model, max_cache_len=700)
    assert cache.get_max_length() == 700 and cache.get_mask_sizes(3, 0) == (700, 0)
    ids, mask = prompts([400, 150])
    forward(model, ids, cache, mask)
    first = cache.memory()
    assert first == first | pruned().predict_memory([1, 1], max_tokens=700, max_call=PIECE)
    mask = torch.cat([mask, torch.ones(2, 300, dtype=torch.long)], 1)
    forward(model, ids_of(2, 300), cache, mask)
    assert cache.get_seq_length() == 700 and cache.memory() == first
    stores = [layer.store for layer in cache.packed]
    cache.reset()
    forward(model, ids[:, -20:], cache)
    assert [layer.store for layer in cache.packed] == stores and cache.memory() == first


def test_reset_and_another_batch(model):
    cache = both(model, 100)[1]
    for lengths in ([33, 20, 5], [9], [50, 60]):
        cache.reset()
        assert cache.get_seq_length() == 0
        ids, mask = prompts(lengths)
        out = generate(model, ids, mask, past_key_values=cache)
        expected = generate(model, ids, mask)
        assert torch.equal(out.sequences, expected.sequences)
        np.testing.assert_allclose(logits(out), logits(expected), atol=2e-4)


@pytest.mark.parametrize("n_columns", [1, 6, 2 * PIECE + 5])
def test_calls_of_any_length(model, n_columns):
    """Longer calls than the reservation foresees come in pieces, with padding too."""
    grown, static, mask = both(model, 300)
    ids = ids_of(3, n_columns)
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    mask[1, 40 : 40 + n_columns // 2] = 0
    real = mask[:, 40:] == 1
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, 40:]
    with torch.no_grad():
        out, expected = (
            model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits
            for cache in (static, grown)
        )
    close(out[real], expected[real])
    assert_stored(static, stored(grown))


def test_crop_rows_and_copies(model):
    grown, static, mask = both(model, 100)
    ids = ids_of(6, 4)
    mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    for cache in (grown, static):
        forward(model, ids[:3], cache, mask)
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([5, 0, 0, 2, 1, 4]))
    assert static.get_seq_length() == 41
    twin = copy.deepcopy(static)
    rows = mask.repeat_interleave(2, 0)[[5, 0, 0, 2, 1, 4]][:, :43]
    expected = forward(model, ids[:, :2], grown, rows)
    close(forward(model, ids[:, :2], static, rows), expected)
    assert twin.get_seq_length() == 41 and twin.memory() == static.memory()
    close(forward(model, ids[:, :2], twin, rows), expected)
    for cache in (grown, twin):
        cache.crop(-1000)
        assert cache.get_seq_length() == 0


# --------------------------------------------------------------------------------- refusals


def test_drafts_need_a_cache_that_grows(model):
    """And the cache stays as it was."""
    cache, ids = leank.make_cache(model, max_cache_len=80), ids_of(1, 40)
    with pytest.raises(ValueError, match="max_cache_len: expected a cache that grows"):
        generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=3)
    # Up to 5.23 transformers refuses it first.
    message = "not supported with Static cache|max_cache_len: expected a cache that grows"
    with pytest.raises(ValueError, match=message):
        generate(model, ids, prompt_lookup_num_tokens=3, **STATIC)
    assert cache.get_seq_length() == 0
    outs = [generate(model, ids, **given).sequences for given in ({"past_key_values": cache}, {})]
    assert torch.equal(*outs)


def test_past_the_length(model):
    _, cache, mask = both(model, 44)
    before = stored(cache)
    message = "max_cache_len: expected at least 45, the columns .* the 5 of this call, got 44"
    mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    with pytest.raises(ValueError, match=message):
        forward(model, ids_of(3, 5), cache, mask)
    assert_stored(cache, before)
    forward(model, ids_of(3, 4), cache, mask[:, :44])
    cache.reset()
    with pytest.raises(ValueError, match="max_cache_len: expected at least 45"):
        forward(model, ids_of(3, 45), cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="max_cache_len: expected at least 45"):
        generate(model, ids_of(1, 40), past_key_values=cache)


def test_row_without_a_token_in_a_long_call(model):
    """Its prompt would be cut, so the call is refused."""
    grown, static, mask = both(model, 300, [40, 0])
    ids = ids_of(2, PIECE + 1)
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    with pytest.raises(ValueError, match="k: expected at most 64 columns because row 1 .* got 65"):
        forward(model, ids, static, mask)
    assert static.get_seq_length() == 40
    out, expected = (forward(model, ids[:, :60], x, mask[:, :100]) for x in (static, grown))
    close(out, expected)


def test_mask_of_columns_to_come(model):
    grown, cache, _ = both(model, 60, [40, 40, 40])
    ids = ids_of(3, 2)
    mask = torch.ones(60, 60, dtype=torch.bool).tril()[40:42].expand(3, 1, 2, 60).clone()
    close(forward(model, ids, copy.deepcopy(cache), mask), forward(model, ids, grown))
    mask[2, 0, 1, 50] = True
    with pytest.raises(ValueError, match="attention_mask: .* columns that are still to come"):
        forward(model, ids, cache, mask)
    assert cache.get_seq_length() == 40


def test_arguments(model):
    with pytest.raises(ValueError, match="max_cache_len: expected an int of at least 1, got 0"):
        leank.make_cache(model, max_cache_len=0)
    for wrong in (8.5, True):
        with pytest.raises(TypeError, match="max_cache_len: expected an int, got"):
            leank.make_cache(model, max_cache_len=wrong)


def test_cache_of_another_window(model):
    cache = leank.LeanKCache(pruned(), sink=4, max_cache_len=50)
    with pytest.raises(ValueError, match="past_key_values: .* sink: expected 3, got 4"):
        generate(model, ids_of(1, 10), past_key_values=cache)


# ------------------------------------------------------------------- layers with sliding windows


def test_sliding_layers():
    model = FAMILIES["qwen2 sliding"].make()
    double = wide(model)
    mask = mask_for(inspect_structure(model))
    ids, padding = prompts([40, 12])
    with oracle(model, mask, 40), oracle(double, mask, 40):
        plain, truth = (generate(m, ids, padding) for m in (model, double))
    with leank.patch(model, mask):
        out = generate(model, ids, padding, **STATIC)
        cache = out.past_key_values
        assert_same(out, truth, plain)
        assert cache.is_sliding == [False, False, True, True] and len(cache.packed) == 2
        before = stored(cache)
        with pytest.raises(RuntimeError, match="sliding window has dropped .* no max_cache_len"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="max_cache_len: expected at least"):
            forward(model, ids_of(2, 5), cache)
        assert_stored(cache, before)
        cache.reset()
        again = generate(model, ids, padding, past_key_values=cache)
        assert torch.equal(again.sequences, out.sequences)
