"""Channel masks: which K channels each KV head keeps, and the window that goes with them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from leank import _C, mask_files
from leank.mask_files import MaskFileError

__all__ = ["ChannelMask", "MaskFileError"]

_FIELDS = ("sink", "recent", "align", "model", "method", "outside")  # all but the array, in order
_WINDOW_LIMIT = 2**60  # the C library's: sums of positions and windows stay far from overflow


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ChannelMask:
    """The K channels that are kept, for each layer and KV head, and the window around them.

    It cannot be changed; ``dataclasses.replace(mask, sink=64, recent=512)`` makes another one. It
    can be applied to any model of its shape, and serves the one that it was learned on.

    Parameters
    ----------
    keep : bool array [N, Hkv, D]
        True where a channel is stored; copied, the copy is read-only.
    sink, recent : int or None
        S0 first and W last tokens that keep all their channels. None: not known, and then the mask
        cannot be used before it is set.
    align : int
        Every head keeps a multiple of `align` channels; itself a multiple of 8.
    model, method : str
        What the mask was made for, and how.
    outside : tuple of int
        Layers that LeanK does not cache, since they have no full attention (sliding windows, or a
        state as of Mamba): they keep every channel, and count in no share and no number of bytes.

    Raises
    ------
    TypeError
        If `keep` is not boolean, or a number is not an int.
    ValueError
        If a shape, a width or a window is outside its range, a layer that is `outside` drops a
        channel, or all layers are.

    Examples
    --------
    >>> import leank
    >>> leank.ChannelMask.dense(2, 4, 64, sink=4, recent=256)
    <ChannelMask: 2 layers x 4 KV heads x 64 channels, 0.0% of K dropped, 0.0% of heads empty, \
