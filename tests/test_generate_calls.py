"""What else people ask of generate(): streams, processors, outputs, own loops, prefixes."""

import copy
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache, LogitsProcessor, StoppingCriteria  # noqa: E402
from transformers.generation.streamers import TextIteratorStreamer, TextStreamer  # noqa: E402

import leank  # noqa: E402

from .compare import assert_within_budget  # noqa: E402
from .hf_tools import cache_of, forward, word_tokenizer  # noqa: E402
from .tiny_models import (  # noqa: E402
    all_keeping,
    assert_same,
    generate,
    logits,
    oracle,
    prompts,
    pruned,
    tiny,
    wide,
)

LOOKUP = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def double(model):
    return wide(model)


# -------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("options", [{}, LOOKUP])
def test_text_streamer(model, options, capsys):
    ids, tokenizer = prompts([60])[0], word_tokenizer()
    with leank.patch(model, pruned()):
        expected = generate(model, ids).sequences
        streamer = TextStreamer(tokenizer)
        generate(model, ids, streamer=streamer, **options)
    assert capsys.readouterr().out.split() == tokenizer.decode(expected[0]).split()


@pytest.mark.parametrize("options", [{}, LOOKUP, {"do_sample": True}])
def test_text_iterator_streamer_from_a_thread(model, options):
    ids, tokenizer = prompts([60])[0], word_tokenizer()
    with leank.patch(model, pruned()):
        expected = generate(model, ids, **options).sequences[:, 60:]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
        torch.manual_seed(0)
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs=options | {"streamer": streamer}
        )
        thread.start()
        pieces = list(streamer)
        thread.join()
    assert len(pieces) > 5, "it came at once"
    assert "".join(pieces).split() == tokenizer.decode(expected[0]).split()


# ------------------------------------------------------------------------- processors, criteria


class Watch(LogitsProcessor):
    """Forbid the tokens that end in 7, and write down what it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores.index_fill(1, torch.arange(7, scores.shape[1], 10), -torch.inf)


class StopAt(StoppingCriteria):
    """Stop each row at the first token above a limit."""

    def __init__(self, limit):
        self.limit, self.n_calls = limit, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.n_calls += 1
        return input_ids[:, -1] > self.limit


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 3}])
def test_processors_and_criteria_are_untouched(model, options):
    ids, mask = prompts([60, 20])
    runs = []
    for keep in (None, all_keeping()):
        watch, stop = Watch(), StopAt(90)
        patched = {"logits_processor": [watch], "stopping_criteria": [stop], **options}
        if keep is None:
            out = generate(model, ids, mask, n=20, **patched)
        else:
            with leank.patch(model, keep):
                out = generate(model, ids, mask, n=20, **patched)
        runs.append((out.sequences, watch.seen, stop.n_calls))
    (sequences, seen, n_calls), (expected, expected_seen, expected_calls) = runs
    assert torch.equal(sequences, expected) and n_calls == expected_calls
    assert not (sequences[:, 60:] % 10 == 7).any()
    for (got_ids, got), (told_ids, told) in zip(seen, expected_seen, strict=True):
        assert torch.equal(got_ids, told_ids)
        torch.testing.assert_close(got, told, rtol=0, atol=2e-4)


def test_max_time(model):
    with leank.patch(model, pruned()):
        assert generate(model, prompts([40])[0], max_time=1e-9).sequences.shape == (1, 41)


def test_inference_mode(model):
    ids, mask = prompts([60, 20])
    more = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)
    with leank.patch(model, pruned()):
        expected = generate(model, ids, mask)
        with torch.inference_mode():
            out = generate(model, ids, mask)
            again = generate(model, out.sequences, more, past_key_values=out.past_key_values)
        told = generate(model, expected.sequences, more, past_key_values=expected.past_key_values)
    np.testing.assert_array_equal(logits(out), logits(expected))
    np.testing.assert_array_equal(logits(again), logits(told))


# -------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, LOOKUP])
@pytest.mark.parametrize("keeping", [True, False])
def test_scores_and_hidden_states(model, double, keeping, options):
    ids, rule = prompts([60])[0] % 11 + 3, all_keeping() if keeping else pruned()
    options = {"output_scores": True, "output_hidden_states": True, "top_k": 5} | options
    with oracle(model, rule, 60), oracle(double, rule, 60):
        plain, truth = (generate(m, ids, **options) for m in (model, double))
    with leank.patch(model, rule):
        out = generate(model, ids, **options)
    assert_same(out, truth, plain)
    assert len(out.scores) == len(truth.scores) == 12
    for got, told in zip(out.scores, truth.scores, strict=True):
        torch.testing.assert_close(got, told, rtol=0, atol=2e-4, check_dtype=False)
    assert len(out.hidden_states) == len(truth.hidden_states)
    for step, got in enumerate(out.hidden_states):
        for layer, states in enumerate(got):
            told, near = (x.hidden_states[step][layer].numpy() for x in (truth, plain))
            assert_within_budget(states.numpy(), told, near, "float32", f"step {step}, {layer}")


# ------------------------------------------------------------------------ decoding loops of users


def look_ahead(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Take, of the 3 likeliest next tokens, the one after which the model is surest.

    It does to a cache what contrastive search does: repeats rows, selects one, crops.
    """
    cache = cache_of(kwargs)
    logits = model(input_ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    steps = []
    while not stopping_criteria(input_ids, None).all():
        steps.append(logits)
        top = logits_processor(input_ids, logits).topk(3).indices[0]
        cache.batch_repeat_interleave(3)
        tried = model(top[:, None], past_key_values=cache).logits[:, -1]
        cache.crop(-1)
        best = tried.softmax(-1).amax(-1).argmax()
        cache.batch_select_indices(best[None])
        input_ids = torch.cat([input_ids, top[best][None, None]], 1)
        logits = model(input_ids[:, -1:], past_key_values=cache).logits[:, -1]
    return input_ids, torch.stack(steps)


def run(model, ids, **options):
    return model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("keeping", [True, False])
def test_custom_generate(model, double, keeping):
    ids, rule = prompts([60])[0], all_keeping() if keeping else pruned()
    options = {"custom_generate": look_ahead}
    with oracle(model, rule, 60), oracle(double, rule, 60):
        plain, truth = (run(m, ids, **options) for m in (model, double))
    with leank.patch(model, rule):
        out = run(model, ids, **options)
        # Whatever search the settings name: the loop is the user's.
        named = run(model, ids, penalty_alpha=0.6, top_k=4, **options)
    assert torch.equal(out[0], truth[0]) and torch.equal(named[0], truth[0])
    assert not torch.equal(out[0], run(model, ids))
    assert_within_budget(out[1].numpy(), truth[1].numpy(), plain[1].numpy(), "float32")


def test_custom_generate_without_the_cache(model):
    def forgetful(model, input_ids, **kwargs):
        return torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)

    with leank.patch(model, pruned()):
        with pytest.raises(RuntimeError, match="did not use the model's cache"):
            run(model, prompts([20])[0], custom_generate=forgetful)


