"""patch and unpatch: no trace, every refusal, and every warning."""

import copy
import dataclasses
import io
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import leank  # noqa: E402

from .hf_tools import CACHE_NAMES, enable_checkpointing, traces  # noqa: E402
from .tiny_models import (  # noqa: E402
    FAMILIES,
    HKV,
    N,
    all_keeping,
    generate,
    logits,
    prompts,
    pruned,
    tiny,
)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(autouse=True)
def _unpatched(model):
    yield
    assert "_leank_patch" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------------ no trace


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_leaves_no_trace(family, base):
    model = tiny(family, attn_implementation=base)
    ids, mask = prompts([40, 12])
    before_out = generate(model, ids, mask)
    before = traces(model)
    with leank.patch(model, pruned()):
        pruned_out = generate(model, ids, mask)
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), leank.patch(model, pruned()):
        generate(model, ids, mask)
        raise ZeroDivisionError
    assert traces(model) == before
    leank.patch(model, pruned())
    with pytest.raises(ValueError, match="temperature"):
        generate(model, ids, mask, do_sample=True, temperature=-1.0)
    leank.unpatch(model)
    assert traces(model) == before
    after_out = generate(model, ids, mask)
    np.testing.assert_array_equal(logits(after_out), logits(before_out))
    assert not np.array_equal(logits(pruned_out), logits(before_out))


def test_compiled_forward_is_set_aside(model):
    compiled = model.__dict__["_compiled_call"] = object()
    try:
        with leank.patch(model, pruned()):
            assert "_compiled_call" not in model.__dict__
            model.__dict__["_compiled_call"] = object()
        assert model.__dict__["_compiled_call"] is compiled
    finally:
        del model.__dict__["_compiled_call"]


def test_call_and_context_manager(model):
    ids, _ = prompts([40])
    leank.patch(model, pruned())
    called = generate(model, ids)
    leank.unpatch(model)
    with leank.patch(model, pruned()) as handle:
        np.testing.assert_array_equal(logits(generate(model, ids)), logits(called))
    with pytest.raises(RuntimeError, match="this handle was unpatched"), handle:
        pass
    with pytest.raises(ValueError, match="model: expected a patched model"):
        leank.unpatch(model)
    with pytest.raises(ValueError, match="model: expected a patched model"):
        leank.make_cache(model)
    with leank.patch(model, pruned()):
        leank.unpatch(model)
        leank.patch(model, all_keeping())
    assert "_leank_patch" in model.__dict__, "the second patch is not the first block's to undo"
    leank.unpatch(model)


def test_other_attention_chosen_meanwhile_stays():
    model = tiny()
    leank.patch(model, pruned())
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"call leank\.patch\(model, mask\) first"):
        generate(model, prompts([10])[0])
    leank.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_copy_of_a_patched_model_is_patched(model):
    ids, _ = prompts([40])
    with leank.patch(model, pruned()):
        twin = copy.deepcopy(model)
        expected = generate(model, ids)
    np.testing.assert_array_equal(logits(generate(twin, ids)), logits(expected))
    leank.unpatch(twin)
    np.testing.assert_array_equal(logits(generate(twin, ids)), logits(generate(model, ids)))


def test_patched_model_is_not_pickled(model):
    message = r"call leank\.unpatch\(model\) before pickling"
    with leank.patch(model, pruned()):
        for write in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(TypeError, match=message):
                write(model)
    assert pickle.loads(pickle.dumps(model)).config._attn_implementation == "sdpa"


def test_mask_file(model, tmp_path):
    mask = pruned()
    mask.save(tmp_path / "mask.safetensors")
    for path in (tmp_path / "mask.safetensors", str(tmp_path / "mask.safetensors")):
        with leank.patch(model, path) as handle:
            np.testing.assert_array_equal(handle.mask.keep, mask.keep)
            assert handle.window == {"sink": mask.sink, "recent": mask.recent, "slack": 64}


def test_mask_of_the_reference(model, tmp_path):
    """It says no window: that is given, or asked for."""
    torch.save(torch.from_numpy(pruned().keep.astype(np.float32)), tmp_path / "mask.pth")
    with leank.patch(model, tmp_path / "mask.pth", sink=3, recent=5) as handle:
        np.testing.assert_array_equal(handle.mask.keep, pruned().keep)
    with pytest.raises(ValueError, match="sink: expected a number because the mask does not know"):
        leank.patch(model, str(tmp_path / "mask.pth"))
    with pytest.raises(FileNotFoundError):
        leank.patch(model, "mask.pth")


