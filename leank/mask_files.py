"""Mask files: a safetensors file with one tensor and metadata, and the reference's ``.pth`` files.

The tensor is ``mask``, bool [N, Hkv, D], True where a channel is kept. The metadata, all strings:

==================  ==================================================================
``format_version``  "1"
``shape``           "N,Hkv,D", the tensor's shape
``ratio``           share of the channels that is dropped, in layers that are not outside; must
                    agree with the tensor
``align``           every head keeps a multiple of this many channels
``sink``            S0, first tokens that keep all channels, or "unknown"
``recent``          W, last tokens that keep all channels, or "unknown"
``model``           the model it was made for, may be empty
``method``          how it was made, may be empty
``outside``         "i,j,...", layers that LeanK does not cache; not written if there are none
==================  ==================================================================

Other keys are ignored. `leank.ChannelMask` is the way in: its checks of widths and window are not
repeated here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from leank._files import replacing

FORMAT_VERSION = "1"
_UNKNOWN = "unknown"
_KEYS = ("shape", "ratio", "align", "sink", "recent", "model", "method")


class MaskFileError(ValueError):
    """A mask file that cannot be used; the message names the file, what was expected and got."""


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a ValueError about what a file contains into a MaskFileError that names the file."""
    try:
        yield
    except MaskFileError:
        raise
    except ValueError as error:
        raise MaskFileError(f"{os.fspath(path)}: {error}") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arguments of ChannelMask that the file holds; call it inside `reading`."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise missing("safetensors", "reading a mask file") from error
    with open(path, "rb"):
        pass  # the system's own words for what is no file, or may not be read
    try:
        with safe_open(path, framework="numpy") as file:
            meta, names = file.metadata() or {}, file.keys()
            if list(names) != ["mask"]:
                raise ValueError(f"expected one tensor, mask, got {', '.join(names) or 'none'}")
            part = file.get_slice("mask")
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype != "BOOL":
                raise ValueError(f"tensor mask: expected dtype BOOL, got {dtype}")
            keep = file.get_tensor("mask")
    except SafetensorError as error:
        size = os.path.getsize(path)
        raise ValueError(
            f"expected a safetensors file, got {size} bytes that are not one: {error}"
        ) from error
    if keep.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"tensor mask: expected bytes 0 and 1, got {keep.view(np.uint8).max()}")
    return {"keep": keep, **_arguments(meta, shape, keep)}


def _arguments(
    meta: dict[str, str], shape: tuple[int, ...], keep: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        got = "none" if version is None else repr(version)
        raise ValueError(f"metadata format_version: expected {FORMAT_VERSION!r}, got {got}")
    missing = [key for key in _KEYS if key not in meta]
    if missing:
        raise ValueError(f"metadata: expected the keys {', '.join(_KEYS)}, got no {missing[0]}")
    if meta["shape"] != _shape_text(shape):
        raise ValueError(f"metadata shape: expected {_shape_text(shape)}, got {meta['shape']}")
    outside = _layers(meta.get("outside", ""))
    # Of other shapes, and of an empty tensor, ChannelMask says what is wrong with them.
    if keep.ndim == 3:
        inside = np.delete(keep, [i for i in outside if i < len(keep)], axis=0)
        if inside.size and meta["ratio"] != _ratio_text(inside):
            raise ValueError(f"metadata ratio: expected {_ratio_text(inside)}, got {meta['ratio']}")
    return {
        "align": _integer(meta, "align"),
        "sink": None if meta["sink"] == _UNKNOWN else _integer(meta, "sink"),
        "recent": None if meta["recent"] == _UNKNOWN else _integer(meta, "recent"),
        "model": meta["model"],
        "method": meta["method"],
        "outside": outside,
    }


def _shape_text(shape: tuple[int, ...]) -> str:
    return ",".join(str(size) for size in shape)


def _ratio_text(keep: npt.NDArray[np.bool_]) -> str:
    return f"{1 - np.count_nonzero(keep) / keep.size:.6f}"


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",") if text else []
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"metadata outside: expected layers, as in 0,2,4, got {text!r}")
    return tuple(int(part) for part in parts)


def _integer(meta: dict[str, str], key: str) -> int:
    if not (meta[key].isascii() and meta[key].isdigit()):
        raise ValueError(f"metadata {key}: expected a whole number, got {meta[key]!r}")
    return int(meta[key])


def write(
    path: str | os.PathLike[str], keep: npt.NDArray[np.bool_], fields: dict[str, Any]
) -> None:
    """Write a mask file in one step: whoever opens `path` sees all of it, or what was there."""
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        raise missing("safetensors", "writing a mask file") from error
    outside = fields["outside"]
    metadata = {
        "format_version": FORMAT_VERSION,
        "shape": _shape_text(keep.shape),
        "ratio": _ratio_text(np.delete(keep, outside, axis=0)),
    }
    fields = {key: value for key, value in fields.items() if key != "outside"}
    if outside:
        fields["outside"] = ",".join(map(str, outside))
    for key, value in fields.items():
        metadata[key] = _UNKNOWN if value is None else str(value)
    with replacing(path) as file:
        file.write(save({"mask": keep}, metadata))


def read_pth(path: str | os.PathLike[str]) -> npt.NDArray[np.bool_]:
    """Return the mask of a reference ``.pth`` file; call it inside `reading`."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise missing("torch", "reading a .pth file") from error
    with open(path, "rb"):
        pass
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"expected a file written by torch.save, got: {first}") from error
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"expected one tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = "nested" if tensor.is_nested else f"{tensor.layout}, on {tensor.device}"
        raise ValueError(f"expected a dense tensor with its values, got one that is {kind}")
    if tensor.ndim != 3 or not tensor.is_floating_point():
        raise ValueError(
            f"expected a float tensor (n_layers, n_heads, head_dim), "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    # An expanded tensor is small in the file and may be of any size in memory.
    n_stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > n_stored:
        raise ValueError(
            f"expected a value for each of {tuple(tensor.shape)}, got {n_stored} values"
        )
    values = tensor.detach().resolve_neg().to(torch.float32).numpy()
    wrong = (values != 0) & (values != 1)  # True for NaN as well
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"expected the values 0 and 1, got {values[where]} at {where}")
    return values == 1


def missing(package: str, purpose: str, extra: str = "hf") -> ModuleNotFoundError:
    """Return the error that says what to install."""
    text = f"{purpose} needs {package}: pip install 'leank[{extra}]'"
    return ModuleNotFoundError(text, name=package)