sink 4, recent 256, align 8>
    """

    keep: npt.NDArray[np.bool_]
    sink: int | None = None
    recent: int | None = None
    align: int = 8
    model: str = ""
    method: str = ""
    outside: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every field and make the array read-only."""
        keep = np.asarray(self.keep)
        if keep.dtype != np.bool_:
            raise TypeError(f"keep: expected dtype bool, got {keep.dtype}")
        if keep.ndim != 3 or 0 in keep.shape:
            raise ValueError(f"keep: expected (n_layers, n_heads, head_dim), got {keep.shape}")
        head_dim, step = keep.shape[2], _C.CHANNEL_STEP
        if head_dim % step or head_dim > _C.MAX_HEAD_DIM:
            raise ValueError(
                f"keep: expected a head_dim that is a multiple of {step} up to {_C.MAX_HEAD_DIM}, "
                f"got {head_dim}"
            )
        _check_int("align", self.align, step)
        if self.align % step:
            raise ValueError(f"align: expected a multiple of {step}, got {self.align}")
        for name, least in (("sink", 0), ("recent", 1)):  # a query always sees its own token whole
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), least, below=_WINDOW_LIMIT)
        _check_widths(keep, self.align)
        object.__setattr__(self, "outside", _checked_outside(self.outside, keep))
        keep = np.array(keep, order="C")
        keep.setflags(write=False)
        object.__setattr__(self, "keep", keep)

    @property
    def n_layers(self) -> int:
        """Layers, N."""
        return self.keep.shape[0]

    @property
    def n_heads(self) -> int:
        """KV heads of a layer, Hkv."""
        return self.keep.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head, D."""
        return self.keep.shape[2]

    @property
    def kept_per_head(self) -> npt.NDArray[np.int64]:
        """Channels that each head keeps, Dk, as an array [N, Hkv]."""
        return self.keep.sum(axis=2, dtype=np.int64)

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Rows of the layers that LeanK caches, a new array."""
        return np.delete(self.keep, self.outside, axis=0)

    @property
    def kept_ratio(self) -> float:
        """Share of the K channels that is kept; the window does not count."""
        return float(self.inside.mean())

    @property
    def ratio(self) -> float:
        """Share of the K channels that is dropped."""
        return 1.0 - self.kept_ratio

    @property
    def empty_heads(self) -> float:
        """Share of the heads that keep nothing: outside the window they store no K and no V."""
        return float((~self.inside.any(axis=2)).mean())

    def __repr__(self) -> str:
        """Return one line for people."""
        name = f" {self.model}" if self.model else ""
        sink, recent = ("unknown" if n is None else n for n in (self.sink, self.recent))
        outside = f", {len(self.outside)} layers outside" if self.outside else ""
        return (
            f"<ChannelMask{name}: {self.n_layers} layers x {self.n_heads} KV heads x "
            f"{self.head_dim} channels, {self.ratio:.1%} of K dropped, "
            f"{self.empty_heads:.1%} of heads empty, "
            f"sink {sink}, recent {recent}, align {self.align}{outside}>"
        )

    def __eq__(self, other: object) -> bool:
        """Compare channels, window and metadata."""
        if not isinstance(other, ChannelMask):
            return NotImplemented
        return self._fields() == other._fields() and np.array_equal(self.keep, other.keep)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle through the constructor, which makes the array read-only again."""
        return type(self), (self.keep, *self._fields())

    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _FIELDS)

    def predict_memory(
        self,
        lengths: Sequence[int],
        dtype: _C.DType = "float32",
        *,
        slack: int = 64,
        max_tokens: int | None = None,
        max_call: int = 1,
    ) -> _C.Memory:
        """Return what a cache with this mask holds for rows of these lengths, its layers together.

        Exact for rows whose prompt is complete and that were never cropped. Weights do not count.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each row.
        dtype : {"float32", "bfloat16", "float16"}
            Type of the stored elements.
        slack, max_tokens, max_call : int
            As in ``leank.LayerCache``, whose ``memory()`` has the same keys.

        Raises
        ------
        ValueError
            If the window is not known, or a number is outside its range.

        Examples
        --------
        >>> mask = leank.ChannelMask.dense(2, 4, 64, sink=4, recent=256)
        >>> mask.predict_memory([1024])["k_bytes"] == 2 * 4 * 1024 * 64 * 4
        True
        """
        if self.sink is None or self.recent is None:
            raise ValueError(
                f"mask: expected a known window, got sink {self.sink}, recent {self.recent}; "
                f"set them with dataclasses.replace(mask, sink=..., recent=...)"
            )
        settings = dict(sink=self.sink, recent=self.recent, slack=slack, dtype=dtype)
        settings |= dict(max_tokens=max_tokens, max_call=max_call)
        total: dict[str, int] = {}
        for keep in self.inside:
            layer = _C.predict_memory(keep, np.asarray(lengths, dtype=np.int64), **settings)
            for key, value in layer.items():
                total[key] = total.get(key, 0) + value
        return total

    @classmethod
    def dense(cls, n_layers: int, n_heads: int, head_dim: int, **fields: Any) -> ChannelMask:
        """Return the mask that keeps every channel; `fields` as in the class."""
        keep = np.ones((n_layers, n_heads, head_dim), dtype=np.bool_)
        return cls(keep, **{"method": "keeps everything"} | fields)

    @classmethod
    def from_scores(
        cls, alpha: npt.ArrayLike, ratio: float, align: int, **fields: Any
    ) -> ChannelMask:
        """Keep the channels with the largest scores, exactly as many as `ratio` allows.

        Each head's channels are sorted by score and cut into blocks of `align`; over all heads, the
        ``round(N * Hkv * D * (1 - ratio) / align)`` blocks with the largest sums are kept. Layers
        that are `outside` keep everything and do not count in N.

        Parameters
        ----------
        alpha : array [N, Hkv, D]
            Finite scores; compared as float32.
        ratio : float
            Share of the channels to drop, 0 to 1.
        align : int
            Block size, a multiple of 8 that divides D.
        **fields
            sink, recent, model, method and outside, as in the class.

        Raises
        ------
        ValueError
            If a shape, `ratio`, `align` or a score is outside its range.

        Examples
        --------
        >>> alpha = np.random.default_rng(0).random((2, 4, 64))
        >>> leank.ChannelMask.from_scores(alpha, 0.75, 16).ratio
        0.75
        """
        scores = np.ascontiguousarray(alpha, dtype=np.float32)
        if scores.ndim != 3 or 0 in scores.shape:
            raise ValueError(f"alpha: expected (n_layers, n_heads, head_dim), got {scores.shape}")
        if not np.isfinite(scores).all():
            raise ValueError("alpha: expected finite values, got NaN or infinity")
        fields = {"method": "exact-budget selection from scores"} | fields
        keep = np.ones(scores.shape, np.bool_)
        outside = _checked_outside(fields.pop("outside", ()), keep)
        inside = np.delete(np.arange(len(keep)), outside)
        keep[inside] = _C.select_channels(np.ascontiguousarray(scores[inside]), ratio, align)
        return cls(keep, align=align, outside=outside, **fields)

    @classmethod
    def from_pth(cls, path: str | os.PathLike[str], **fields: Any) -> ChannelMask:
        """Import a mask of the reference implementation, a float tensor [N, Hkv, D] of 0 and 1.

        The file does not say its window: give `sink` and `recent`, and `model` if you like. `align`
        becomes the largest number that fits. Nothing in the file is executed.

        Raises
        ------
        MaskFileError
            If the file is no such tensor, or a head's width is no multiple of 8.
        OSError
            If there is no such file, or it cannot be read.
        """
        with mask_files.reading(path):
            keep = mask_files.read_pth(path)
            cls(keep)  # its errors about the tensor are the file's, those below the caller's
        align = math.gcd(*(int(n) for n in np.unique(keep.sum(axis=2))), keep.shape[2])
        return cls(keep, align=align, **{"method": "imported from a .pth file"} | fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelMask:
        """Read a file written by `save`; its keys are documented in ``leank/mask_files.py``.

        Raises
        ------
        MaskFileError
            If the file is truncated, is no mask file, or its parts contradict each other.
        OSError
            If there is no such file, or it cannot be read.
        """
        with mask_files.reading(path):
            return cls(**mask_files.read(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing one is replaced in one step or stays as it is.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        mask_files.write(path, self.keep, dict(zip(_FIELDS, self._fields(), strict=True)))

    def push_to_hub(
        self,
        repo: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str | None = None,
    ) -> str:
        """Write the mask into a Hugging Face Hub repository, which is made if there is none.

        ``leank.load_mask(repo)`` and ``leank.patch(model, repo)`` read it. The token is that of
        huggingface_hub (HF_TOKEN, or ``hf auth login``), and so are the exceptions.

        Parameters
        ----------
        repo : str
            "org/name".
        revision : str, optional
            Branch to write to; it must exist.
        private : bool, optional
            Of a new repository; default: what its owner chose.
        message : str, optional
            Of the commit.

        Returns
        -------
        str
            The commit's address.
        """
        from leank import mask_source  # not at the top: it imports this module

        return mask_source.push(self, repo, revision=revision, private=private, message=message)


def kept_shares(keep: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return what a mask [N, Hkv, D] stores outside the window, as shares of a dense cache.

    Examples
    --------
    >>> kept_shares(np.array([[[True] * 8 + [False] * 8, [False] * 16]]))
    {'kept_k': 0.25, 'kept_v': 0.5, 'kv_bytes': 0.375, 'empty_heads': 0.5}
    """
    k, v = float(keep.mean()), float(keep.any(-1).mean())  # a head that keeps any K has all its V
    empty = float((~keep.any(-1)).mean())
    return {"kept_k": k, "kept_v": v, "kv_bytes": (k + v) / 2, "empty_heads": empty}