def test_mask_by_name(model, tmp_path, monkeypatch):
    name = "smollm2-135m-instruct-70"
    with pytest.raises(ValueError, match=r"^mask: expected \(3, 2, 16\) .*, got \(30, 3, 64\)$"):
        leank.patch(model, name)
    wrong = r"71: no such file, and as a name: expected one of \d+ .* near it: smollm2-135m-"
    with pytest.raises(ValueError, match=wrong):
        leank.patch(model, "smollm2-135m-instruct-71")
    for path in ("mask.safetensors", str(tmp_path / "mask"), tmp_path / "mask"):
        with pytest.raises(FileNotFoundError):
            leank.patch(model, path)
    # A file of that name is meant, if there is one.
    monkeypatch.chdir(tmp_path)
    pruned().save(tmp_path / name)
    with leank.patch(model, name) as handle:
        np.testing.assert_array_equal(handle.mask.keep, pruned().keep)


def test_given_window_wins(model):
    bare = dataclasses.replace(pruned(), sink=None, recent=None)
    ids, _ = prompts([40])
    with pytest.raises(ValueError, match="sink: expected a number because the mask does not know"):
        leank.patch(model, bare)
    with pytest.raises(ValueError, match="recent: expected a number because the mask does not"):
        leank.patch(model, bare, sink=3)
    with leank.patch(model, pruned()):
        expected = generate(model, ids)
    with leank.patch(model, bare, sink=3, recent=5):
        np.testing.assert_array_equal(logits(generate(model, ids)), logits(expected))
    with leank.patch(model, pruned(), sink=0, recent=1):
        assert not np.array_equal(logits(generate(model, ids)), logits(expected))
    with leank.patch(model, pruned(), recent=1000):
        whole_window = generate(model, ids)
    with leank.patch(model, all_keeping()):
        dense = generate(model, ids)
    np.testing.assert_allclose(logits(whole_window), logits(dense), atol=1e-4)


# ------------------------------------------------------------------------------------ refusals


def test_arguments_refused(model):
    with pytest.raises(TypeError, match="mask: expected a ChannelMask or a name, got ndarray"):
        leank.patch(model, pruned().keep)
    small = leank.ChannelMask(np.ones((N, HKV, 8), bool), sink=1, recent=1)
    message = r"mask: expected \(3, 2, 16\) \[layers, kv_heads, head_dim\], got \(3, 2, 8\)"
    with pytest.raises(ValueError, match=message):
        leank.patch(model, small)
    with pytest.raises(ValueError, match="recent: expected an int of at least 1, got 0"):
        leank.patch(model, pruned(), recent=0)
    for wrong in (1.5, True):
        with pytest.raises(TypeError, match=f"sink: expected an int, got {type(wrong).__name__}"):
            leank.patch(model, pruned(), sink=wrong)
    with pytest.raises(ValueError, match="slack: expected an int of at least 0, got -1"):
        leank.patch(model, pruned(), slack=-1)
    with pytest.raises(ValueError, match="prefill: expected .* got 'sparse'"):
        leank.patch(model, pruned(), prefill="sparse")
    with leank.patch(model, pruned()):
        with pytest.raises(ValueError, match="model: expected one that is not patched"):
            leank.patch(model, pruned())


def test_copied_config_refused(model):
    with leank.patch(model, pruned()):
        other = transformers.LlamaForCausalLM(copy.deepcopy(model.config))
    with pytest.raises(ValueError, match="model: its config is that of a model .*, or a copy"):
        leank.patch(other, pruned())
    other.set_attn_implementation("sdpa")  # what the message advises
    with leank.patch(other, pruned()):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache_implementation": "offloaded_static"},
            "cache_implementation: expected one of .* 'static'.* got 'offloaded_static'",
        ),
        ({"cache_implementation": "quantized"}, "cache_implementation: .* got 'quantized'"),
        ({"output_attentions": True}, "output_attentions: expected False on a patched model"),
        ({"guidance_scale": 1.5}, "guidance_scale: expected None or 1 .* got 1.5"),
        ({"assistant_early_exit": 2}, "assistant_early_exit: expected None .* got 2"),
        ({"use_mtp": True}, "use_mtp: expected None on a patched model"),
        ({"speculation_type": "dflash"}, "speculation_type: expected None .* got 'dflash'"),
    ],
)
def test_generation_refused(model, options, message):
    with leank.patch(model, pruned()), pytest.raises(NotImplementedError, match=message):
        generate(model, prompts([10])[0], **options)


def test_empty_prompt_refused(model):
    empty = torch.empty(1, 0, dtype=torch.long)
    with leank.patch(model, pruned()), pytest.raises(ValueError, match="a prompt of at least one"):
        generate(model, empty)


