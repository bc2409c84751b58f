"""LeanKCache in plain forwards: the operations of transformers' caches."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import leank  # noqa: E402

from .hf_tools import close, filled, forward  # noqa: E402
from .tiny_models import (  # noqa: E402
    generate,
    oracle,
    prompts,
    pruned,
    tiny,
)

MIN = torch.finfo(torch.float32).min


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny(attn_implementation=request.param)
    with leank.patch(model, pruned()):
        yield model


# ------------------------------------------------------------------- any cut into calls is one


def test_any_cut_equals_the_rule(model):
    ids, mask = prompts([50, 33])
    with torch.no_grad(), oracle(tiny(), pruned(), 30) as dense:
        expected = dense(ids, attention_mask=mask).logits
    for cuts in (
        [],
        [36],
        [30],
        [30, 31, 32, 40],
        [7, 29, 30, 45],
        [1, 2, 36, 37, 38],
        list(range(1, 50)),
    ):
        cache = leank.make_cache(model)
        cache.expect_prompt(30)
        parts = [
            forward(model, ids[:, start:stop], cache, mask[:, :stop])
            for start, stop in zip([0, *cuts], [*cuts, 50], strict=True)
        ]
        out = torch.cat(parts, 1)
        close(out[mask == 1], expected[mask == 1])
        assert cache.get_seq_length() == 50


def test_right_and_middle_padding(model):
    """A later turn may pad at its end: those columns are no tokens of the row."""
    ids, mask = prompts([30, 12])
    gaps = torch.ones(2, 20, dtype=torch.long)
    gaps[0, 11:] = 0
    gaps[1, 3:9] = 0
    last = torch.ones(2, 4, dtype=torch.long)
    whole = torch.cat([mask, gaps, last], 1)
    ids = torch.cat([ids, prompts([24, 24], seed=2)[0]], 1)
    position = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), oracle(tiny(), pruned(), 30) as dense:
        expected = dense(ids, attention_mask=whole, position_ids=position).logits
    cache = leank.make_cache(model)
    out = []
    with torch.no_grad():
        for start, stop in ((0, 30), (30, 50), (50, 54)):
            out.append(
                model(
                    ids[:, start:stop],
                    attention_mask=whole[:, :stop],
                    position_ids=position[:, start:stop],
                    past_key_values=cache,
                ).logits
            )
    close(torch.cat(out, 1)[whole == 1], expected[whole == 1])
    assert [int(n) for n in cache.layers[0].store.lengths] == whole.sum(1).tolist()


# --------------------------------------------------------------------------- crop, copy, reset


def test_crop_takes_columns_back(model):
    cache, mask, more = filled(model)
    expected = forward(model, more, cache, mask)
    assert cache.get_seq_length() == 46
    cache.crop(0)
    assert cache.get_seq_length() == 46
    cache.crop(-6)
    assert cache.get_seq_length() == 40
    close(forward(model, more, cache, mask), expected)
    cache.crop(-3)
    close(forward(model, more[:, 3:], cache, mask), expected[:, 3:])
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or minus .* got 2"):
        cache.crop(2)
    assert cache.get_seq_length() == 46
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert cache.memory()["total_bytes"] == 0


def test_crop_to_nothing_makes_room_for_another_batch(model):
    cache, _, _ = filled(model)
    cache.crop(-40)
    ids, mask = prompts([20, 9])
    close(
        forward(model, ids, cache, mask)[mask == 1],
        forward(model, ids, leank.make_cache(model), mask)[mask == 1],
    )


def test_reset(model):
    cache, mask, more = filled(model)
    expected = forward(model, more, cache, mask)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.layers[0].is_initialized
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    ids, prompt_mask = prompts([40, 12, 25])
    forward(model, ids, cache, prompt_mask)
    close(forward(model, more, cache, mask), expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy])
def test_copies_share_pages_and_go_their_own_way(model, copier):
    cache, mask, more = filled(model)
    cache.note = ["kept"]
    twin = copier(cache)
    assert twin.note == ["kept"] and twin.note is not cache.note
    expected = forward(model, more, cache, mask)
    other = forward(model, more.flip(1), twin, mask)
    close(forward(model, more, filled(model)[0], mask), expected)
    close(forward(model, more.flip(1), filled(model)[0], mask), other)
    assert not torch.allclose(expected, other, atol=0.1)


def test_prefix_cache_in_generate(model):
    prefix, _ = prompts([30])
    cache = leank.make_cache(model)
    forward(model, prefix, cache)
    for seed in (5, 6):
        ids = torch.cat([prefix, prompts([15], seed=seed)[0]], 1)
        out = generate(model, ids, past_key_values=copy.deepcopy(cache))
        with oracle(tiny(), pruned(), 30) as dense:
            expected = generate(dense, ids)
        assert torch.equal(out.sequences, expected.sequences)
    assert cache.get_seq_length() == 30


# ------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([-1, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows(model, change, rows):
    cache, mask, more = filled(model)
    expected = forward(model, more, copy.deepcopy(cache), mask)
    change(cache)
    close(forward(model, more[rows], cache, mask[rows]), expected[rows])


def test_row_operations_on_an_empty_cache_do_nothing(model):
    cache = leank.make_cache(model)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-1)
    ids, _ = prompts([12])
    close(forward(model, ids, cache), forward(model, ids, leank.make_cache(model)))


# ---------------------------------------------------------------------------------- memory


def test_memory_is_what_the_mask_predicts(model):
    cache = leank.make_cache(model)
    assert set(cache.memory().values()) == {0}
    lengths = [640, 500]
    ids, mask = prompts(lengths)
    forward(model, ids, cache, mask)
    used, predicted = cache.memory(), pruned().predict_memory(lengths)
    for name in ("k_bytes", "v_bytes", "total_bytes", "n_pages", "n_twins"):
        assert used[name] == predicted[name], name
    dense = 2 * 3 * 2 * sum(lengths) * 16 * 4
    assert 0 < used["total_bytes"] < 0.8 * dense
    assert used["slab_bytes"] >= used["total_bytes"]
    cache.batch_repeat_interleave(3)
    assert cache.memory()["total_bytes"] == used["total_bytes"], "rows share pages"


def test_what_generate_and_exporters_read(model):
    cache = leank.make_cache(model)
    assert not cache.is_compileable and cache.is_croppable and len(cache) == 3
    assert cache.is_sliding == [False] * 3 and cache.batch_size == -1
    assert cache.get_max_length() == -1 and cache.get_mask_sizes(7, 0) == (7, 0)
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)
    assert not hasattr(cache, "to"), "accelerate would call it"
    with pytest.raises(TypeError, match="no dense K and V to iterate over"):
        iter(cache)
    with pytest.raises(TypeError, match="LeanKCache cannot be pickled"):
        pickle.dumps(cache)
