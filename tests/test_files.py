"""Files that are written in one step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leank._files import replacing


@pytest.mark.parametrize("partial", [None, "half"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, partial):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), replacing(path, partial) as file:
        file.write(b"ne")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path, partial) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_taken(tmp_path):
    (tmp_path / "half").write_bytes(b"longer than the new one")
    with replacing(tmp_path / "file", "half") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"), replacing(tmp_path / "none" / "file"):
        pass


# A child writes one of two masks after the other, all the time; it is killed again and again.
KILLED = """
import itertools, os, signal, sys, time
import numpy as np
from leank import ChannelMask

path = sys.argv[1]
masks = [ChannelMask.dense(30, 4, 64, sink=4, recent=recent) for recent in (50, 60)]
masks[0].save(path)
for i in range(60):
    saved, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for mask in itertools.cycle(masks):
            mask.save(path)
            os.write(tell, b".")
    for _ in range(1 + i % 3):  # it does write
        assert os.read(saved, 1) == b"."
    time.sleep(0.0003 * (i % 20))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(saved), os.close(tell)
    read = ChannelMask.load(path)
    assert read in masks, read
    # What the killed one left behind has another name, and harms nobody.
    for name in os.listdir(os.path.dirname(path)):
        assert name == os.path.basename(path) or name.startswith("."), name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    pytest.importorskip("safetensors")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "m.safetensors")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
