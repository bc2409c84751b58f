"""A model whose layers are on several devices learns what it learns on one.

Without GPUs they are pretended (tests/placed.py), so results are the same bit for bit.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from leank.learning import run as run_module  # noqa: E402
from leank.learning.evaluate import evaluate  # noqa: E402
from leank.learning.plan import Plan  # noqa: E402
from leank.learning.sample import Sample, collate  # noqa: E402
from leank.learning.scores import second_moments  # noqa: E402
from leank.learning.span import SpanModel, loss_of  # noqa: E402

from .learn_run_tools import OPTIONS, learn, write_model, write_text  # noqa: E402
from .learn_tools import make_batch, random_alpha  # noqa: E402
from .placed import place_model, placed  # noqa: E402
from .tiny_models import FAMILIES, RECENT, SINK, VOCAB, prompts, pruned, tiny  # noqa: E402

FIRST, LAST = "cuda:0", "cuda:1"
MAP = {
    "model.embed_tokens": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": LAST,
    "model.layers.2": LAST,
    "model.norm": LAST,
    "model.rotary_emb": LAST,
    "lm_head": LAST,
}
HEAD_FIRST = MAP | {"lm_head": FIRST, "model.rotary_emb": FIRST}


def span_model(model):
    return SpanModel(model, sink=SINK, recent=RECENT, chunk=9)


def items(n=4):
    """Make test items of several lengths, in whose batches spans are padded."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        n_span = 6 + 3 * i
        ids = rng.integers(3, VOCAB, 30 + n_span)
        values = ((3, 5), (5, n_span))
        made.append(Sample("single", ids[:30], ids[30:], (3, n_span), ("a", "b"), (), values))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ragged_spans", [False, True])
def test_loss_and_gradient(family, ragged_spans):
    """Hidden states move to the next device, factors to each layer's, gradients back."""
    hidden = torch.tensor([[True, False], [False, False], [False, True]])

    def loss_and_gradient(model, device):
        model = span_model(model)
        batch = (collate(items()) if ragged_spans else make_batch()).to(torch.device(device))
        dense = model.dense(batch)
        alpha = random_alpha().to(device).detach().requires_grad_()
        loss = loss_of(model.mixed(batch, dense, alpha, hidden.to(device)), dense, batch)
        loss.backward()
        assert loss.device == alpha.grad.device == model.device == torch.device(device)
        return dense, loss.item(), alpha.grad.cpu()

    _, loss, gradient = loss_and_gradient(tiny(family), "cpu")
    with placed():
        model = place_model(tiny(family), MAP)
        dense, got_loss, got_gradient = loss_and_gradient(model, FIRST)
        assert [str(x.device) for x in dense.keys] == [FIRST, LAST, LAST]
        assert str(dense.target.device) == LAST
    assert got_loss == loss and torch.equal(got_gradient, gradient)


def test_what_is_pretended_is_checked():
    with placed():
        x, y = (torch.ones(3, device=device) for device in (FIRST, LAST))
        with pytest.raises(RuntimeError, match="on one device"):
            x + y
        with pytest.raises(RuntimeError, match="on one device"):
            x + torch.ones(3)


@pytest.mark.parametrize("where", [MAP, HEAD_FIRST])
def test_evaluation(where):
    masks = {"pruned": pruned().keep, "whole": np.ones((3, 2, 16), bool)}
    expected = evaluate(span_model(tiny()), masks, items(), batch_size=2)
    with placed():
        got = evaluate(span_model(place_model(tiny(), where)), masks, items(), batch_size=2)
    assert got == expected
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one.items.loss, other.items.loss)


def test_second_moments():
    ids, mask = prompts([30, 12, 21], seed=3)
    expected = second_moments(tiny(), [(ids, mask.bool())])
    with placed():
        batch = ids.to(FIRST), mask.bool().to(FIRST)
        got = second_moments(place_model(tiny(), MAP), [batch])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("start", ["ones", "moments"])