def _check_int(name: str, value: object, least: int, below: int | None = None) -> None:
    # bool is an int to Python, and 64.0 is none: both are a slip of the caller
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if below is not None and value >= below:
        raise ValueError(f"{name}: expected less than 2**{below.bit_length() - 1}, got {value}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _check_widths(keep: npt.NDArray[np.bool_], align: int) -> None:
    widths = keep.sum(axis=2)
    wrong = np.argwhere(widths % align)
    if len(wrong):
        layer, head = (int(i) for i in wrong[0])
        raise ValueError(
            f"keep: expected a multiple of {align} kept channels in every head, "
            f"got {widths[layer, head]} in layer {layer}, head {head}"
        )


def _checked_outside(outside: Sequence[int], keep: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    n_layers = len(keep)
    for layer in outside:
        _check_int("outside", layer, 0)
    found = tuple(sorted(set(outside)))
    if len(found) != len(outside) or (found and found[-1] >= n_layers) or len(found) == n_layers:
        raise ValueError(
            f"outside: expected numbers of some of the {n_layers} layers, got {list(outside)}"
        )
    for layer in found:
        if not keep[layer].all():
            raise ValueError(
                f"keep: expected every channel in layer {layer}, which is outside, got "
                f"{keep[layer].mean():.1%} of them"
            )
    return found
