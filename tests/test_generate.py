"""generate() on a patched model: against the dense model, and against the rule on dense K and V."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

import leank  # noqa: E402

from .compare import assert_within_budget  # noqa: E402
from .families import FAMILIES as OTHER_FAMILIES  # noqa: E402
from .tiny_models import (  # noqa: E402
    FAMILIES,
    RECENT,
    SINK,
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

# Lengths of the rows' prompts, then what generate() is told.
CASES = {
    "greedy": ([90], {}),
    "sampling": ([90], {"do_sample": True, "temperature": 0.7, "top_k": 20}),
    "returned": ([30], {"num_return_sequences": 3, "do_sample": True}),
    "padded": ([90, 23, 1], {}),
    "padded sampling": ([40, 70], {"do_sample": True}),
    "chunks": ([90], {"prefill_chunk_size": 13}),
    "chunks of one": ([9], {"prefill_chunk_size": 1}),
    "padded chunks": ([90, 23, 1], {"prefill_chunk_size": 17}),
    "beams": ([50, 20], {"num_beams": 3}),
    "short": ([2, 1], {}),
}


def case(name):
    lengths, options = CASES[name]
    ids, mask = prompts(lengths)
    return ids, (mask if len(set(lengths)) > 1 else None), options


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    model = tiny(request.param)
    return model, wide(model)


@pytest.mark.parametrize("name", CASES)
def test_all_keeping_mask_equals_dense(models, name):
    model, double = models
    ids, mask, options = case(name)
    plain, truth = (generate(m, ids, mask, **options) for m in (model, double))
    with leank.patch(model, all_keeping()):
        out = generate(model, ids, mask, **options)
    assert isinstance(out.past_key_values, leank.LeanKCache)
    assert_same(out, truth, plain, name)


@pytest.mark.parametrize("name", CASES)
def test_pruned_equals_the_rule(models, name):
    model, double = models
    ids, mask, options = case(name)
    n_columns = ids.shape[1]
    with oracle(model, pruned(), n_columns), oracle(double, pruned(), n_columns):
        plain, truth = (generate(m, ids, mask, **options) for m in (model, double))
    with leank.patch(model, pruned()):
        out = generate(model, ids, mask, **options)
    assert_same(out, truth, plain, name)
    dense = generate(model, ids, mask, **options)
    if n_columns > SINK + RECENT:
        assert not np.allclose(logits(out)[1:], logits(dense)[1:], atol=0.05), (
            "the mask did nothing"
        )


def test_eager_base():
    model = tiny(attn_implementation="eager")
    double = wide(model)
    ids, mask = prompts([60, 20])
    with oracle(model, pruned(), 60), oracle(double, pruned(), 60):
        plain, truth = (generate(m, ids, mask) for m in (model, double))
    with leank.patch(model, pruned()):
        assert model.config._attn_implementation == "leank_eager"
        out = generate(model, ids, mask, prefill_chunk_size=25)
    assert_same(out, truth, plain)


def test_row_of_a_padded_batch_equals_the_row_alone(models):
    model, _ = models
    lengths = [90, 41, 7]
    ids, mask = prompts(lengths)
    with leank.patch(model, pruned()):
        batch = generate(model, ids, mask)
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, -length:])
            np.testing.assert_array_equal(alone.sequences[0, length:], batch.sequences[row, 90:])
            np.testing.assert_allclose(logits(batch)[:, row], logits(alone)[:, 0], atol=2e-4)


def test_inputs_embeds(models):
    model, double = models
    ids, mask = prompts([50, 20])
    with oracle(double, pruned(), 50):
        truth = generate(double, ids, mask)
    embeds = model.get_input_embeddings()(ids).detach()
    with leank.patch(model, pruned()):
        plain = generate(model, ids, mask)
        out = generate(model, None, mask, inputs_embeds=embeds)
    np.testing.assert_array_equal(out.sequences, truth.sequences[:, 50:])
    assert_within_budget(logits(out), logits(truth), logits(plain), "float32")


def test_pruned_prefill_depends_on_the_chunks():
    model = tiny()
    ids, _ = prompts([60])
    with oracle(model, pruned(), 20):
        expected = generate(model, ids, prefill_chunk_size=20)
    with leank.patch(model, pruned(), prefill="pruned"):
        out = generate(model, ids, prefill_chunk_size=20)
        whole = generate(model, ids)
    with leank.patch(model, pruned()):
        dense_prompt = generate(model, ids, prefill_chunk_size=20)
    np.testing.assert_allclose(logits(out), logits(expected), atol=2e-4)
    np.testing.assert_allclose(logits(whole), logits(dense_prompt), atol=2e-4)
    assert not np.allclose(logits(out), logits(dense_prompt), atol=0.05)


# ------------------------------------------------------------------------------- several turns


def turns(model, first, second, **options):
    """Two turns on one cache; the ids and masks of the second turn hold everything so far."""
    (ids, mask), (more_ids, more_mask) = first, second
    out = generate(model, ids, mask, 5, **options)
    new = torch.ones(len(ids), 5, dtype=torch.long)
    # The last token was sampled but not fed: it comes with the second turn.
    ids = torch.cat([out.sequences, more_ids], 1)
    mask = torch.cat([mask, new, more_mask], 1)
    return out, generate(model, ids, mask, past_key_values=out.past_key_values, **options)


SECOND = {
    "even": ([30, 30], [20, 20], None),
    "padded first": ([30, 12], [20, 20], None),
    "ragged second": ([30, 12], [6, 20], None),
    "in chunks": ([30, 12], [6, 20], 7),
    "empty at first": ([30, 0], [6, 20], None),
}


@pytest.mark.parametrize("keeping", [True, False])
@pytest.mark.parametrize("name", SECOND)
def test_second_turn(models, name, keeping):
    model, double = models
    lengths, more, chunk = SECOND[name]
    first, second = prompts(lengths), prompts(more, seed=2)
    mask = all_keeping() if keeping else pruned()
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    if lengths[1] == 0:
        # Row 1 begins with what generate() feeds it: one sampled token, its whole prompt.
        rule = {"n0": [30, 1]}
    else:
        rule = {"prompt_columns": 30}
    with oracle(model, mask, **rule), oracle(double, mask, **rule):
        plain, truth = (turns(m, first, second, **options) for m in (model, double))
    with leank.patch(model, mask):
        out = turns(model, first, second, **options)
    for turn in range(2):
        if lengths[1] == 0 and turn == 0:
            continue  # what a row without a token answers is nobody's business
        assert_same(out[turn], truth[turn], plain[turn], f"{name}, turn {turn}")


def test_only_new_ids_in_the_second_turn():
    model = tiny()
    ids, _ = prompts([30])
    with leank.patch(model, pruned()):
        out = generate(model, ids, n=5)
        fed = copy.deepcopy(out.past_key_values)
        more = torch.cat([out.sequences, prompts([9], seed=2)[0]], 1)
        whole = generate(model, more, past_key_values=out.past_key_values)
        part = generate(model, more[:, 34:], torch.ones_like(more), past_key_values=fed)
    np.testing.assert_array_equal(logits(whole), logits(part))


def test_padded_cache_needs_its_mask():
    model = tiny()
    ids, mask = prompts([30, 12])
    with leank.patch(model, pruned()):
        out = generate(model, ids, mask, 5)
        with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 35\)"):
            ones = torch.ones_like(out.sequences)
            generate(model, out.sequences, ones, past_key_values=out.past_key_values)
        wrong = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        wrong[1, 17] = 0  # a padding column that was a token when it was stored
        wrong[1, 19] = 0
        with pytest.raises(
            ValueError, match="attention_mask: expected the padding .* row 1, column 19"
        ):
            generate(model, out.sequences, wrong, past_key_values=out.past_key_values)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes(models, dtype, base):
    """Fed the same tokens, since two half precision runs soon choose different ones."""
    model = copy.deepcopy(models[0]).to(dtype)
    model.set_attn_implementation(base)
    double = wide(model)
    n = 12
    ids, mask = prompts([90 + n, 23 + n])
    with torch.no_grad(), oracle(model, pruned(), 90), oracle(double, pruned(), 90):
        plain, truth = (m(ids, attention_mask=mask).logits[:, 89:] for m in (model, double))
    with torch.no_grad(), leank.patch(model, pruned()):
        cache = leank.make_cache(model)
        out = [
            model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits[:, -1]
            for a, b in [(0, 90), *((i, i + 1) for i in range(90, 90 + n))]
        ]
        dense = model(ids, attention_mask=mask).logits[:, 89:]
    name = str(dtype).removeprefix("torch.")
    assert cache.layers[0].store.dtype == name
    out, plain, truth, dense = (
        x.float().numpy() if x.dtype == dtype else x.numpy()
        for x in (torch.stack(out, 1), plain, truth, dense)
    )
    assert_within_budget(out, truth, plain, name)
    assert np.abs(dense - truth).max() > 4 * np.abs(out - truth).max(), "the mask did nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_in_generate(dtype):
    model = tiny(dtype=dtype)
    double = wide(model)
    ids, mask = prompts([60, 20])
    with oracle(model, pruned(), 60), oracle(double, pruned(), 60):
        plain, truth = (generate(m, ids, mask, 1) for m in (model, double))
    with leank.patch(model, pruned()):
        out = generate(model, ids, mask, prefill_chunk_size=25, n=1)
    name = str(dtype).removeprefix("torch.")
    assert_within_budget(logits(out), logits(truth), logits(plain), name)


# ------------------------------------------------------------------------- past the context


def test_past_the_context_a_model_goes_on_as_it_would():
    model = tiny(max_position_embeddings=64)
    double, ids = wide(model), prompts([60])[0]
    plain, truth = (generate(m, ids, n=70) for m in (model, double))
    with leank.patch(model, all_keeping()):
        assert_same(generate(model, ids, n=70), truth, plain)
    with oracle(model, pruned(), 60), oracle(double, pruned(), 60):
        plain, truth = (generate(m, ids, n=70) for m in (model, double))
    with leank.patch(model, pruned()):
        assert_same(generate(model, ids, n=70), truth, plain)


def test_past_the_context_embedded_positions_raise_as_they_would():
    """After it the cache has the tokens that fit, and the next call is as good as the first."""
    model = OTHER_FAMILIES["gpt2"].make(max_position_embeddings=64)
    ids, step = prompts([60])[0], torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(IndexError):
        generate(model, ids, n=9)
    mask = leank.ChannelMask.dense(3, 4, 16, sink=SINK, recent=RECENT)
    plain = generate(model, ids, n=4).sequences
    with leank.patch(model, mask):
        cache = leank.make_cache(model)
        model(ids, past_key_values=cache)
        model(ids[:, :4], past_key_values=cache)
        before = cache.memory()
        with pytest.raises(IndexError):
            model(step, past_key_values=cache)
        assert cache.get_seq_length() == 64 and cache.memory() == before
        with pytest.raises(IndexError):
            generate(model, ids, n=9)
        assert torch.equal(generate(model, ids, n=4).sequences, plain)


# ------------------------------------------------------------------------- a pretrained model


@pytest.fixture(scope="module")
def smollm2():
    """Return SmolLM2-135M-Instruct and a prompt that is longer than its mask's window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from leank.smollm2 import model_path

    try:
        path = model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    shelves = " ".join(f"Shelf {i} holds {i * 7 % 10} boxes of tea." for i in range(57))
    text = f"{shelves}\nIn which order would you carry all of these boxes to the kitchen?"
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    assert 600 < ids.shape[1] < 760
    yield AutoModelForCausalLM.from_pretrained(path).eval(), ids
    torch.set_num_threads(before)