def test_recipe_that_calls_generate_again(model, monkeypatch):
    """What transformers loads for a name replaces generate(), and calls it for its own loop."""

    def loop(model, input_ids, **kwargs):
        logits = model(input_ids, past_key_values=cache_of(kwargs)).logits
        return logits[:, -1].argmax(-1)

    def recipe(model, inputs, max_new_tokens, **kwargs):
        return model.generate(inputs, max_new_tokens=max_new_tokens, custom_generate=loop)

    monkeypatch.setattr(type(model), "load_custom_generate", lambda self, *args, **kwargs: recipe)
    ids = prompts([40])[0]
    with leank.patch(model, pruned()):
        expected = generate(model, ids, n=1).sequences[:, -1]
        assert torch.equal(run(model, ids, custom_generate="who/what"), expected)


# ------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("keeping", [True, False])
@pytest.mark.parametrize("beams", [False, True])
def test_many_answers_to_one_prefix(model, double, keeping, beams):
    """A prefix of one row, repeated for what generate() makes of a prompt."""
    prefix, more = prompts([60])[0], prompts([15], seed=2)[0]
    rule = all_keeping() if keeping else pruned()
    options = {"num_beams": 3} if beams else {"do_sample": True, "num_return_sequences": 3}

    def answers(model, cache):
        forward(model, prefix, cache)
        cache.batch_repeat_interleave(3)
        return generate(model, torch.cat([prefix, more], 1), past_key_values=cache, **options)

    with oracle(model, rule, 60), oracle(double, rule, 60):
        plain, truth = (answers(m, DynamicCache(config=m.config)) for m in (model, double))
    with leank.patch(model, rule):
        out = answers(model, leank.make_cache(model))
    assert_same(out, truth, plain)


def test_copies_of_a_prefix_share_its_bytes(model):
    """``slab_bytes`` is what all copies take together."""
    prefix = prompts([1000])[0]
    with leank.patch(model, pruned()):
        cache = leank.make_cache(model)
        forward(model, prefix, cache)
        alone = cache.memory()
        copies = [copy.deepcopy(cache) for _ in range(10)]
        assert all(other.memory() == alone for other in copies)
        for seed, other in enumerate(copies):
            ids = torch.cat([prefix, prompts([20], seed=seed)[0]], 1)
            generate(model, ids, past_key_values=other)
        both = {other.memory()["slab_bytes"] for other in (cache, *copies)}
        assert both == {cache.memory()["slab_bytes"]}
        assert alone["slab_bytes"] < min(both) < 3 * alone["slab_bytes"]
        del other, copies
        assert cache.memory() == alone | {"slab_bytes": cache.memory()["slab_bytes"]}
        assert cache.memory()["slab_bytes"] < 1.1 * alone["slab_bytes"]


# ---------------------------------------------------------------------------------- offloading


def test_offloading_is_what_a_cpu_model_does_anyway(model):
    ids, mask = prompts([60, 20])
    with leank.patch(model, pruned()):
        expected = generate(model, ids, mask)
        out = generate(model, ids, mask, cache_implementation="offloaded")
        assert isinstance(out.past_key_values, leank.LeanKCache)
        np.testing.assert_array_equal(logits(out), logits(expected))
        cache, before = out.past_key_values, out.past_key_values.memory()
        for layer in range(3):
            cache.offload(layer)
            cache.prefetch(layer, only_non_sliding=False)
            cache.layers[layer].offload()
        assert cache.memory() == before
        with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
            generate(model, ids, mask, past_key_values=cache, cache_implementation="offloaded")
