"""What a user asks for, and all that can be found wrong with it before weights are loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import leank
from leank.learning.budget import choose_channels
from leank.learning.feed import DataSettings, Feed
from leank.learning.train import Settings
from leank.masks import ChannelMask, MaskFileError
from leank.models import Layout, inspect_learnable

STARTS = ("ones", "moments")


class LearnError(ValueError):
    """A mistake in what the user asked for; its text is one line."""


class Target(NamedTuple):
    """What one mask is learned for."""

    ratio: float
    align: int

    def __str__(self) -> str:
        """Return a name for folders and tables."""
        return f"r{self.ratio:g}-a{self.align}"


@dataclass(frozen=True)
class Request:
    """What to learn, from what, and where to put it.

    Attributes
    ----------
    ratios, aligns : sequences
        One mask is learned for each pair; stage 1 is run once for all.
    sink, recent : int
        First and last tokens that keep all channels.
    settings : Settings
        How to learn; its ratio and align do not count.
    data : DataSettings
    start : "ones", "moments", path or name of a mask
        Factors that stage 1 begins with: 1; 0.5 to 1 in the order of the channels' second moments;
        those of a ``.npy`` file [N, Hkv, D]; or 1 where a mask file keeps a channel, else 0.
    output : path, optional
        Mask file. With several masks it has the fields ``{ratio}`` and ``{align}`` where these
        differ.
    folder : path, optional
        Of state, log and report; default: the output with ``.run`` appended.
    resume : bool
        Go on with the run in the folder, if there is one.
    report : bool
        Test the masks at the end and write a report into the folder.
    chunk : int
        Columns of a context that are read at once.
    cache_bytes : int, optional
        Memory for the dense runs of the validation; default: 1 GiB on the CPU, a quarter of what is
        free on a GPU.
    """

    ratios: tuple[float, ...]
    aligns: tuple[int, ...]
    sink: int
    recent: int
    settings: Settings = Settings()
    data: DataSettings = DataSettings()
    start: str | Path = "ones"
    output: str | Path | None = None
    folder: str | Path | None = None
    resume: bool = False
    report: bool = False
    chunk: int = 8192
    cache_bytes: int | None = None

    @classmethod
    def of(cls, ratios: Any, aligns: Any, **options: Any) -> Request:
        """Make one of keywords, those of Settings and DataSettings among them."""
        for kind, name in ((Settings, "settings"), (DataSettings, "data")):
            names = {field.name for field in dataclasses.fields(kind)} - {"ratio", "align"}
            own = {key: options.pop(key) for key in list(options) if key in names}
            try:
                options[name] = kind(**own)
            except ValueError as error:
                raise LearnError(str(error)) from error
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(options.keys() - known):
            raise TypeError(f"learn() got an unexpected keyword argument {unknown[0]!r}")
        return cls(tuple(ratios), tuple(aligns), **options)


class Plan:
    """A request that fits a model and its tokenizer.

    Parameters
    ----------
    model : nn.Module
        Its weights are not read; they may be on the device "meta".
    tokenizer : transformers tokenizer
    request : Request
    name : str
        Of the model, for the mask.

    Raises
    ------
    LearnError, DataError
        It does not fit; the message is one line.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, request: Request, name: str) -> None:
        # Where a folder is, is nobody's business but the user's.
        self.request, self.name = request, Path(name).name if os.path.isdir(name) else name
        try:
            self.layout: Layout = inspect_learnable(model)
            self._check_targets()
        except (TypeError, ValueError) as error:
            raise LearnError(str(error)) from error
        _check_vocabulary(tokenizer, model)
        if request.report:
            _check_report()
        self.start = self._start()
        self.outputs = self._outputs()
        self.folder = self._folder()
        settings = request.settings
        self.feed = Feed(
            tokenizer,
            request.data,
            n_steps=settings.stage1_steps + settings.stage2_steps,
            window=request.sink + request.recent,
            context=getattr(model.config, "max_position_embeddings", None),
        )
        self._tokenizer_digest = _tokenizer_digest(tokenizer)
        for path in (*self.outputs.values(), self.folder):
            if path is not None:
                _check_writable(path)

    @property
    def targets(self) -> list[Target]:
        """What masks are learned for, in order."""
        pairs = itertools.product(self.request.ratios, self.request.aligns)
        return [Target(float(ratio), int(align)) for ratio, align in pairs]

    def settings_of(self, target: Target) -> Settings:
        """Return how the mask of a target is learned."""
        return dataclasses.replace(self.request.settings, ratio=target.ratio, align=target.align)

    def identity(self, model: nn.Module) -> dict[str, Any]:
        """Return what decides the result of the run, to compare when it is resumed."""
        r = self.request
        settings = dataclasses.asdict(r.settings)
        data = dataclasses.asdict(r.data)
        del settings["ratio"], settings["align"], data["text"], data["n_test"]
        start = r.start if isinstance(self.start, str) else _digest(self.start.tobytes())
        return {
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "model": _weights_digest(model),
            "tokenizer": self._tokenizer_digest,
            "text": self.feed.corpus.digest,
            "ratios": list(r.ratios),
            "aligns": list(r.aligns),
            "sink": r.sink,
            "recent": r.recent,
            **settings,
            **{key: list(v) if isinstance(v, tuple) else v for key, v in data.items()},
            "lengths": list(self.feed.lengths),
            "start": str(start),
            "chunk": r.chunk,
        }

    def check_device(self, dtype: torch.dtype, device: torch.device) -> None:
        """Refuse weights that the kernels of a GPU cannot attend with; LearnError."""
        if device.type != "cuda":
            return
        try:
            from leank.learning.ops_cuda import check_kind  # needs an extension built with CUDA

            check_kind(dtype, self.layout.head_dim)
        except (ImportError, TypeError, ValueError) as error:
            raise LearnError(f"device: {device}: {error}") from error

    def mask(self, target: Target, keep: np.ndarray, result: str) -> ChannelMask:
        """Return the mask of a target with the window and how it was learned."""
        r, s, d = self.request, self.request.settings, self.request.data
        low, high = self.feed.lengths
        method = (
            f"leank {leank.__version__} learn, ratio {target.ratio:g} of {s.budget}, "
            f"align {target.align}, start {r.start}; stage 1: {s.stage1_steps} steps, lr {s.lr:g}, "
            f"penalty {s.penalty:g}; stage 2: {s.stage2_steps} steps, lr {s.stage2_lr:g}, "
            f"gradual {s.gradual:g}, fade {s.fade:g}, live {s.live:g}, "
            f"zero_every {s.zero_every}; batches of {d.batch_size}, "
            f"{low} to {high} tokens, kinds {', '.join(d.kinds)}, weights {d.weights}, "
            f"seed {d.seed}, text {self.feed.corpus.digest}; {result}"
        )
        return ChannelMask(keep, r.sink, r.recent, target.align, self.name, method)

    # ------------------------------------------------------------------------------- checks

    def _check_targets(self) -> None:
        r = self.request
        if not r.ratios or not r.aligns:
            raise LearnError("ratio: expected at least one, and one align, got none")
        if len(set(self.targets)) != len(self.targets):
            raise LearnError(f"ratio, align: expected each once, got {r.ratios} and {r.aligns}")
        if r.chunk < 1:
            raise LearnError(f"chunk: expected at least 1, got {r.chunk}")
        for target in self.targets:
            dense = np.ones((1, 1, self.layout.head_dim), np.float32)
            choose_channels(dense, target.ratio, target.align, r.settings.budget)
            ChannelMask(dense > 0, r.sink, r.recent, target.align)

    def _start(self) -> str | np.ndarray:
        start, shape = self.request.start, self.layout.mask_shape
        if start in STARTS:
            return str(start)
        try:
            if Path(start).suffix == ".npy":
                alpha = np.load(start, allow_pickle=False).astype(np.float32)
            else:
                alpha = leank.load_mask(start).keep.astype(np.float32)
        except (MaskFileError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LearnError(
                f"start: expected {', '.join(STARTS)}, a mask or .npy file, got {start}: {reason}"
            ) from error
        if alpha.shape != shape or not ((alpha >= 0) & (alpha <= 1)).all():
            raise LearnError(
                f"start: expected factors from 0 to 1 of shape {shape}, got {alpha.shape}, "
                f"{alpha.min()} to {alpha.max()}, in {start}"
            )
        return alpha

    def _outputs(self) -> dict[Target, Path | None]:
        template = self.request.output
        if template is None:
            return dict.fromkeys(self.targets)
        paths = {}
        for target in self.targets:
            path = _fill(template, ratio=f"{target.ratio:g}", align=str(target.align))
            if path in paths.values():
                raise LearnError(
                    "output: expected the fields {ratio} and {align} where these differ, since "
                    f"each mask has a file of its own, got {template}"
                )
            if path.is_dir():
                raise LearnError(f"output: expected a file, got the folder {path}")
            paths[target] = path
        return paths

    def _folder(self) -> Path | None:
        r = self.request
        if r.folder is not None:
            if Path(r.folder).exists() and not Path(r.folder).is_dir():
                raise LearnError(f"folder: expected a folder, got the file {r.folder}")
            return Path(r.folder)
        if r.output is not None:
            path = _fill(r.output, ratio="all", align="all")
            return path.with_name(path.name + ".run")
        if r.resume or r.report:
            raise LearnError("folder: expected one, or an output, to resume or report; got none")
        return None


def _fill(template: str | Path, **fields: str) -> Path:
    template = os.fspath(template)
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        if not used <= fields.keys():
            raise ValueError
        return Path(template.format(**fields))
    except ValueError as error:
        raise LearnError(
            f"output: expected no fields but {{ratio}} and {{align}}, got {template}"
        ) from error


def _check_vocabulary(tokenizer: Any, model: nn.Module) -> None:
    n_rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_rows:
        raise LearnError(
            f"tokenizer: expected at most {n_rows:,} tokens, as the model's embedding has, got "
            f"{len(tokenizer):,}; is it the tokenizer of another model?"
        )


def _check_report() -> None:
    try:
        import leank.learning.evaluate
        import leank.learning.report  # noqa: F401
    except ImportError as error:
        raise LearnError(f"report: needs {error.name}: pip install 'leank[learn]'") from error


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LearnError(
            f"output: cannot write to {path.parent}: {error.strerror or error}"
        ) from error


# ------------------------------------------------------------------------------------ digests


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    whole = tokenizer.backend_tokenizer.to_str()
    return _digest(whole.encode(), str(tokenizer.chat_template).encode())


def _weights_digest(model: nn.Module) -> str:
    """Return a digest of names, shapes and 64 elements of each weight."""
    parts = []
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().contiguous()
        parts += [
            f"{name} {tuple(weight.shape)}".encode(),
            some.view(torch.uint8).numpy().tobytes(),
        ]
    return _digest(*parts)