def steps(model, ids, n, cache):
    """Logits of the last n + 1 tokens: one prefill, then token by token, as generate() calls it."""
    with torch.no_grad():
        out = [model(ids[:, :-n], past_key_values=cache, logits_to_keep=1).logits]
        for i in range(n, 0, -1):
            out.append(model(ids[:, ids.shape[1] - i :][:, :1], past_key_values=cache).logits)
    return torch.cat(out, 1).float().numpy()


@pytest.mark.model
def test_all_keeping_mask_equals_dense_smollm2(smollm2):
    model, ids = smollm2
    mask = leank.ChannelMask.dense(30, 3, 64, sink=64, recent=512)
    plain = generate(model, ids, n=64, min_new_tokens=64)
    with leank.patch(model, mask):
        out = generate(model, ids, n=64, min_new_tokens=64)
    assert out.sequences.shape[1] == ids.shape[1] + 64
    np.testing.assert_array_equal(out.sequences, plain.sequences)
    with torch.no_grad():
        truth = wide(model)(out.sequences[:, :-1], logits_to_keep=64).logits
    truth = truth.transpose(0, 1).numpy()
    assert_within_budget(logits(out), truth, logits(plain), "float32")


@pytest.mark.model
def test_all_keeping_mask_equals_dense_smollm2_bfloat16(smollm2):
    model, ids = smollm2
    model = copy.deepcopy(model).bfloat16()
    mask = leank.ChannelMask.dense(30, 3, 64, sink=64, recent=512)
    plain = steps(model, ids, 12, DynamicCache(config=model.config))
    with torch.no_grad():
        truth = copy.deepcopy(model).float()(ids, logits_to_keep=13).logits.numpy()
    with leank.patch(model, mask):
        out = steps(model, ids, 12, leank.make_cache(model))
    assert_within_budget(out, truth, plain, "bfloat16")


@pytest.mark.model
def test_learned_mask_equals_the_rule_smollm2(smollm2):
    model, ids = smollm2
    mask = leank.shipped.load("smollm2-135m-instruct-70")
    n = 12
    with leank.patch(model, mask):
        out = steps(model, ids, n, leank.make_cache(model))
    dense = steps(model, ids, n, DynamicCache(config=model.config))
    double = wide(model)
    rule = (mask, ids.shape[1] - n)
    with torch.no_grad(), oracle(model, *rule), oracle(double, *rule):
        plain, truth = (m(ids, logits_to_keep=n + 1).logits.numpy() for m in (model, double))
    assert_within_budget(out, truth, plain, "float32")
    assert np.abs(out - dense).max() > 100 * np.abs(out - truth).max(), "the mask did nothing"
