"""Two processes that learn together give what one gives with the same batches."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import leank  # noqa: E402
from leank.learning import DataError, DataSettings  # noqa: E402
from leank.learning import run as run_module  # noqa: E402
from leank.learning.feed import Feed  # noqa: E402
from leank.learning.folder import read_state  # noqa: E402
from leank.learning.parallel import Alone, Processes, share  # noqa: E402

from .learn_run_tools import OPTIONS, character_tokenizer, learn, write_text  # noqa: E402
from .processes import run_two  # noqa: E402
from .tiny_models import tiny  # noqa: E402

# Three samples a step and five batches: the processes have unequal shares.
CHANGES = {"batch_size": 3, "n_validation": 14, "stage1_steps": 4, "stage2_steps": 4}


def learn_with_two_processes(folder, options, model="tiny()", device="'cpu'"):
    """Learn into folder / "two", and let each process save what it got, as "two.0" and "two.1"."""
    (folder / "work.py").write_text(f"""if True:
        import torch
        from pathlib import Path, PosixPath
        from leank.learning.parallel import find_world, local_rank
        from tests.learn_run_tools import learn
        from tests.tiny_models import tiny
        output = Path({str(folder / "two")!r})
        mask = learn(**{options}, output=output, model={model}.to({device}))
        world = find_world({device})
        assert world.size == 2 and str(world.device) == str({device})
        mask.save(output.with_name(f"two.{{world.rank}}"))
        world.leave()
        """)
    run_two(folder / "work.py")


def test_two_processes_give_the_result_of_one(monkeypatch, tmp_path):
    """They go on after the first step, which one process did."""
    options = OPTIONS | CHANGES | {"text": str(write_text(tmp_path / "text.txt"))}
    monkeypatch.setattr(run_module, "_SAVE_STEPS", 1)

    def stop(event):
        raise StopIteration

    with pytest.raises(StopIteration):
        learn(**options, output=tmp_path / "two", progress=stop)
    learn_with_two_processes(tmp_path, options | {"resume": True})
    two = [leank.ChannelMask.load(tmp_path / name) for name in ("two", "two.0", "two.1")]
    assert two[0] == two[1] == two[2]
    one = learn(**options, output=tmp_path / "one")
    assert (one.keep == two[0].keep).all()
    states = [
        read_state(tmp_path / f"{name}.run" / "state.pt")["done"][0] for name in ("one", "two")
    ]
    for name in ("stage1_alpha", "alpha"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6)
    assert states[0]["stage1_loss"] == pytest.approx(states[1]["stage1_loss"], rel=1e-5)
    n_lines = [
        len((tmp_path / f"{name}.run" / "log.jsonl").read_text().splitlines())
        for name in ("one", "two")
    ]
    assert n_lines == [9, 9]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_give_the_result_of_one(tmp_path):
    """NCCL. Batches of another size round differently in bfloat16."""
    options = OPTIONS | CHANGES | {"text": str(write_text(tmp_path / "text.txt")), "align": 16}
    learn_with_two_processes(
        tmp_path, options, "tiny(dtype=torch.bfloat16, head_dim=64)", "f'cuda:{local_rank()}'"
    )
    two = [leank.ChannelMask.load(tmp_path / name) for name in ("two", "two.0", "two.1")]
    assert two[0] == two[1] == two[2]
    model = tiny(dtype=torch.bfloat16, head_dim=64).to("cuda:0")
    one = learn(**options, output=tmp_path / "one", model=model)
    assert (one.keep == two[0].keep).mean() > 0.9
    states = [
        read_state(tmp_path / f"{name}.run" / "state.pt")["done"][0] for name in ("one", "two")
    ]
    assert (states[0]["stage1_alpha"] - states[1]["stage1_alpha"]).abs().mean() < 0.02
    assert states[0]["stage1_loss"] == pytest.approx(states[1]["stage1_loss"], rel=0.1)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_processes_wait_for_a_long_report(monkeypatch, backend):
    """NCCL gives up after ten minutes by default. Sums are made where the process's model is."""
    import accelerate

    given = {}
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: given.update(options))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", 3)
    assert Processes(device).device == device
    assert given["cpu"] == (backend == "gloo") and given["timeout"].total_seconds() >= 12 * 3600


def test_shares_are_all_there_is():
    worlds = [Alone() for _ in range(3)]
    for rank, world in enumerate(worlds):
        world.rank, world.size = rank, 3
    shares = [list(share(range(8), world)) for world in worlds]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize("n", [1, 5])
def test_validation_is_the_same_whoever_makes_it(tmp_path, n):
    settings = DataSettings(
        lengths=(400, 500), batch_size=2, n_validation=n, text=(write_text(tmp_path / "t"),)
    )
    feed = Feed(character_tokenizer(), settings, n_steps=1, window=64, context=None)
    state = torch.random.get_rng_state()
    alone, together = (feed.validation_batches(Alone(), n_workers) for n_workers in (0, 2))
    assert len(alone) == len(together) == (n + 1) // 2
    for one, other in zip(alone, together, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_more_processes_than_samples_are_refused(tmp_path):
    world = Alone()
    world.size = 3
    settings = DataSettings(
        lengths=300, batch_size=2, kinds=("continuation",), text=(write_text(tmp_path / "t"),)
    )
    feed = Feed(character_tokenizer(), settings, n_steps=1, window=64, context=None)
    with pytest.raises(DataError, match="batch_size: expected at least 3, one per process, got 2"):
        feed.batches(world)
