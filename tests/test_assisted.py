"""Assisted generation on a patched model: greedy token for token, whoever drafts."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402

from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import close, forward, word_tokenizer  # noqa: E402
from .tiny_models import (  # noqa: E402
    VOCAB,
    all_keeping,
    assert_same,
    generate,
    oracle,
    prompts,
    pruned,
    tiny,
    wide,
)

N_NEW = 70
# Drafts of 100 tokens are more than slack, and pass the end of a page.
LOOKUPS = [3, 100]


def lookup(n):
    return {"prompt_lookup_num_tokens": n, "max_matching_ngram_size": 1}


def repetitive():
    """Return 90 ids with a few different ones: something to look up, much of which is wrong."""
    return prompts([90])[0] % 11 + 3


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def double(model):
    return wide(model)


@pytest.fixture(scope="module")
def draft():
    """Another model: nearly all that it drafts is rejected."""
    return tiny("qwen2", seed=3)


@pytest.fixture
def drafts(monkeypatch):
    """Return how many tokens each crop of a LeanKCache took back."""
    seen = []
    original = leank.LeanKCache.crop

    def crop(self, tokens_to_remove):
        seen.append(-tokens_to_remove)
        original(self, tokens_to_remove)

    monkeypatch.setattr(leank.LeanKCache, "crop", crop)
    return seen


# -------------------------------------------------------------------------------- prompt lookup


@pytest.mark.parametrize("keeping", [True, False])
@pytest.mark.parametrize("n_draft", LOOKUPS)
def test_prompt_lookup_equals_greedy(model, double, n_draft, keeping, drafts):
    ids, mask = repetitive(), all_keeping() if keeping else pruned()
    with oracle(model, mask, 90), oracle(double, mask, 90):
        plain, truth = (generate(m, ids, n=N_NEW) for m in (model, double))
    with leank.patch(model, mask, slack=0):
        greedy = generate(model, ids, n=N_NEW)
        out = generate(model, ids, n=N_NEW, **lookup(n_draft))
    assert_same(out, truth, plain)
    assert max(drafts) > 0.6 * min(n_draft, N_NEW), "nothing was taken back"
    assert torch.equal(greedy.sequences, out.sequences)


def test_models_with_sliding_layers():
    model = FAMILIES["qwen2 sliding"].make()
    mask = mask_for(leank.models.inspect_structure(model))
    ids = repetitive()
    with leank.patch(model, mask, slack=0):
        greedy = generate(model, ids, n=N_NEW)
        out = generate(model, ids, n=N_NEW, **lookup(20))
        assert torch.equal(greedy.sequences, out.sequences)
        again = [
            generate(
                model, torch.cat([x.sequences, ids[:, :9]], 1), past_key_values=x.past_key_values
            )
            for x in (greedy, out)
        ]
    assert torch.equal(again[0].sequences, again[1].sequences)


def test_sampling_with_lookup_is_seeded(model):
    ids, options = repetitive(), {"do_sample": True, "top_k": 20, **lookup(4)}
    dense = generate(model, ids, n=30, **options)
    with leank.patch(model, all_keeping()):
        out = generate(model, ids, n=30, **options)
        again = generate(model, ids, n=30, **options)
    assert torch.equal(out.sequences, again.sequences)
    assert torch.equal(out.sequences, dense.sequences)


# -------------------------------------------------------------------------------- a draft model


@pytest.mark.parametrize("keeping", [True, False])
@pytest.mark.parametrize("who", ["dense", "patched", "itself"])
def test_draft_model_equals_greedy(model, double, draft, who, keeping, drafts):
    ids, mask = repetitive(), all_keeping() if keeping else pruned()
    with oracle(model, mask, 90), oracle(double, mask, 90):
        plain, truth = (generate(m, ids, n=30) for m in (model, double))
    draft = model if who == "itself" else copy.deepcopy(draft)
    with leank.patch(model, mask, slack=0):
        if who == "patched":
            leank.patch(draft, pruned(), slack=0)
        out = generate(model, ids, n=30, assistant_model=draft)
    assert_same(out, truth, plain)
    assert (max(drafts) == 0) == (who == "itself"), "only its own drafts are all taken"


def test_patched_draft_equals_the_rule(model, draft, monkeypatch):
    """Also what it drafts after long drafts that were rejected, which passed the end of a page."""
    draft = copy.deepcopy(draft)
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 60, "constant"
    config.assistant_confidence_threshold = 0
    seen = []
    original = type(draft).generate

    def watched(self, input_ids=None, **options):
        out = original(self, input_ids, **options)
        seen.append((out.sequences, torch.stack(out.scores, 1)))
        return out

    monkeypatch.setattr(type(draft), "generate", watched)
    # In the first page: transformers feeds the last token of the prompt again, which is dense.
    ids = repetitive()[:, :60]
    with leank.patch(draft, pruned(), slack=0):
        model.generate(ids, max_new_tokens=65, do_sample=False, assistant_model=draft)
    assert len(seen) > 10 and seen[0][1].shape[1] == 60
    for ids, scores in seen:
        with torch.no_grad(), oracle(draft, pruned(), 60):
            expected = draft(ids).logits[:, -scores.shape[1] - 1 : -1]
        close(scores, expected)


@pytest.mark.parametrize("patched_draft", [False, True])
def test_sampling_with_a_draft_model_is_seeded(model, draft, patched_draft):
    ids = repetitive()
    draft = copy.deepcopy(draft)
    options = {"do_sample": True, "top_k": 20, "assistant_model": draft}
    dense = generate(model, ids, n=20, **options)
    with leank.patch(model, all_keeping()):
        if patched_draft:
            leank.patch(draft, all_keeping())
        out = generate(model, ids, n=20, **options)
    assert torch.equal(out.sequences, dense.sequences)


@pytest.mark.parametrize("patched_draft", [False, True])
def test_draft_model_with_another_tokenizer(model, patched_draft):
    ids = repetitive()
    draft = tiny("qwen2", seed=3, vocab_size=VOCAB + 4)
    with leank.patch(model, pruned()):
        greedy = generate(model, ids, n=20)
        if patched_draft:
            leank.patch(draft, pruned())
        out = generate(
            model,
            ids,
            n=20,
            assistant_model=draft,
            tokenizer=word_tokenizer(),
            assistant_tokenizer=word_tokenizer(shift=40),
        )
    assert torch.equal(greedy.sequences, out.sequences)


# ------------------------------------------------------------------- the cache before and after


def test_cache_after_assisted_generation_is_that_of_greedy(model):
    """Pitfall: what was recorded for crops stays, and a later plain generate never prunes."""
    ids = repetitive()
    with leank.patch(model, pruned()):
        caches = [
            generate(model, ids, n=300, **options).past_key_values for options in ({}, lookup(100))
        ]
        for cache in caches:
            assert not cache.is_recording_past(0)
        used, expected = (cache.memory() for cache in reversed(caches))
        for name in ("n_pages", "n_twins", "total_bytes"):
            assert used[name] == expected[name]
        more = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(4))
        close(forward(model, more, caches[1]), forward(model, more, caches[0]))


def test_recording_that_a_user_began_ends_with_generate(model):
    ids = repetitive()
    with leank.patch(model, pruned()):
        cache = leank.make_cache(model)
        cache.activate_past_recording()
        generate(model, ids, n=200, past_key_values=cache)
        assert not cache.is_recording_past(0)
        plain = generate(model, ids, n=200).past_key_values
        assert cache.memory()["n_twins"] == plain.memory()["n_twins"]


@pytest.mark.parametrize("recording", [True, False])
def test_crop_beyond_slack(model, recording):
    """It is as if the columns had never been, if the past was recorded, and else says nothing."""
    ids = prompts([400])[0]
    mask, start, back = pruned(), 100, 110
    with torch.no_grad(), oracle(tiny(), mask, start) as dense:
        expected = dense(torch.cat([ids[:, :back], ids[:, 300:]], 1)).logits[:, back:]
    with leank.patch(model, mask, slack=0):
        cache = leank.make_cache(model)
        forward(model, ids[:, :start], cache)
        if recording:
            cache.activate_past_recording()
            cache.activate_past_recording()  # no new beginning
        twins = cache.memory()["n_twins"]
        forward(model, ids[:, start:back], cache)
        forward(model, ids[:, back:300], cache)
        assert (cache.memory()["n_twins"] > twins) == recording
        copied = copy.deepcopy(cache)
        cache.crop(back - 300)
        out = forward(model, ids[:, 300:], cache)
        if recording:
            close(out, expected)
            copied.crop(back - 300)
            close(forward(model, ids[:, 300:], copied), expected)
            copied.stop_past_recording()
            assert copied.memory()["n_twins"] == twins
        else:
            assert not torch.allclose(out, expected, atol=0.05)


def test_recording_is_for_what_follows_the_prompt(model):
    """The prompt's own dropped channels go as without it, or recording would cost a dense cache."""
    with leank.patch(model, pruned()):
        counts = []
        for recording in (False, True):
            cache = leank.make_cache(model)
            if recording:
                cache.activate_past_recording()
            forward(model, prompts([500])[0], cache)
            counts.append(cache.memory()["n_twins"])
    assert counts[0] == counts[1]


