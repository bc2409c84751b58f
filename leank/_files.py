"""Writing a file in one step, so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], partial: str | None = None) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` at the end, unless there was an exception.

    Whoever opens `path` sees all of it, or what was there before: also after the process was
    killed, or the machine lost power.

    Parameters
    ----------
    path : path
    partial : str, optional
        Name of the file until then, in the same folder, since a rename is atomic only inside one
        file system. A killed process leaves it behind and the next writer takes it. Default: a name
        that nobody else has, for files that several may write.
    """
    target = Path(path)
    temporary = target.with_name(partial or f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb" if partial else "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    # The name is on the disk when the folder is; not every system can do that.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
