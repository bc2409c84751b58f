"""Requests that do not fit are refused before any work, in one line."""

import dataclasses
import re
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.learning import DataError, DataSettings, LearnError, Request, Settings  # noqa: E402
from leank.learning import run as run_module  # noqa: E402
from leank.learning.plan import Plan  # noqa: E402

from .learn_run_tools import OPTIONS, character_tokenizer, learn, write_text  # noqa: E402
from .tiny_models import tiny  # noqa: E402


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"ratio": 1.5}, LearnError, "ratio"),
        ({"align": 12}, LearnError, "align"),
        ({"align": 24}, LearnError, "align"),
        ({"lr": -1}, LearnError, "lr: expected 0 to 1, got -1"),
        ({"budget": "v"}, LearnError, "budget: expected k or kv, got 'v'"),
        ({"sink": -1}, LearnError, "sink: expected at least 0, got -1"),
        ({"recent": 300}, DataError, "lengths: expected more than the 304 tokens of the window"),
        ({"lengths": (260, 2000)}, DataError, "at most 1,024 tokens, the model's context"),
        ({"lengths": (500, 400)}, DataError, "lengths: expected 1 <= least <= greatest"),
        ({"kinds": ("none",)}, DataError, "kinds"),
        ({"weights": (1,)}, DataError, "weights: expected 2 numbers"),
        ({"batch_size": 0}, DataError, "batch_size: expected at least 1"),
        (
            {"start": "nowhere"},
            LearnError,
            "start: expected ones, moments, .*: no such file",
        ),
        ({"resume": True}, LearnError, "folder: expected one, or an output"),
        ({"output": "/proc/none/m"}, LearnError, "output: cannot write to /proc/none"),
        ({"output": "{name}"}, LearnError, "output: expected no fields but {ratio} and {align}"),
        ({"output": "."}, LearnError, "output: expected a file, got the folder"),
        ({"report": True, "folder": "x"}, LearnError, "report: needs leank.learning.evaluate"),
    ],
)
def test_mistakes_are_named_before_any_work(monkeypatch, text, change, kind, message):
    monkeypatch.setattr(run_module, "Learner", None)
    monkeypatch.setitem(sys.modules, "leank.learning.evaluate", None)
    with pytest.raises(kind, match=message) as caught:
        learn(text, **change)
    assert "\n" not in str(caught.value)


def test_models_and_tokenizers_that_do_not_fit(text, tmp_path):
    options = OPTIONS | {"text": (text,)}
    with pytest.raises(LearnError, match="at most 97 tokens, as the model's embedding has, got 99"):
        leank.learn(tiny(), character_tokenizer(extra=2), 0.5, 8, **options)
    with pytest.raises(
        LearnError, match="model: expected a causal language model of transformers, got Linear"
    ):
        learn(text, model=torch.nn.Linear(2, 2))
    short = tmp_path / "short.txt"
    short.write_text("one two three")
    with pytest.raises(DataError, match="text: expected enough for passages"):
        learn(short)
    for factors in (np.ones((3, 2, 8)), np.full((3, 2, 16), 2.0)):
        np.save(tmp_path / "alpha.npy", factors)
        with pytest.raises(LearnError, match=r"start: expected factors .* shape \(3, 2, 16\)"):
            learn(text, start=tmp_path / "alpha.npy")
    with pytest.raises(LearnError, match="output: expected the fields {ratio} and {align}"):
        leank.learn_many(tiny(), character_tokenizer(), [0.5, 0.7], [8], output="m", **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        learn(text, steps=3)


def test_one_text_file_needs_no_list(text):
    request = Request.of([0.5], [8], **OPTIONS | {"text": text})
    assert Plan(tiny(), character_tokenizer(), request, "tiny").feed.corpus.train


def test_options_are_documented():
    for kind in (Request, DataSettings, Settings):
        for field in dataclasses.fields(kind):
            assert re.search(rf"^    (.*, )?{field.name}[ ,]", kind.__doc__, re.M), field.name


def test_every_option_tells_runs_apart(text):
    """All that changes a result is compared when a run is resumed, but for where it is written."""
    request = Request.of([0.5], [8], **OPTIONS | {"text": (text,)})
    plan = Plan(tiny(), character_tokenizer(), request, "tiny")
    names = [field.name for kind in (DataSettings, Settings) for field in dataclasses.fields(kind)]
    assert len(set(names)) == len(names)
    missing = set(names) - plan.identity(tiny()).keys()
    assert missing == {"n_test", "ratio", "align"}
