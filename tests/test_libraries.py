"""Libraries that people put around a model: pipelines, peft, lm_eval, quantised weights."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import leank  # noqa: E402

from .learn_run_tools import character_tokenizer  # noqa: E402
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

TEXT = "the cat sat on a mat and saw how the moon went over hills while rain fell in town"
N = 12


def tokenizer():
    """Return one that pads at the left and has a chat template."""
    made = character_tokenizer()
    made.pad_token = made.eos_token = "\n"
    made.padding_side = "left"
    made.chat_template = "{% for x in messages %}{{ x['role'] }}: {{ x['content'] }}. {% endfor %}"
    return made


def answer(model, text):
    """Return what a model adds to one text."""
    ids = tokenizer()(text, return_tensors="pt").input_ids
    with oracle(model, pruned(), ids.shape[1]):
        new = generate(model, ids, n=N).sequences[0, ids.shape[1] :]
    return tokenizer().decode(new, skip_special_tokens=True)


# ---------------------------------------------------------------------------------- pipelines


@pytest.fixture
def pipe():
    model = tiny()
    with leank.patch(model, pruned()):
        yield transformers.pipeline("text-generation", model, tokenizer=tokenizer())


SETTINGS = {"max_new_tokens": N, "do_sample": False, "return_full_text": False}


def test_pipeline(pipe):
    texts = [TEXT, TEXT[:40], TEXT[20:70]]
    expected = [answer(tiny(), text) for text in texts]
    assert pipe(TEXT, **SETTINGS)[0]["generated_text"] == expected[0]
    batch = pipe(texts, batch_size=2, **SETTINGS)
    assert [out[0]["generated_text"] for out in batch] == expected
    leank.unpatch(pipe.model)
    assert pipe(TEXT, **SETTINGS)[0]["generated_text"] != expected[0], "the mask did nothing"


def test_pipeline_with_chats(pipe):
    chats = [[{"role": "user", "content": text}] for text in (TEXT, TEXT[:30])]
    texts = [tokenizer().apply_chat_template(chat, tokenize=False) for chat in chats]
    expected = [answer(tiny(), text) for text in texts]
    assert pipe(chats[0], **SETTINGS)[0]["generated_text"] == expected[0]
    batch = pipe(chats, batch_size=2, **SETTINGS)
    assert [out[0]["generated_text"] for out in batch] == expected


# --------------------------------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def adapted():
    """Return what gives a model a LoRA adapter that changes its answers: the same one each time."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)

    def adapt(model, by_itself=False):
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what peft asks transformers
            if by_itself:  # as transformers has it, without a class around the model
                model.add_adapter(config)
            else:
                model = peft.get_peft_model(model, config)
        return model.eval()

    return adapt


@pytest.fixture(scope="module")
def merged(adapted):
    """Return what the rule gives on weights with the adapter merged: plain and in float64."""
    model, outs = adapted(tiny()).merge_and_unload(), []
    for one in (model, wide(model)):
        with oracle(one, pruned(), 60):
            outs.append(generate(one, *prompts([60, 23])))
    return outs


def run(model):
    """Generate as `generate` does: peft takes ids by keyword only."""
    ids, mask = prompts([60, 23])
    settings = {"max_new_tokens": N, "do_sample": False, "pad_token_id": 0}
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def test_adapter_on_a_patched_model(adapted, merged):
    plain, truth = merged
    model = tiny()
    dense = generate(model, *prompts([60, 23]))
    leank.patch(model, pruned())
    before = run(model)
    with_adapter = adapted(model)
    assert_same(run(with_adapter), truth, plain)
    with with_adapter.disable_adapter():
        np.testing.assert_allclose(logits(run(with_adapter)), logits(before), atol=1e-4)
    whole = with_adapter.merge_and_unload()
    assert whole is model, "merged weights stay in the model that is patched"
    assert_same(run(whole), truth, plain)
    leank.unpatch(model)
    assert not np.allclose(logits(run(model)), logits(dense), atol=0.1), "the adapter did nothing"