def test_gradient_checkpointing_in_training_refused():
    model = tiny()
    enable_checkpointing(model)
    ids, _ = prompts([10])
    with leank.patch(model, pruned()):
        cache = leank.make_cache(model)
        generate(model, ids)
        model.train()
        for call in (
            lambda: leank.make_cache(model),
            lambda: generate(model, ids),
            lambda: generate(model, ids, past_key_values=cache),
        ):
            with pytest.raises(ValueError, match=r"gradient checkpointing .* call model\.eval\(\)"):
                call()


@pytest.mark.parametrize(
    "options",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 4, "num_beam_groups": 2}],
)
def test_searches_that_transformers_left_to_the_hub_refused(model, options):
    with leank.patch(model, pruned()), pytest.raises(ValueError, match="trust_remote_code"):
        generate(model, prompts([10])[0], **options)


def test_continuous_batching_refused(model):
    with leank.patch(model, pruned()), pytest.raises(NotImplementedError, match="continuous"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)


# -------------------------------------------------------- dense answers are told, never silent


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            lambda: {"past_key_values": transformers.DynamicCache()},
            "past_key_values is a DynamicCache",
        ),
        (lambda: {"use_cache": False}, "use_cache is False"),
    ],
)
def test_dense_answer_warns(model, options, reason):
    ids, mask = prompts([40, 12])
    expected = generate(model, ids, mask, **options())
    with leank.patch(model, pruned()):
        with pytest.warns(UserWarning, match="ran dense, without pruning: " + reason):
            out = generate(model, ids, mask, **options())
    np.testing.assert_array_equal(logits(out), logits(expected))


def test_dense_warning_names_each_line_of_the_user(model):
    ids, _ = prompts([10])
    settings = {"max_new_tokens": 1, "use_cache": False, "pad_token_id": 0}
    with leank.patch(model, pruned()), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            model.generate(ids, **settings)
        model.generate(ids, **settings)
    assert [warning.filename for warning in seen] == [__file__] * 2
    assert seen[1].lineno == seen[0].lineno + 1


def test_pruned_answer_does_not_warn(model):
    with leank.patch(model, pruned()), warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, prompts([40])[0])


def test_generate_that_never_asks_for_a_cache(model, monkeypatch):
    monkeypatch.setattr(type(model), "generate", lambda self, *args, **kwargs: args[0])
    with leank.patch(model, pruned()):
        with pytest.raises(RuntimeError, match="did not ask the model for its cache"):
            model.generate(prompts([10])[0])


def test_generate_that_loses_the_cache(model, monkeypatch):
    def prefill(self, input_ids, generation_config, model_kwargs, **options):
        model_kwargs |= dict.fromkeys(CACHE_NAMES & set(model_kwargs), transformers.DynamicCache())
        return inherited(self, input_ids, generation_config, model_kwargs, **options)

    inherited = type(model)._prefill
    monkeypatch.setattr(type(model), "_prefill", prefill)
    with leank.patch(model, pruned()):
        with pytest.raises(RuntimeError, match="did not use the model's cache"):
            generate(model, prompts([10])[0])


def without_cache(module):
    """Let an attention module ignore the cache that it is given."""
    inherited = module.forward

    def forward(*args, **kwargs):
        return inherited(*args, **kwargs | dict.fromkeys(CACHE_NAMES & set(kwargs)))

    module.forward = forward


@pytest.mark.parametrize("layer", range(N))
def test_attention_that_ignores_the_cache(layer):
    """In one layer, and also if generate() ends before a second forward could notice."""
    model = tiny()
    with leank.patch(model, pruned()):
        without_cache(model.model.layers[layer].self_attn)
        with pytest.raises(RuntimeError, match="did not use the model's cache"):
            generate(model, prompts([10])[0], n=1)
        with pytest.raises(RuntimeError, match="did not use the model's cache|did not finish"):
            generate(model, prompts([10])[0])
    with pytest.raises(ValueError, match=f"got none of layer {layer} in LlamaForCausalLM"):
        leank.patch(model, pruned())


def test_attention_that_ignores_the_name_of_the_implementation(model, monkeypatch):
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    other = functions["sdpa"]
    with leank.patch(model, pruned()):
        monkeypatch.setattr(type(functions), "get_interface", lambda *args: other)
        with pytest.raises(RuntimeError, match="a model that is not patched"):
            generate(model, prompts([10])[0])


def test_unknown_version_refused(model, monkeypatch):
    monkeypatch.setattr(type(model), "_prefill", lambda self, inputs: inputs)
    with pytest.raises(RuntimeError, match="expected LlamaForCausalLM._prefill to begin with"):
        leank.patch(model, pruned())


def test_plain_forward_is_the_dense_one(model):
    ids, mask = prompts([40, 12])
    expected = model(ids, attention_mask=mask).logits
    with leank.patch(model, pruned()):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=0, atol=0)
        model(ids, labels=ids).loss.backward()
    model.zero_grad()
