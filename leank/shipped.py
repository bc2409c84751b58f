"""The masks that the package ships: files, and an index of how each was made and what it costs.

``data/masks/NAME.safetensors`` are mask files; ``data/masks/index.json`` has one record per file,
sorted by name. `add` writes both, so that every number in the index is that of the file. A folder
of your own works in the same way.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leank._files import replacing
from leank.masks import ChannelMask, kept_shares

FOLDER = Path(__file__).parent / "data" / "masks"
FORMAT_VERSION = 1

_INDEX = "index.json"
_NEAR = 3  # names that an error suggests


class ShippedMaskError(ValueError):
    """A name that is not shipped, or a folder of masks that contradicts itself."""


@dataclass(frozen=True)
class ShippedMask:
    """One line of the index.

    Attributes
    ----------
    name : str
        Also of its file, without the suffix.
    model, ratio, align, sink, recent
        As in `leank.ChannelMask`.
    kept_k, kept_v : float
        Shares of K channels and of heads whose V is stored, outside the window.
    kv_bytes : float
        Share of the bytes of a dense cache that is stored outside the window: their mean.
    empty_heads : float
        Share of heads that store nothing outside the window.
    seed : int
    command : str
        What learned it.
    gpu : str
        Where; "" on a CPU.
    seconds : float
        How long both stages took.
    results : dict
        Its test, as `leank.learning.evaluate.Evaluation.as_json` gives it.
    commit : str
        Of this repository, when it was learned.
    """

    name: str
    model: str
    ratio: float
    align: int
    sink: int
    recent: int
    kept_k: float
    kept_v: float
    kv_bytes: float
    empty_heads: float
    seed: int
    command: str
    gpu: str
    seconds: float
    results: dict[str, Any]
    commit: str

    def as_json(self) -> dict[str, Any]:
        """Return the line of the index."""
        return dataclasses.asdict(self)


def shipped_masks(folder: str | os.PathLike[str] = FOLDER) -> list[ShippedMask]:
    """Return the records of all masks, sorted by name.

    Raises
    ------
    ShippedMaskError
        If the index of another folder than the package's is damaged.
    OSError
        If there is none.
    """
    path = Path(folder, _INDEX)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {index['format_version']!r}")
        records = [ShippedMask(**line) for line in index["masks"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ShippedMaskError(
            f"{path}: expected an index of masks, format_version {FORMAT_VERSION}, got: {error}"
        ) from error
    return sorted(records, key=lambda record: record.name)


def find(name: str, folder: str | os.PathLike[str] = FOLDER) -> ShippedMask:
    """Return the record of one mask.

    Raises
    ------
    ShippedMaskError
        If there is no such name; the message has names that look like it.
    """
    records = {record.name: record for record in shipped_masks(folder)}
    if name in records:
        return records[name]
    if not records:
        raise ShippedMaskError(f"name: expected one that is shipped, got {name!r}; there are none")
    near = difflib.get_close_matches(name, records, _NEAR, 0.4) or list(records)[:_NEAR]
    more = " ..." if len(records) > len(near) else ""
    raise ShippedMaskError(
        f"name: expected one of {len(records)} that are shipped, got {name!r}; "
        f"near it: {', '.join(near)}{more} (`leank masks` lists all)"
    )


def load(name: str, folder: str | os.PathLike[str] = FOLDER) -> ChannelMask:
    """Return a shipped mask by its name, such as "smollm2-135m-instruct-70".

    Raises
    ------
    ShippedMaskError
        If there is no such name, or the file is not what the index says.
    MaskFileError, OSError
        As `leank.ChannelMask.load`.
    """
    record = find(name, folder)
    mask = ChannelMask.load(_file(folder, name))
    for key, value in numbers(mask).items():
        if getattr(record, key) != value:
            raise ShippedMaskError(
                f"{_file(folder, name)}: expected {key} {getattr(record, key)!r} as in the index, "
                f"got {value!r}"
            )
    return mask


def add(
    name: str,
    mask: ChannelMask,
    folder: str | os.PathLike[str],
    *,
    seed: int,
    command: str,
    gpu: str,
    seconds: float,
    results: dict[str, Any],
    commit: str,
) -> ShippedMask:
    """Write a mask and its record into a folder; one of the same name is replaced.

    Parameters
    ----------
    name : str
        Of lower-case letters, digits, "-" and ".".
    mask : ChannelMask
        With a known window.
    folder : path
        Made if it does not exist.
    seed, command, gpu, seconds, results, commit
        As in `ShippedMask`.

    Returns
    -------
    ShippedMask

    Raises
    ------
    ValueError
        If the name or the window is not as expected, or `results` is not for JSON.
    OSError
        If a file cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ValueError(f"name: expected lower-case letters, digits, '-' and '.', got {name!r}")
    if mask.sink is None or mask.recent is None:
        raise ValueError(f"mask: expected a known window, got {mask!r}")
    made = dict(seed=seed, command=command, gpu=gpu, seconds=seconds, commit=commit)
    record = ShippedMask(name=name, **numbers(mask), **made, results=results)
    path = Path(folder, _INDEX)
    others = shipped_masks(folder) if path.exists() else []
    records = [*(other for other in others if other.name != name), record]
    lines = [r.as_json() for r in sorted(records, key=lambda record: record.name)]
    index = {"format_version": FORMAT_VERSION, "masks": lines}
    text = json.dumps(index, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(_file(folder, name))
    with replacing(path) as file:
        file.write(text.encode())
    return record


def _file(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder, f"{name}.safetensors")


def numbers(mask: ChannelMask) -> dict[str, Any]:
    """Return what the index says of a mask and its file tells as well; None is unknown."""
    return {
        "model": mask.model,
        "ratio": mask.ratio,
        "align": mask.align,
        "sink": mask.sink,
        "recent": mask.recent,
        **kept_shares(mask.inside),
    }
