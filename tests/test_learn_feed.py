"""Batches by step: the same with worker processes as without, and what is left of these."""

import multiprocessing

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from leank.learning import DataError, DataSettings  # noqa: E402
from leank.learning import feed as feed_module  # noqa: E402
from leank.learning import run as run_module  # noqa: E402
from leank.learning.feed import Batches, Feed, workers_for  # noqa: E402
from leank.learning.parallel import Alone  # noqa: E402

from .learn_run_tools import OPTIONS, character_tokenizer, learn, write_text  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        "fork" not in multiprocessing.get_all_start_methods(), reason="there are no workers"
    ),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def feed(text):
    settings = DataSettings(
        lengths=(260, 300), batch_size=2, kinds=OPTIONS["kinds"], text=text, n_test=0
    )
    return Feed(character_tokenizer(), settings, n_steps=9, window=64, context=None)


def same(one, other):
    return all(
        torch.equal(x, y) if x is not None else y is None for x, y in zip(one, other, strict=True)
    )


def test_workers_make_the_same_batches_and_end(feed):
    alone, helped = feed.batches(Alone()), feed.batches(Alone(), n_workers=2)
    before = torch.get_rng_state()
    for step in (0, 1, 2, 6, 7, 3, 4, 8):  # later masks begin at stage 2 again
        assert same(helped(step), alone(step)), step
        assert len(multiprocessing.active_children()) == 2
    assert torch.equal(torch.get_rng_state(), before)
    helped.close()
    assert multiprocessing.active_children() == []
    assert same(helped(5), alone(5))
    helped.close()


def test_validation_and_test_do_not_depend_on_the_size_of_batches(text):
    """With a smaller one, since memory ran out, other samples would be asked for."""
    made = []
    for size in (2, 5):
        settings = DataSettings(lengths=(260, 300), batch_size=size, kinds=("single",), text=text)
        made.append(Feed(character_tokenizer(), settings, n_steps=1, window=64, context=None))
    for part in ("validation", "test"):
        for i in range(6):
            one, other = (getattr(feed, part)[i] for feed in made)
            assert (one.context == other.context).all() and (one.span == other.span).all()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_what_is_wrong_with_a_sample_is_one_line(feed, n_workers):
    """A worker's exception used to come with the traceback of its process as the message."""

    class Bad:
        def __getitem__(self, i):
            if i == 5:
                raise DataError("text: expected good, got bad")
            return feed.train[i]

    batches = Batches(Bad(), [range(0, 2), range(2, 4), range(4, 6)], n_workers)
    batches(0), batches(1)
    with pytest.raises(DataError) as caught:
        batches(2)
    assert str(caught.value) == "text: expected good, got bad"
    batches.close()


def test_a_run_with_workers(monkeypatch, text):
    """Its mask is that of a run without; none is left at the end or after a failure."""
    whole = learn(text)
    monkeypatch.setattr(run_module, "workers_for", lambda device: 2)
    seen = []

    def progress(event):
        seen.append(len(multiprocessing.active_children()))
        if event.n_done == stop:
            raise RuntimeError("stop")

    stop = None
    assert learn(text, progress=progress) == whole
    assert seen == [2] * 12 and multiprocessing.active_children() == []
    stop = 3
    with pytest.raises(RuntimeError, match="stop"):
        learn(text, progress=progress)
    assert multiprocessing.active_children() == []


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    """Cores that the process may not use count as little as those of its neighbours."""
    gpu = torch.device("cuda", 0)
    cores = set(range(6))
    monkeypatch.setattr(feed_module.os, "sched_getaffinity", lambda pid: cores, raising=False)
    assert workers_for(torch.device("cpu")) == 0 and workers_for(gpu) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers_for(gpu) == 2
    cores = set(range(128))
    assert workers_for(gpu) == 8
    cores = {3}
    assert workers_for(gpu) == 1
