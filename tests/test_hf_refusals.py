"""LeanKCache in plain forwards: what is refused, what failed half way, and gradients."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import leank  # noqa: E402

from .hf_tools import close, filled, forward  # noqa: E402
from .tiny_models import (  # noqa: E402
    all_keeping,
    generate,
    logits,
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


# ---------------------------------------------------------------------------------- refusals


def test_unpatched_model_refuses_the_cache():
    for options in ({}, {"attn_implementation": "eager"}, {"num_key_value_heads": 8}):
        model = tiny(**options)
        mask = all_keeping()
        if "num_key_value_heads" in options:
            mask = leank.ChannelMask(np.ones((3, 8, 16), bool), sink=1, recent=1)
        cache = leank.LeanKCache(mask)
        with pytest.raises(RuntimeError, match=r"call leank\.patch\(model, mask\) first"):
            forward(model, prompts([10])[0], cache)
        with pytest.raises(RuntimeError, match=r"call leank\.patch\(model, mask\) first"):
            generate(model, prompts([10, 4])[0], past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_cache_of_another_mask_is_refused(model):
    keep, window = pruned().keep, {"sink": 3, "recent": 5}
    moved = keep.copy()
    moved[2, 0] = np.roll(moved[2, 0], 1)
    wider = np.ones((3, 2, 24), bool)
    for other, differs in (
        (all_keeping(), r"kept channels of layer 0, head 0: expected \[0, 2, .*\], got \[0, 1, "),
        (leank.ChannelMask(moved, **window), "kept channels of layer 2, head 0: expected .* got"),
        (leank.ChannelMask(keep[:2], **window), "layers: expected 3, got 2"),
        (
            leank.ChannelMask(wider, **window),
            r"mask \[KV heads, head dim\]: expected \(2, 16\), got \(2, 24\)",
        ),
        ({"sink": 4}, "sink: expected 3, got 4"),
        ({"recent": 6}, "recent: expected 5, got 6"),
        ({"slack": 0}, "slack: expected 64, got 0"),
    ):
        other = (
            leank.LeanKCache(pruned(), **other)
            if isinstance(other, dict)
            else leank.LeanKCache(other)
        )
        with pytest.raises(
            ValueError, match=f"past_key_values: expected a LeanKCache .* {differs}"
        ):
            generate(model, prompts([10])[0], past_key_values=other)
    with pytest.raises(TypeError, match="mask: expected a ChannelMask, got ndarray"):
        leank.LeanKCache(pruned().keep)
    with pytest.raises(ValueError, match="recent: expected a number because the mask does not"):
        leank.LeanKCache(leank.ChannelMask(pruned().keep), sink=3)


def bias(n_new, n_all):
    return torch.zeros(1, 1, n_new, n_all).index_fill_(3, torch.tensor([2]), -1.5)


def causal(n_new, n_all, rows=3):
    allowed = torch.ones(n_new, n_all, dtype=torch.bool).tril(n_all - n_new)
    return allowed.expand(rows, 1, n_new, n_all).clone()


def hole(n_new, n_all):
    allowed = causal(n_new, n_all)
    allowed[1, 0, 2, n_all - n_new] = False
    return allowed


BAD_MASKS = {
    "alibi": (bias, "expected only 0 and -inf, got other values"),
    "hole": (hole, "expected causal attention .* row 1, query column 2"),
    "bidirectional": (lambda t, n: torch.ones(3, 1, t, n, dtype=torch.bool), "expected causal"),
    "per head": (
        lambda t, n: torch.zeros(3, 8, t, n),
        r"expected \(3, 1, 6, \d+\), the same for all heads, got \(3, 8",
    ),
    "two rows of three": (
        lambda t, n: causal(t, n, rows=2),
        r"expected \(3, 1, 6, \d+\), the same for all heads, got \(2, 1, 6, ",
    ),
    "integers": (
        lambda t, n: torch.zeros(3, 1, t, n, dtype=torch.long),
        "expected only 0 and -inf",
    ),
}


@pytest.mark.parametrize("filled_first", [False, True])
@pytest.mark.parametrize("name", BAD_MASKS)
def test_other_attention_patterns_are_refused(model, name, filled_first):
    make, message = BAD_MASKS[name]
    cache, more = leank.make_cache(model), prompts([6, 6, 6])[0]
    if filled_first:
        cache, _, more = filled(model, (40, 40, 40))
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match="attention_mask: " + message):
        forward(model, more, cache, make(6, before + 6))
    assert cache.get_seq_length() == before


def test_causal_4d_mask_is_welcome(model):
    cache, _, more = filled(model, (40, 40, 40))
    expected = forward(model, more, copy.deepcopy(cache))
    mask = causal(6, 46)
    masks = [torch.where(mask, 0.0, MIN), torch.where(mask, 0.0, -torch.inf), mask]
    for mask in masks:
        close(forward(model, more, copy.deepcopy(cache), mask), expected)


def test_other_arguments_are_refused(model):
    ids, _ = prompts([10])
    with pytest.raises(ValueError, match="output_attentions: expected False with a LeanKCache"):
        model(ids, past_key_values=leank.make_cache(model), output_attentions=True)
    with pytest.raises(ValueError, match="use_cache: expected True with a LeanKCache, got False"):
        model(ids, past_key_values=leank.make_cache(model), use_cache=False)
    with pytest.raises(ValueError, match="use_cache: expected True with a LeanKCache, got False"):
        generate(model, ids, past_key_values=leank.make_cache(model), use_cache=False)
    with pytest.raises(ValueError, match="v: expected torch.float32 as K has, got torch.bfloat16"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, past_key_values=leank.make_cache(model))
    with pytest.raises(ValueError, match="is_causal: expected True with a LeanKCache"):
        model(ids, past_key_values=leank.make_cache(model), is_causal=False)
    cache, mask, more = filled(model)
    with pytest.raises(ValueError, match=r"k: expected \(3, 2, 6, 16\), got \(2, 2, 6, 16\)"):
        forward(model, more[:2], cache, mask[:2])
    half = tiny(dtype=torch.float16)
    with leank.patch(half, pruned()):
        with pytest.raises(ValueError, match="k: expected float32, got torch.float16"):
            forward(half, more, cache, mask)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself
def test_compiled_forward_is_refused(fullgraph):
    model = tiny()
    with leank.patch(model, pruned()):
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        cache = leank.make_cache(model)
        with pytest.raises(RuntimeError, match="torch.compile: .* fixed length, .* one that grows"):
            forward(compiled, prompts([10])[0], cache)
        assert cache.get_seq_length() == 0
    torch.compiler.reset()


def test_dropout_is_refused():
    model = tiny(attention_dropout=0.1).train()
    with leank.patch(model, pruned()):
        with pytest.raises(ValueError, match=r"dropout: expected 0 .* call model\.eval\(\)"):
            forward(model, prompts([10])[0], leank.make_cache(model))


def test_expect_prompt_is_for_empty_caches(model):
    cache, _, _ = filled(model)
    with pytest.raises(ValueError, match="cache: expected no column yet, got 40"):
        cache.expect_prompt(10)
    with pytest.raises(ValueError, match="n_columns: expected an int of at least 1, got 0"):
        leank.make_cache(model).expect_prompt(0)
    for wrong in (2.7, True):
        with pytest.raises(TypeError, match="n_columns: expected an int, got"):
            leank.make_cache(model).expect_prompt(wrong)


def test_announced_prompt_and_generate(model):
    """Also an announcement that an earlier, interrupted generate left behind is not overwritten."""
    ids, _ = prompts([60])
    expected = generate(model, ids)
    cache = leank.make_cache(model)
    cache.expect_prompt(20)
    with pytest.raises(ValueError, match=r"a prompt of 20 columns, .* got 60; cache\.reset\(\)"):
        generate(model, ids, past_key_values=cache)
    cache.reset()
    cache.expect_prompt(60)
    out = generate(model, ids, past_key_values=cache, prefill_chunk_size=25)
    np.testing.assert_allclose(logits(out), logits(expected), atol=2e-4)
    other = tiny()
    with leank.patch(other, pruned(), prefill="pruned"):
        cache = leank.make_cache(other)
        cache.expect_prompt(20)
        out = generate(other, ids, past_key_values=cache)
    with oracle(tiny(), pruned(), 20) as dense:
        np.testing.assert_allclose(logits(out), logits(generate(dense, ids)), atol=2e-4)


def stop_half_way(model, ids, cache, mask=None):
    """Let a forward fail before the last layer."""

    def stop(module, inputs):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(model, ids, cache, mask)
    hook.remove()


def test_forward_that_stopped_half_way(model):
    cache, mask, more = filled(model)
    expected = forward(model, more, copy.deepcopy(cache), mask)
    stop_half_way(model, more, cache, mask)
    with pytest.raises(RuntimeError, match=r"layers hold \[40, 46\] columns .* cache\.crop\(0\)"):
        forward(model, more, cache, mask)
    cache.crop(0)
    close(forward(model, more, cache, mask), expected)


@pytest.mark.parametrize(
    ("prompt", "n_past", "n_new"),
    [
        (None, 150, 200),  # more columns than slack
        (300, 250, 50),  # fewer, but they complete the prompt, and then channels go
    ],
)
def test_forward_that_stopped_half_way_is_not_undone_by_half(model, prompt, n_past, n_new):
    ids, _ = prompts([n_past + n_new])
    cache = leank.make_cache(model)
    if prompt is not None:
        cache.expect_prompt(prompt)
    forward(model, ids[:, :n_past], cache)
    expected = forward(model, ids[:, n_past:], copy.deepcopy(cache))
    stop_half_way(model, ids[:, n_past:], cache)
    with pytest.raises(RuntimeError, match=r"cache\.reset\(\) and feed everything again"):
        forward(model, ids[:, n_past:], cache)
    for n in (0, -1):
        with pytest.raises(RuntimeError, match=r"dropped .*; cache\.reset\(\) and feed everything"):
            cache.crop(n)
    assert cache.layers[2].get_seq_length() == n_past, "crop left the cache as it was"
    cache.reset()
    if prompt is not None:
        cache.expect_prompt(prompt)
    forward(model, ids[:, :n_past], cache)
    close(forward(model, ids[:, n_past:], cache), expected)


def test_first_forward_that_stopped_half_way(model):
    ids, _ = prompts([200])
    cache = leank.make_cache(model)
    cache.expect_prompt(200)
    expected = forward(model, ids, copy.deepcopy(cache))
    stop_half_way(model, ids[:, :150], cache)
    cache.crop(0)
    parts = [forward(model, part, cache) for part in ids.split(150, 1)]
    close(torch.cat(parts, 1), expected)


# --------------------------------------------------------------------------------- gradients


def test_backward_through_the_cache_raises(model):
    ids, _ = prompts([20])
    cache = leank.make_cache(model)
    first = model(ids, past_key_values=cache).logits
    second = model(ids[:, :4], past_key_values=cache).logits
    with torch.no_grad():
        expected = model(ids[:, :4], past_key_values=forward_only(model, ids)).logits
    torch.testing.assert_close(second, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward: there is no gradient through a pruned cache"):
        second.sum().backward()
    model.zero_grad()
    # The first call is dense and complete in itself.
    first.sum().backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(ids).logits.sum().backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, gradient)
    model.zero_grad()


def forward_only(model, ids):
    cache = leank.make_cache(model)
    forward(model, ids, cache)
    return cache


def test_backward_to_a_soft_prompt_raises():
    """Only what is in the cache asks for a gradient; the call itself does not."""
    model = tiny().requires_grad_(False)
    with leank.patch(model, pruned()):
        soft = torch.randn(1, 10, 128, requires_grad=True)
        cache = leank.make_cache(model)
        model(inputs_embeds=soft, past_key_values=cache)
        loss = model(prompts([5])[0], past_key_values=cache).logits.sum()
        with pytest.raises(RuntimeError, match="backward: there is no gradient"):
            loss.backward()
