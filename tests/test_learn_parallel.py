"""Two processes that learn together give what one gives with the same batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import leank  # noqa: E402
from leank.learning.folder import read_state  # noqa: E402
from leank.learning.parallel import Alone, share  # noqa: E402

from .learn_run_tools import OPTIONS, character_tokenizer, write_text  # noqa: E402
from .tiny_models import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Three samples a step and five batches: the processes have unequal shares.
CHANGES = {"batch_size": 3, "n_validation": 14, "stage1_steps": 4, "stage2_steps": 4}


def test_two_processes_give_the_result_of_one(tmp_path):
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "work.py").write_text(f"""if True:
        import sys, torch, leank
        from tests.learn_run_tools import OPTIONS, character_tokenizer
        from tests.tiny_models import tiny
        options = OPTIONS | {CHANGES} | {{"text": (sys.argv[1],), "output": sys.argv[2]}}
        seen = []
        stop = int(sys.argv[3])
        def progress(event):  # called in the first process only
            if event.n_done == stop:
                sys.exit("stopped")
        mask = leank.learn(
            tiny(), character_tokenizer(), 0.5, 8, resume=True, progress=progress, **options
        )
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == 2
        mask.save(sys.argv[2] + f".{{rank}}")
        torch.distributed.destroy_process_group()
        """)

    def work(stop):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", tmp_path / "work.py", text, tmp_path / "two", str(stop)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )

    stopped = work(stop=5)
    assert stopped.returncode != 0 and "stopped" in stopped.stderr, stopped.stderr
    assert not (tmp_path / "two").exists()
    done = work(stop=-1)  # the other process went on from the same state
    assert done.returncode == 0, done.stderr
    two = [leank.ChannelMask.load(tmp_path / name) for name in ("two", "two.0", "two.1")]
    assert two[0] == two[1] == two[2]
    options = OPTIONS | CHANGES | {"text": (text,), "output": tmp_path / "one"}
    one = leank.learn(tiny(), character_tokenizer(), 0.5, 8, **options)
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


def test_shares_are_all_there_is():
    worlds = [Alone() for _ in range(3)]
    for rank, world in enumerate(worlds):
        world.rank, world.size = rank, 3
    shares = [list(share(range(8), world)) for world in worlds]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_more_processes_than_samples_are_refused(tmp_path):
    world = Alone()
    world.size = 3
    from leank.learning.feed import DataSettings, Feed
    from leank.learning.text import DataError

    settings = DataSettings(
        lengths=300, batch_size=2, kinds=("continuation",), text=(write_text(tmp_path / "t"),)
    )
    feed = Feed(character_tokenizer(), settings, n_steps=1, window=64, context=None)
    with pytest.raises(DataError, match="batch_size: expected at least 3, one per process, got 2"):
        feed.batches(world)