def test_forward_that_stopped_while_recording_is_undone(model):
    def stop(module, inputs):
        raise KeyboardInterrupt

    ids = prompts([400])[0]
    with leank.patch(model, pruned(), slack=0):
        cache = leank.make_cache(model)
        forward(model, ids[:, :100], cache)
        expected = forward(model, ids[:, 100:], copy.deepcopy(cache))
        cache.activate_past_recording()
        hook = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            forward(model, ids[:, 100:], cache)
        hook.remove()
        cache.crop(0)
        close(forward(model, ids[:, 100:], cache), expected)


def test_second_turn(model):
    """Assisted generation goes on from a cache if it is given the new ids alone."""
    ids = repetitive()
    with leank.patch(model, pruned()):
        first = generate(model, ids, n=5)
        cache = first.past_key_values
        more = torch.cat([first.sequences, ids[:, :20]], 1)
        greedy = generate(model, more, past_key_values=copy.deepcopy(cache), n=30)
        n_past = cache.get_seq_length()
        for given, mask in ((more, None), (more, torch.ones_like(more)), (more[:, n_past:], None)):
            with pytest.raises(ValueError, match="input_ids: expected only those after the 94 col"):
                generate(model, given, mask, past_key_values=cache, **lookup(5))
        assert cache.get_seq_length() == n_past
        out = generate(
            model,
            more[:, n_past:],
            torch.ones_like(more),
            past_key_values=cache,
            n=30,
            **lookup(5),
        )
    np.testing.assert_array_equal(out.sequences, greedy.sequences[:, n_past:])


def test_batches_are_refused_by_transformers(model):
    ids, mask = prompts([20, 20])
    with leank.patch(model, pruned()):
        with pytest.raises(ValueError, match="only supported for batch_size = 1"):
            generate(model, ids, mask, **lookup(3))
