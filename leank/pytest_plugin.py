"""The pytest plugin: experiments with masks as ordinary tests, whose results are recorded.

An experiment is a test that asks for some of the fixtures below; examples/experiments has two. A
fixture of the same name in your own file or conftest.py takes the place of one here. Nothing but
NumPy is imported, nothing printed and no file written unless a test uses a fixture.

==================  ===============================================================================
``leank_model``     the dense model
``leank_tokenizer`` its tokenizer
``leank_mask``      the mask of ``--leank-mask``
``leank_patched``   the model patched with ``leank_mask``; ``leank_model`` stays dense beside it
``leank_needles``   makes long texts with a fact to be found
``leank_ask``       asks a model one of them
``leank_memory``    tells what a cache holds
``leank_record``    records a result
==================  ===============================================================================
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from torch import nn

    from leank.evaluation.ask import Reply
    from leank.evaluation.items import Item
    from leank.masks import ChannelMask

RESULTS, PLOT = "results.jsonl", "results.png"
_PROPERTY = "leank"  # of a test's report, which pytest-xdist carries to the process that writes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("leank", "experiments with LeanK")
    group.addoption(
        "--leank-model", metavar="NAME_OR_PATH", help="Model of the experiments, or smollm2."
    )
    group.addoption(
        "--leank-mask",
        metavar="MASK",
        help="Mask file, shipped name or Hub repository; {ratio} is the test's parameter ratio.",
    )
    group.addoption(
        "--leank-device", metavar="DEVICE", default="auto", help="auto, cpu, cuda or cuda:N."
    )
    group.addoption(
        "--leank-results",
        metavar="FOLDER",
        default="leank-results",
        help=f"Of {RESULTS}, to which results are added, and {PLOT}; default: leank-results.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect results, in the process that reports."""
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has it
        config.pluginmanager.register(_Results(config), "leank-results")


# ----------------------------------------------------------------------------------- the model


