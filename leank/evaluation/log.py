"""The log of an evaluation: JSON lines, a header and one for each item, from which it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from leank.learning.folder import ResumeError, check_same


class Log:
    """A file that is made, or gone on with.

    Parameters
    ----------
    path : Path
    header : dict
        What decides the results; a log that is gone on with must have the same.
    resume : bool
        Whether to go on where there is such a file. Otherwise it is forgotten.

    Attributes
    ----------
    records : list of dict
        Those of the items that are done, in order.

    Raises
    ------
    ResumeError
        The file is the log of another evaluation, or none.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self.records: list[dict[str, Any]] = []
        n_good = 0
        if resume and path.is_file():
            # A killed process may have left half of the last line.
            whole = path.read_bytes()
            n_good = whole.rfind(b"\n") + 1
            self.records = _read(path, whole[:n_good], header)
        self._file = open(path, "ab")
        self._file.truncate(n_good)
        if n_good == 0:
            self._write(header)

    def add(self, record: dict[str, Any]) -> None:
        """Add what an item gave."""
        self.records.append(record)
        self._write(record)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Log:
        """Return itself; the file is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()


def _read(path: Path, text: bytes, header: dict[str, Any]) -> list[dict[str, Any]]:
    if not text:
        return []
    try:
        first, *records = map(json.loads, text.splitlines())
        is_log = isinstance(first, dict) and all("methods" in record for record in records)
    except (ValueError, TypeError):
        is_log = False
    if not is_log:
        raise ResumeError(f"resume: {path}: expected the log of an evaluation, got another file")
    check_same(json.loads(json.dumps(header)), first)
    return records
