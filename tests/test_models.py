"""Which models are taken, by what their attention does; tests/families.py has real families."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaAttention  # noqa: E402

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .families import FAMILIES  # noqa: E402
from .hf_tools import CACHE_NAMES, enable_checkpointing, traces  # noqa: E402
from .tiny_models import D, generate, logits, prompts, pruned, tiny  # noqa: E402


def with_config(name, value):
    model = tiny()
    setattr(model.config, name, value)
    return model


def with_attribute(path, name, value):
    model = tiny()
    model.get_submodule(path).__dict__[name] = value
    return model


class OwnAttention(LlamaAttention):
    """Attends as Llama does, but for what `way` says."""

    way = ""

    def forward(self, hidden_states, **kwargs):
        for name in CACHE_NAMES & set(kwargs):
            kwargs[name] = Between(kwargs[name], self.way)
        if self.way == "window":
            kwargs["sliding_window"] = 8
        return super().forward(hidden_states, **kwargs)


class Between:
    """What a model might do to K and V after its cache."""

    def __init__(self, cache, way):
        self.cache, self.way = cache, way

    def update(self, k, v, *args, **kwargs):
        k, v = self.cache.update(k, v, *args, **kwargs)
        if self.way == "touch":
            return torch.ones(()) * k, v
        return k, (torch.ones(1, 2, 2, 16) if self.way == "swap" else v)


def own_attention(way):
    def make():
        model = tiny()
        layer = model.model.layers[1].self_attn
        layer.__class__, layer.way = OwnAttention, way
        return model

    return make


def fewer_rows():
    model = tiny()
    layer = model.model.layers[2].self_attn
    layer.k_proj = torch.nn.Linear(128, D)
    return model


REFUSED = {
    "no model": (lambda: object(), TypeError, "a causal language model .*, got object"),
    "base model": (lambda: tiny().model, TypeError, "got LlamaModel"),
    "touches K": (
        own_attention("touch"),
        ValueError,
        r"got LlamaForCausalLM computing with K \(mul\) between cache and attention in layer 1",
    ),
    "touches V": (
        own_attention("swap"),
        ValueError,
        "got LlamaForCausalLM giving K .* and another V to the attention of layer 1",
    ),
    "not causal": (
        lambda: with_attribute("model.layers.1.self_attn", "is_causal", False),
        ValueError,
        "got LlamaForCausalLM attending without causality in layer 1",
    ),
    "window in the module": (
        own_attention("window"),
        ValueError,
        "got LlamaForCausalLM giving sliding_window to the attention of layer 1",
    ),
    "cross-attention": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, add_cross_attention=True)
        ),
        ValueError,
        "expected a causal decoder, got GPT2LMHeadModel with cross-attention",
    ),
    "float64": (
        lambda: tiny().double(),
        ValueError,
        "expected K in one of float32, bfloat16, float16, .* got torch.float64",
    ),
    "mixed": (
        lambda: with_half_layer(),
        ValueError,
        "expected one that reads two tokens with a cache, got RuntimeError: .* the same dtype",
    ),
    "no CPU": (
        lambda: tiny().to("meta"),
        ValueError,
        r"expected all weights on the CPU, or all on NVIDIA GPUs, got \['meta'\]",
    ),
    "head_dim": (
        lambda: tiny(head_dim=12),
        ValueError,
        "head_dim that is a multiple of 8 up to 512, got 12",
    ),
    "too few rows": (
        fewer_rows,
        ValueError,
        "the same KV heads x head dim in all layers .*, got layer 0: 2 x 16, .* layer 2: 1 x 16",
    ),
    "paged": (
        lambda: with_config("_attn_implementation_internal", "paged|sdpa"),
        ValueError,
        "expected attn_implementation sdpa, eager, flash_.*, got paged|sdpa; call model.set_attn_",
    ),
    "falcon eager": (
        lambda: FAMILIES["falcon"].make(attn_implementation="eager"),
        ValueError,
        "expected attn_implementation sdpa from FalconForCausalLM, .* got eager; call model.set",
    ),
    "encoder": (
        lambda: with_config("is_encoder_decoder", True),
        ValueError,
        "expected a causal decoder",
    ),
    "bidirectional": (
        lambda: with_config("is_causal", False),
        ValueError,
        "expected a causal decoder",
    ),
    "missing layer": (
        lambda: with_config("num_hidden_layers", 4),
        ValueError,
        "got none of layer 3 in LlamaForCausalLM",
    ),
    "compiled": (
        lambda: with_attribute("", "_compiled_call_impl", print),
        ValueError,
        "expected an uncompiled model",
    ),
    "own generate": (
        lambda: with_attribute("", "generate", print),
        ValueError,
        "expected the methods of its class, got others for generate",
    ),
}


def with_half_layer():
    model = tiny()
    model.model.layers[1].half()
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_model_refused(name):
    make, error, message = REFUSED[name]
    model = make()
    with pytest.raises(error, match="model: .*" + message):
        leank.patch(model, pruned())
    assert "_leank_patch" not in getattr(model, "__dict__", {})


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_own_attention_class_is_welcome(base):
    model = own_attention("")()
    ids, mask = prompts([40, 12])
    with leank.patch(tiny(), pruned()) as handle:
        expected = generate(handle.model, ids, mask)
    model.set_attn_implementation(base)
    with leank.patch(model, pruned()):
        out = generate(model, ids, mask)
    np.testing.assert_allclose(logits(out), logits(expected), atol=2e-4)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_flash_and_flex_wait_until_unpatch(base, name):
    """They cannot be asked for from inside another function: they read the config's name."""
    model = tiny(attn_implementation=base)
    model._supports_sdpa = base == "sdpa"
    ids, padding = prompts([40, 12])
    with leank.patch(model, pruned()):
        expected = generate(model, ids, padding)
    model.config._attn_implementation = name
    with leank.patch(model, pruned()):
        assert model.config._attn_implementation == "leank_" + base
        out = generate(model, ids, padding)
    assert model.config._attn_implementation == name
    np.testing.assert_array_equal(logits(out), logits(expected))


def test_probe_leaves_no_trace():
    """Also of a model in training, with dropout and gradient checkpointing."""
    model = tiny(attention_dropout=0.5)
    enable_checkpointing(model)
    model.train()
    model.model.layers[1].eval()
    before, state = traces(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    inspect_structure(model)
    assert traces(model) == before and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