@pytest.fixture(scope="session")
def leank_model(pytestconfig: pytest.Config) -> nn.Module:
    """Return the dense model: float32 on the CPU, bfloat16 on a GPU."""
    source = _source(pytestconfig)
    import torch

    from leank.cli_errors import CommandError
    from leank.cli_learn import find_device
    from leank.loading import LoadError, quiet

    try:
        device = find_device(pytestconfig.getoption("leank_device"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with quiet():
            return source.model(dtype, device)
    except (CommandError, LoadError) as error:
        _fail(str(error))


@pytest.fixture(scope="session")
def leank_tokenizer(pytestconfig: pytest.Config) -> Any:
    """Return the tokenizer of the model."""
    source = _source(pytestconfig)
    from leank.loading import LoadError, quiet

    try:
        with quiet():
            return source.tokenizer()
    except LoadError as error:
        _fail(str(error))


@pytest.fixture
def leank_mask(request: pytest.FixtureRequest) -> ChannelMask:
    """Return the mask of ``--leank-mask``, in whose name fields are parameters of the test."""
    name = request.config.getoption("leank_mask")
    if name is None:
        _fail("mask: expected --leank-mask, got none")
    parameters = _parameters(request)
    try:
        name = name.format(**parameters)
    except (AttributeError, LookupError, ValueError):
        names = ", ".join(parameters) or "none"
        _fail(f"mask: expected fields among the test's parameters ({names}), got {name}")
    from leank.mask_source import load_mask
    from leank.masks import MaskFileError

    try:
        return load_mask(name)
    except (MaskFileError, ModuleNotFoundError) as error:
        _fail(f"mask: {error}")
    except OSError as error:
        _fail(f"mask: {name}: {error.strerror or error}")


@pytest.fixture
def leank_patched(leank_model: nn.Module, leank_mask: ChannelMask) -> Iterator[nn.Module]:
    """Yield a model with the weights of ``leank_model``, patched until the test ends."""
    import leank

    tensors = (*leank_model.parameters(), *leank_model.buffers())
    model = copy.deepcopy(leank_model, {id(tensor): tensor for tensor in tensors})
    with leank.patch(model, leank_mask):
        yield model


# ------------------------------------------------------------------------------- measurements


@pytest.fixture(scope="session")
def leank_needles(leank_tokenizer: Any) -> Callable[..., list[Item]]:
    """Return a function that makes items: ``leank_needles(length, n=10, task=..., seed=0)``.

    An item is a text of at most `length` tokens, its answer included, with a fact at a random
    depth and a question about it. The task is one of RULER's, as ``leank eval`` has them.
    """
    from leank.evaluation.items import Suite, SuiteSettings
    from leank.learning.text import default_text, split

    corpus = split(default_text())

    @functools.cache  # tests that differ in the mask alone ask the same
    def needles(
        length: int, n: int = 10, *, task: str = "niah_single_1", seed: int = 0
    ) -> list[Item]:
        settings = SuiteSettings(tasks=(task,), lengths=(length,), n_items=n, seed=seed)
        return list(Suite(settings, corpus, leank_tokenizer))

    return needles


@pytest.fixture(scope="session")
def leank_ask(leank_tokenizer: Any) -> Callable[..., Reply]:
    """Return a function that asks a model an item: ``leank_ask(model, item, **options)``.

    What it returns has ``said``, the ``score`` from 0 to 1, and the ``cache``. Options are those of
    ``generate``. It does not compile unless ``disable_compile=False`` is one of them: each test
    patches a model anew, and compiling takes longer than the answers of one test.
    """
    from leank.evaluation.ask import reply_to

    def ask(model: nn.Module, item: Item, **options: Any) -> Reply:
        return reply_to(model, leank_tokenizer, item, **{"disable_compile": True} | options)

    return ask


@pytest.fixture
def leank_memory(leank_model: nn.Module) -> Callable[[Any], dict[str, float]]:
    """Return a function that tells what a cache holds: ``leank_memory(cache)``.

    ``bytes`` of K and V in use; ``dense_bytes``, what they would be without a mask; ``bytes_share``
    of these; on a GPU also ``peak_bytes``, the most that torch had allocated since the test began.
    """
    import torch

    from leank.memory import memory_report

    device = next(leank_model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def measure(cache: Any) -> dict[str, float]:
        total = memory_report(cache).total
        found = {
            "bytes": total.total_bytes,
            "dense_bytes": total.dense_bytes,
            "bytes_share": 1 - total.saved,
        }
        if device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        return found

    return measure


@pytest.fixture
def leank_record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that records a result: ``leank_record(score=0.5, bytes_share=0.4)``.

    Values are numbers, strings or what else JSON has. Those with a ``score`` and a ``bytes_share``
    are in the plot, where a line joins results that differ in nothing but their first parameter.
    """
    option = request.config.getoption

    def record(**values: Any) -> None:
        if not values:
            raise ValueError("values: expected at least one, got none")
        line = {
            "test": request.node.nodeid,
            "name": _function(request.node),
            "parameters": _parameters(request),
            "model": option("leank_model"),
            "mask": option("leank_mask"),
            "device": option("leank_device"),
            "values": values,
        }
        try:
            text = json.dumps(line, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"values: expected what JSON has, got {values}: {error}") from error
        request.node.user_properties.append((_PROPERTY, text))

    return record


# ------------------------------------------------------------------------------------ results


class _Results:
    """The results of a run: each is written when its test ends, all are shown at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = Path(config.invocation_params.dir, config.getoption("leank_results"))
        self.records: list[dict[str, Any]] = []
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what a test recorded."""
        if report.when != "call":
            return
        found = [json.loads(text) for name, text in report.user_properties if name == _PROPERTY]
        if not found:
            return
        run = {"run": self.started, "outcome": report.outcome}
        self.records += [run | record for record in found]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / RESULTS, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(run | record) + "\n" for record in found)
        except OSError as error:
            pytest.exit(f"--leank-results: {self.folder}: {error.strerror or error}", 4)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print a table for each test function, and draw."""
        if not self.records:
            return
        from leank.evaluation.report import draw_results, result_tables

        for name, table in result_tables(self.records).items():
            terminalreporter.write_sep("-", f"leank: {name}")
            terminalreporter.write_line(table)
        drawn = draw_results(self.folder / PLOT, self.records)
        files = [self.folder / RESULTS, *([self.folder / PLOT] if drawn else [])]
        terminalreporter.write_line(f"leank: {', '.join(map(str, files))}")


# -------------------------------------------------------------------------------------- parts


def _fail(message: str) -> NoReturn:
    """End a test by one line."""
    pytest.fail(f"leank: {message}", pytrace=False)


def _source(config: pytest.Config) -> Any:
    """Return where the model is."""
    name = config.getoption("leank_model")
    if name is None:
        _fail("model: expected --leank-model, got none")
    from leank.loading import LoadError, Source

    try:
        return Source(name)
    except LoadError as error:
        _fail(str(error))


def _function(item: pytest.Item) -> str:
    """Return the name of a test without its parameters."""
    callspec = getattr(item, "callspec", None)
    return item.nodeid if callspec is None else item.nodeid.removesuffix(f"[{callspec.id}]")


def _parameters(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the parameters of a test: those that JSON has as they are, others as text."""
    callspec = getattr(request.node, "callspec", None)
    plain = (bool, int, float, str, type(None))
    found = {} if callspec is None else callspec.params
    return {name: x if isinstance(x, plain) else str(x) for name, x in found.items()}