def test_patch_under_an_adapter(adapted, merged):
    plain, truth = merged
    model = adapted(tiny())
    before = run(model)
    with pytest.raises(TypeError, match=r"got PeftModel; patch model\.get_base_model\(\), which"):
        leank.patch(model, pruned())
    with leank.patch(model.get_base_model(), pruned()):
        assert_same(run(model), truth, plain)
    np.testing.assert_allclose(logits(run(model)), logits(before), atol=1e-4)


def test_adapter_by_transformers_itself(adapted, merged):
    plain, truth = merged
    model = adapted(tiny(), by_itself=True)
    with leank.patch(model, pruned()):
        assert_same(run(model), truth, plain)


# ------------------------------------------------------------------------------------ lm_eval


@pytest.mark.filterwarnings("ignore")  # what lm_eval and its many packages say
def test_lm_eval():
    """Its generations prune. Its log-likelihoods are of forwards without a cache: dense."""
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    texts = [TEXT, TEXT[20:60], "a"]
    generations, likelihoods = [], []
    until = {"until": ["\n"], "max_gen_toks": N, "do_sample": False}
    for i, text in enumerate(texts):
        generations.append(instance("generate_until", {}, (text, dict(until)), i))
        likelihoods.append(instance("loglikelihood", {}, (text, " and so on"), i))
    model = tiny()
    lm = lm_eval.HFLM(model, tokenizer=tokenizer(), batch_size=2, device="cpu")
    dense = lm.generate_until(generations), lm.loglikelihood(likelihoods)
    expected = [answer(tiny(), text) for text in texts]
    assert dense[0] != expected, "the mask did nothing"
    with leank.patch(model, pruned()):
        assert lm.generate_until(generations) == expected
        assert lm.loglikelihood(likelihoods) == dense[1]
    assert lm.generate_until(generations) == dense[0]


EXAMPLE = Path(__file__).parents[1] / "examples" / "lm_eval_harness.py"


@pytest.mark.model
def test_the_example_runs_a_task_file():
    pytest.importorskip("lm_eval.models.huggingface")
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "exact_match" in line]
    assert [line.split(":")[0] for line in lines] == ["pruned", "dense"]


def test_the_example_says_what_it_needs():
    code = f"""if True:
        import runpy, sys
        sys.modules["lm_eval"] = None
        runpy.run_path({str(EXAMPLE)!r})
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install lm_eval"), done.stderr


# ------------------------------------------------------------------------- quantised weights


def _torchao():
    config = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig
    return transformers.TorchAoConfig(config())


QUANTISED = {
    "torchao int8": ("torchao", _torchao),
    "quanto int8": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
    "bitsandbytes int8": (
        "bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    ),
    "bitsandbytes 4 bit": (
        "bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
        ),
    ),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.filterwarnings("ignore")  # what the quantisers say
def test_quantised_weights(tmp_path, name):
    """No float64 copy can be made of these, and some round what they multiply by."""
    package, config = QUANTISED[name]
    pytest.importorskip(package)
    tiny(intermediate_size=128).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=config(), device_map="cpu").eval()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight.data) is not torch.Tensor or weight.dtype != torch.float32
    ids, mask = prompts([60, 23])
    dense = generate(model, ids, mask)
    for channels in (all_keeping(), pruned()):
        with oracle(model, channels, 60):
            expected = generate(model, ids, mask)
        with leank.patch(model, channels):
            out = generate(model, ids, mask)
        assert isinstance(out.past_key_values, leank.LeanKCache)
        atol = 0.1 if package == "bitsandbytes" else 2e-4
        np.testing.assert_allclose(logits(out), logits(expected), atol=atol)
    assert not np.allclose(logits(out)[1:], logits(dense)[1:], atol=0.2), "the mask did nothing"