def test_the_same_mask(monkeypatch, tmp_path, start):
    text = write_text(tmp_path / "text.txt")
    expected = learn(text, start=start)
    monkeypatch.setattr(run_module, "workers_for", lambda device: 0)
    # These GPUs have kernels for the tiny model in float32.
    monkeypatch.setattr(Plan, "check_device", lambda *args: None)
    options = {"start": start, "cache_bytes": 1 << 30}
    with placed():
        got = learn(text, model=place_model(tiny(), MAP), **options)
    assert got == expected


def test_the_command(monkeypatch, tmp_path):
    """Here the test loads the model, as transformers would with device_map="auto" on two GPUs."""
    from typer.testing import CliRunner

    from leank import ChannelMask, cli_learn
    from leank.cli import app
    from leank.loading import Source

    def load(self, dtype, device, device_map):
        assert (dtype, str(device), device_map) == (torch.bfloat16, FIRST, "auto")
        return place_model(tiny(), MAP)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << (30 + device.index), 0))
    monkeypatch.setattr(cli_learn, "find_device", lambda name: torch.device(FIRST))
    monkeypatch.setattr(run_module, "workers_for", lambda device: 0)
    # These GPUs have kernels for the tiny model in float32.
    monkeypatch.setattr(Plan, "check_device", lambda *args: None)
    monkeypatch.setattr(Source, "model", load)
    text = write_text(tmp_path / "text.txt")
    expected = learn(text)
    options = OPTIONS | {"text": text, "ratio": 0.5, "align": 8, "device_map": "auto"}
    options |= {"lengths": "260,300", "kinds": "single,continuation", "output": tmp_path / "mask"}
    options |= {"validation": options.pop("n_validation"), "test": options.pop("n_test")}
    words = ["learn", str(write_model(tmp_path / "model"))]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    with placed():
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (ChannelMask.load(tmp_path / "mask").keep == expected.keep).all()
    log = (tmp_path / "mask.run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["device"] == "GPU 0 + GPU 1"
    assert (tmp_path / "mask.run" / "report.md").exists()


def test_weights_are_loaded_by_a_map(monkeypatch):
    from transformers import AutoModelForCausalLM

    from leank.loading import Source

    given = {}

    def load(path, **options):
        given.update(options, path=path)
        return tiny().train()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    model = Source("some/model").model(torch.bfloat16, torch.device(FIRST), "auto")
    assert given == {"path": "some/model", "dtype": torch.bfloat16, "device_map": "auto"}
    assert not model.training  # and moved nowhere


def test_what_cannot_be_used_is_named():
    offloaded = tiny()
    offloaded.hf_device_map = {"": 0}
    offloaded.model.layers[2].to("meta")
    with pytest.raises(ValueError, match="all on the CPU, got cpu, meta; what is on meta"):
        span_model(offloaded)
    with placed():
        unhooked = place_model(tiny(), MAP)
        unhooked.hf_device_map = None
        with pytest.raises(ValueError, match="on several by device_map, got cuda:0, cuda:1"):
            span_model(unhooked)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_learn_what_one_learns(tmp_path):
    from accelerate import dispatch_model

    text, masks, factors = write_text(tmp_path / "text.txt"), [], []
    for name, device_map in (("one", None), ("two", MAP)):
        model = tiny(dtype=torch.bfloat16, head_dim=64)
        if device_map is None:
            model.to(FIRST)
        else:
            model = dispatch_model(model, device_map, skip_keys="past_key_values")
        masks.append(learn(text, model=model, align=16, folder=tmp_path / name))
        factors.append(np.load(tmp_path / name / "alpha.npy"))
    # Two GPUs of one kind give the same bits; others may round differently.
    np.testing.assert_allclose(factors[0], factors[1], rtol=0, atol=0.1)
    assert np.abs(factors[0] - factors[1]).mean() < 0.01
    assert (masks[0].keep == masks[1].keep).mean() > 0.95
