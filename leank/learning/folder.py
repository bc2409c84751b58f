"""The folder of a run: its state, from which a killed run goes on, and its log.

==============  ==================================================================================
``state.pt``    written every few steps and at the ends of stages, in one step
``log.jsonl``   a line about the run, then a line per step; cut to the state when a run goes on
==============  ==================================================================================
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from leank._files import replacing

FORMAT = 1


class ResumeError(ValueError):
    """The run in the folder is another one; the message names the difference."""


class RunFolder:
    """State and log in a folder, which is made if it is not there.

    Parameters
    ----------
    path : Path
    writes : bool
        False in processes that only read the state.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.state_path = path / "state.pt"
        self.log_path = path / "log.jsonl"
        self._writes = writes
        self._log: BinaryIO | None = None  # open after `begin`, where it is to be written

    def load(self) -> dict[str, Any] | None:
        """Return the last state; None if there is none."""
        return read_state(self.state_path)

    def begin(self, state: dict[str, Any] | None, header: dict[str, Any]) -> None:
        """Cut the log to a state; or forget the run that was here, and begin the log."""
        if not self._writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._log = open(self.log_path, "ab")
        if state is not None:
            self._log.truncate(state["log_bytes"])
            return
        self.state_path.unlink(missing_ok=True)
        self._log.truncate(0)
        self.log(header)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the log; NaN, which is no JSON, becomes null."""
        if self._log is not None:
            clean = {k: None if isinstance(v, float) and v != v else v for k, v in line.items()}
            self._log.write(json.dumps(clean).encode() + b"\n")
            self._log.flush()

    def log_of(self, pair: dict[str, Any], stage1_loss: float | None, folder: Path) -> Path:
        """Write what concerns one of several masks to a log in another folder; return its path.

        Parameters
        ----------
        pair : dict
            Ratio and align, as they are in the lines of stage 2.
        stage1_loss : float or None
            Validation loss of stage 1's mask for this pair. All share stage 1, but the log has the
            loss of the first one's.
        folder : Path
            Made if it is not there.
        """
        folder.mkdir(exist_ok=True)
        path = folder / self.log_path.name
        header, *lines = self.log_path.read_text(encoding="utf-8").splitlines()
        own = [step for step in map(json.loads, lines) if pair.items() <= (pair | step).items()]
        for step in own:
            if step["stage"] == 1 and step["validation"] is not None:
                step["validation"] = stage1_loss
        whole = [header, *map(json.dumps, own)]
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")
        return path

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, and see that the log is on the disk before it."""
        if self._log is not None:
            os.fsync(self._log.fileno())
            size = os.fstat(self._log.fileno()).st_size
            write_state(self.state_path, state | {"format": FORMAT, "log_bytes": size})

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a file in one step: a process that is killed leaves the new one or the old one."""
    with replacing(path, partial=path.name + ".partial") as file:
        torch.save(state, file)


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what `write_state` wrote; None if there is no such file.

    Raises
    ------
    ResumeError
        It is no such file.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        good = state["format"] == FORMAT
    except OSError:
        raise
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        raise ResumeError(f"resume: {path}: expected a state of a run, got another file") from error
    if not good:
        raise ResumeError(f"resume: {path}: expected format {FORMAT}, got {state['format']}")
    return state


def check_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Require that a state is of the run that is asked for.

    Parameters
    ----------
    mine, theirs : dict of str
        What decides the result of a run: of this one, and of the one in the folder.

    Raises
    ------
    ResumeError
        They differ; the message names the first difference.
    """
    for name in mine:
        if mine[name] != theirs.get(name):
            raise ResumeError(
                f"resume: expected a run with {name} {mine[name]}, got one with "
                f"{theirs.get(name)}; give the options of that run, or another folder"
            )
