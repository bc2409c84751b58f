"""Several patched models in one process: in any order, with one config, in threads."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import leank  # noqa: E402

from .hf_tools import traces  # noqa: E402
from .tiny_models import all_keeping, generate, logits, prompts, pruned, tiny  # noqa: E402


def alone(model, mask=None):
    """Return the logits that a model gives when no other is patched; without a mask, dense."""
    if mask is None:
        return logits(generate(model, prompts([40])[0]))
    with leank.patch(model, mask):
        return alone(model)


def with_config_of(model, seed):
    """Make another model on the same config object."""
    torch.manual_seed(seed)
    other = type(model)(model.config).eval()
    assert other.config is model.config
    return other


# ------------------------------------------------------------------------------- in any order


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_stacked_patches_end_in_any_order(shared, order):
    """The first two are of one class, with one config object or each with its own."""
    first = tiny()
    second = with_config_of(first, 1) if shared else tiny(seed=1)
    models, masks = [first, second, tiny("qwen2")], [pruned(), all_keeping(), pruned()]
    dense = [alone(model) for model in models]
    expected = [alone(*pair) for pair in zip(models, masks, strict=True)]
    before = [traces(model) for model in models]
    handles = [leank.patch(*pair) for pair in zip(models, masks, strict=True)]
    for i in order:
        for model, answer in zip(models, expected, strict=True):
            np.testing.assert_array_equal(alone(model), answer)
        handles[i].__exit__()
        expected[i] = dense[i]
    for model, answer in zip(models, dense, strict=True):
        np.testing.assert_array_equal(alone(model), answer)
    assert [traces(model) for model in models] == before


def test_model_that_shares_a_config_stays_dense():
    model = tiny()
    other = with_config_of(model, 1)
    expected = alone(other)
    with leank.patch(model, pruned()):
        np.testing.assert_array_equal(alone(other), expected)


def test_config_keeps_the_attention_it_names():
    model = tiny(attn_implementation="eager")
    other = with_config_of(model, 1)
    with leank.patch(model, pruned()), leank.patch(other, pruned()) as handle:
        assert handle.layout.name == handle.layout.base == "eager"
    assert model.config._attn_implementation == "eager"


# ------------------------------------------------------------------------------------ threads


@pytest.fixture
def restless():
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_one_model_per_thread(restless):
    """Each patches, generates and unpatches at its own pace, and answers as alone."""
    models = [tiny(), tiny(seed=1), tiny("qwen2"), tiny("qwen2", seed=1)]
    masks = [pruned(), all_keeping(), pruned(), pruned()]
    dense = [alone(model) for model in models]
    expected = [alone(*pair) for pair in zip(models, masks, strict=True)]
    before = [traces(model) for model in models]
    barrier = threading.Barrier(len(models))

    def work(i):
        barrier.wait(60)
        for _ in range(3):
            np.testing.assert_array_equal(alone(models[i], masks[i]), expected[i])
            np.testing.assert_array_equal(alone(models[i]), dense[i])

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, range(len(models))))
    assert [traces(model) for model in models] == before


def test_models_with_one_config_are_patched_one_after_the_other():
    """A patch sets the config's attention for a moment: another one must not see that."""
    model = tiny()
    other = with_config_of(model, 1)
    thread = threading.Thread(target=leank.patch, args=(other, pruned()))
    waited = []

    def patch_the_other(module, inputs):
        thread.start()
        thread.join(0.2)
        waited.append(thread.is_alive())

    hook = model.model.layers[1].register_forward_pre_hook(patch_the_other)
    leank.patch(model, pruned())
    hook.remove()
    thread.join(60)
    assert waited == [True]
    assert model.config._attn_implementation == "leank_sdpa"
    leank.unpatch(model)
    leank.unpatch(other)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("patched", [False, True])
def test_running_model_does_not_answer_from_the_probe_of_another(patched):
    """It shares the config of one that is being patched in another thread."""
    model = tiny()
    other = with_config_of(model, 1)
    if patched:
        leank.patch(model, pruned())
    errors = []

    def run(module, inputs):
        with ThreadPoolExecutor(1) as pool:
            errors.append(pool.submit(alone, model).exception())

    hook = other.model.layers[1].register_forward_pre_hook(run)
    leank.patch(other, pruned())
    hook.remove()
    assert isinstance(errors[0], RuntimeError)
    assert "another thread is patching a model that shares this one's config" in str(errors[0])
    leank.unpatch(other)
