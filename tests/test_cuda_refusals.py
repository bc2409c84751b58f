"""Patched models on a GPU: what is refused, when, and what it leaves."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402

from .cuda_model_tools import (  # noqa: E402
    D,
    compiled,
    draw,
    filled,
    forward,
    pruned,
    run,
    steps,
)
from .families import FAMILIES  # noqa: E402
from .tiny_models import generate, prompts, tiny  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what inductor imports warns about itself
    pytest.mark.usefixtures("fresh_compiler"),
]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"is_assistant": True}, "is_assistant: expected none on a GPU"),
        ({"cache_implementation": "offloaded"}, "cache_implementation: expected none on a GPU"),
    ],
)
def test_what_generate_refuses(one, options, message):
    ids = prompts([20])[0].to(one.place)
    with one.patch(), pytest.raises(NotImplementedError, match=message):
        generate(one.model, ids, **options)


def test_offloading(one):
    with one.patch():
        cache, ids, real = filled(one)
        with pytest.raises(NotImplementedError, match="offload: expected a cache on the CPU"):
            cache.offload(0)
        steps(one, cache, ids, real, draw(3, 2))


def test_caches_that_do_not_fit_the_place(one):
    message = r"max_cache_len: expected the number of columns .* max_cache_len=\.\.\.\), got None"
    with one.patch():
        with pytest.raises(ValueError, match=message):
            leank.make_cache(one.model)
        ids = prompts([20])[0].to(one.place)
        grown = leank.LeanKCache(one.mask, slack=4)
        with pytest.raises(ValueError, match=message):
            generate(one.model, ids, past_key_values=grown)
        static = leank.LeanKCache(one.mask, slack=4, max_cache_len=50)
        message = "layer 0: expected LeanKCudaLayer, got LeanKStaticLayer"
        with pytest.raises(ValueError, match=message):
            generate(one.model, ids, past_key_values=static)
    with pytest.raises(ValueError, match='device: expected "cpu" or "cuda", got \'tpu\''):
        leank.LeanKCache(one.mask, device="tpu")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny(head_dim=D), "expected K in bfloat16 or float16 on a GPU, .* torch.float32"),
        (lambda: tiny(dtype=torch.float16), r"expected a head dim of \(64, .* on a GPU, .* got 16"),
        (
            lambda: FAMILIES["llama"].make(
                torch.float16, head_dim=D, hidden_size=68, num_attention_heads=34
            ),
            "expected at most 16 query heads per KV head on a GPU, .* got 17",
        ),
        (
            lambda: FAMILIES["falcon_h1"].make(torch.float16),
            r"expected layers without a state .* on a GPU, .* got FalconH1ForCausalLM",
        ),
    ],
)
def test_models_that_the_kernels_do_not_take(place, make, message):
    with pytest.raises(ValueError, match=f"model: {message}"):
        leank.patch(make().to(place), pruned())


def test_past_the_end(one):
    """The host refuses an eager step, and generate() a compiled one, before it is launched."""
    with one.patch():
        cache, ids, real = filled(one, max_cache_len=81)
        ids, real = steps(one, cache, ids, real, draw(3, 1))
        more = torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match="max_cache_len: expected at least 82"):
            forward(one, draw(3, 1), cache, more)
        cache.reset()
        with pytest.raises(ValueError, match="max_cache_len: expected at least 82"):
            run(one, [75], past_key_values=cache, **compiled(one))
        cache.check()
        assert cache.n_columns == 81
        cache.reset()
        run(one, [70], past_key_values=cache, **compiled(one))


def test_step_with_another_mask(one):
    """It is found out at the next check."""
    with one.patch():
        cache, ids, real = filled(one)
        for change in (lambda x: x[1].fill_(1), lambda x: x[0, 40].fill_(0)):
            wrong = torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1)
            change(wrong)
            forward(one, draw(3, 1), cache, wrong)
            with pytest.raises(ValueError, match="attention_mask: expected the padding that the"):
                cache.check()
            cache.crop(-1)
            cache.check()
        forward(one, draw(3, 1), cache)
        with pytest.raises(ValueError, match="attention_mask: expected the padding that the"):
            cache.check()
        cache.crop(-1)
        mask = torch.ones(3, 1, 1, 99, dtype=torch.bool, device=one.place)
        with pytest.raises(ValueError, match=r"attention_mask: expected \(3, 1, 1, 100\), .* 99"):
            one.model(draw(3, 1).to(one.place), past_key_values=cache, attention_mask=mask)
        mask = torch.ones(3, 1, 1, 100, dtype=torch.long, device=one.place)
        with pytest.raises(
            ValueError, match="attention_mask: expected torch.bool or .* got torch.int64"
        ):
            one.model(draw(3, 1).to(one.place), past_key_values=cache, attention_mask=mask)
        cache.crop(0)
        steps(one, cache, ids, real, draw(3, 2))


def test_notes_of_masks_that_do_not_fit(one):
    """A kernel writes 4 bytes there."""
    with one.patch():
        layer = filled(one)[0].packed[0]
        for bad in (layer.misfit.bool(), layer.misfit.long(), layer.misfit.reshape(1)):
            with pytest.raises(ValueError, match=r"misfit: expected torch.int32 \[\] on .*, got"):
                layer.store.step_columns(None, bad)
        assert layer.store.step_columns(None, layer.misfit).shape == (3, 1)


def test_prompt_in_a_compiled_model(one):
    call = torch.compile(one.model, backend="eager")
    with one.patch(), torch.no_grad():
        cache = leank.make_cache(one.model, max_cache_len=60)
        message = "expected one token per row after a prompt outside of the compiled model"
        with pytest.raises(RuntimeError, match=message):
            call(draw(1, 30).to(one.place), past_key_values=cache)
        assert cache.n_columns == 0
        cache = filled(one)[0]
        cache.reset()
        with pytest.raises(RuntimeError, match=message):
            call(draw(3, 1).to(one.place), past_key_values=cache)


def test_gradients(one):
    with one.patch():
        cache, ids, real = filled(one)
        out = one.model(
            draw(3, 1).to(one.place),
            past_key_values=cache,
            attention_mask=torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1).to(one.place),
        )
        with pytest.raises(RuntimeError, match="there is no gradient through a pruned cache"):
            out.logits.sum().backward()
