"""One evaluation: everything that is checked before it, the loop over items, and its folder.

==================  ===============================================================================
``log.jsonl``       the settings, then a line per item; a stopped evaluation goes on from it
``results.json``    settings and summary, written at the end in one step
``needle-*.png``    a heat map for each method, depth x length (with matplotlib)
``bytes.png``       mean score against bytes (with matplotlib)
==================  ===============================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import leank
from leank._files import replacing
from leank.evaluation import ruler
from leank.evaluation.ask import Forcing, Generating
from leank.evaluation.items import Suite, SuiteSettings
from leank.evaluation.log import Log
from leank.evaluation.methods import (
    BASELINES,
    DENSE,
    QUANTIZED,
    EvalError,
    make_methods,
    moments_text,
)
from leank.evaluation.summary import summarise
from leank.learning.folder import ResumeError
from leank.learning.text import default_text, read_text, split
from leank.mask_source import load_mask
from leank.masks import ChannelMask
from leank.models import DTYPES

LOG, RESULTS = "log.jsonl", "results.json"


@dataclass(frozen=True)
class Request:
    """What to evaluate, and where to put it.

    Attributes
    ----------
    masks : sequence of str
        What `leank.load_mask` takes.
    folder : Path
        Made if it is not there.
    suite : SuiteSettings
    baselines : sequence of str
        Some of `leank.evaluation.methods.BASELINES`.
    fast : bool
        Teacher-forced instead of generate().
    prefill : {"dense", "pruned"}
        As in `leank.patch`; "pruned" reads prompts in calls of `chunk` tokens.
    sink, recent : int, optional
        Window of all masks; default: what each knows.
    text : sequence of Path
        UTF-8 files; none: what ships with Python.
    qa, qa_text : Path, optional
        Questions, and the text that they are about.
    resume : bool
    """

    masks: tuple[str, ...]
    folder: Path
    suite: SuiteSettings = SuiteSettings()
    baselines: tuple[str, ...] = ()
    fast: bool = False
    prefill: str = "dense"
    chunk: int = 1024
    sink: int | None = None
    recent: int | None = None
    text: tuple[Path, ...] = ()
    qa: Path | None = None
    qa_text: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        if not self.masks:
            raise EvalError("mask: expected at least one, got none")
        for baseline in self.baselines:
            if baseline not in BASELINES:
                raise EvalError(
                    f"baseline: expected some of {', '.join(BASELINES)}, got {baseline!r}"
                )
        if len(set(self.baselines)) < len(self.baselines):
            raise EvalError(f"baseline: expected each once, got {', '.join(self.baselines)}")
        if self.prefill not in ("dense", "pruned"):
            raise EvalError(f"prefill: expected dense or pruned, got {self.prefill}")
        if self.chunk < 1:
            raise EvalError(f"chunk: expected at least 1, got {self.chunk}")
        if (self.qa is None) != (self.qa_text is None):
            raise EvalError("qa: expected --qa and --qa-text together, got one of them")
        if self.fast and self.prefill != "dense":
            raise EvalError("prefill: expected dense with --fast, which reads prompts densely")
        quantized = [name for name in self.baselines if name in QUANTIZED]
        if self.fast and quantized:
            raise EvalError(
                f"baseline: expected no quantized cache with --fast, which has none, got "
                f"{quantized[0]}"
            )


class Evaluation:
    """An evaluation that is ready to run; making it reads masks and text, and makes first items.

    Parameters
    ----------
    request : Request
    tokenizer : transformers tokenizer
    name : str
        Of the model.

    Attributes
    ----------
    n_done : int
        Items that the folder has, since `run` was called.
    """

    def __init__(self, request: Request, tokenizer: Any, name: str) -> None:
        self.request, self.tokenizer, self.name = request, tokenizer, name
        self.n_done = 0
        self.masks = read_masks(request.masks, request.sink, request.recent)
        corpus = split(read_text(request.text) if request.text else default_text())
        documents = ()
        questions: tuple[ruler.Question, ...] = ()
        settings = request.suite
        if request.qa is not None:
            documents = read_documents(request.qa_text, tokenizer)
            questions = ruler.read_questions(request.qa, documents)
            if ruler.QA not in settings.tasks:
                settings = dataclasses.replace(settings, tasks=(*settings.tasks, ruler.QA))
        self.suite = Suite(settings, corpus, tokenizer, questions=questions, documents=documents)
        self._moments = (
            moments_text(corpus, tokenizer, settings.seed)
            if "moments" in request.baselines
            else None
        )
        self.header = {
            "leank": leank.__version__,
            "model": name,
            "masks": {name: _digest(mask) for name, mask in self.masks.items()},
            "baselines": list(request.baselines),
            "fast": request.fast,
            "prefill": request.prefill
            if request.prefill == "dense"
            else f"pruned, {request.chunk}",
            "suite": dataclasses.asdict(settings) | {"tasks": list(settings.tasks)},
            "text": corpus.digest,
            "qa": hashlib.blake2b(repr((questions, documents)).encode(), digest_size=8).hexdigest(),
        }

    def check_model(self, config: Any) -> None:
        """Require that a model has room for the items; before its weights are loaded."""
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(self.suite.settings.lengths)
        if limit is not None and longest > limit:
            raise EvalError(
                f"lengths: expected at most {limit:,} tokens, the model's context, got {longest:,}"
            )

    def run(
        self, model: nn.Module, progress: Callable[[int, int], None] | None = None
    ) -> list[dict[str, Any]]:
        """Ask all items, and write the folder; return the summary.

        Parameters
        ----------
        model : nn.Module
            Not patched.
        progress : callable, optional
            Called with the numbers of items done and of all.

        Raises
        ------
        EvalError
            A mask or a baseline does not work with the model.
        ResumeError
            The folder's log is of another evaluation, or of one that stopped and is to be resumed.
        """
        request, folder = self.request, self.request.folder
        header = self.header | {"dtype": DTYPES.get(model.dtype, str(model.dtype))}
        try:
            methods = make_methods(
                model,
                self.masks,
                request.baselines,
                text=self._moments,
                seed=self.suite.settings.seed,
            )
            if request.fast:
                ask: Callable = Forcing(model, methods)
            else:
                # What does not fit is found now, not in the middle.
                for mask in self.masks.values():
                    with leank.patch(model, mask, prefill=request.prefill):
                        pass
                ask = Generating(model, self.tokenizer, methods, request.prefill, request.chunk)
        except EvalError:
            raise
        except (TypeError, ValueError) as error:
            raise EvalError(str(error)) from error
        folder.mkdir(parents=True, exist_ok=True)
        if not request.resume:
            _start_over(folder)
        n = len(self.suite)
        with Log(folder / LOG, header, request.resume) as log:
            self.n_done = len(log.records)
            for i in range(self.n_done, n):
                item = self.suite[i]
                answers = ask(item)
                log.add(
                    {
                        "task": item.task,
                        "length": item.length,
                        "index": item.index,
                        "n_tokens": len(item.prompt),
                        "depth": item.depth,
                        "expected": list(item.sample.expected),
                        "methods": {
                            method.name: dataclasses.asdict(answer)
                            for method, answer in zip(methods, answers, strict=True)
                        },
                    }
                )
                self.n_done = i + 1
                if progress is not None:
                    progress(self.n_done, n)
            summary = summarise(log.records, {m.name: m.shares() for m in methods})
        results = {"settings": header, "methods": summary}
        with replacing(folder / RESULTS) as file:
            file.write(json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
        return summary


def _start_over(folder: Path) -> None:
    """Forget an evaluation that ended; its results say that it did. One that stopped is kept."""
    results, log = folder / RESULTS, folder / LOG
    if not results.exists() and log.is_file():
        n_done = log.read_bytes().count(b"\n") - 1  # the first line is the settings
        if n_done > 0:
            raise ResumeError(
                f"output: {folder} has an evaluation that stopped after {n_done} items; "
                "go on with --resume, or remove the folder"
            )
    results.unlink(missing_ok=True)


def read_masks(
    names: Sequence[str], sink: int | None = None, recent: int | None = None
) -> dict[str, ChannelMask]:
    """Return masks by short names: those of shipped masks, or of files without their ending."""
    window = {"sink": sink, "recent": recent}
    window = {key: n for key, n in window.items() if n is not None}
    masks: dict[str, ChannelMask] = {}
    for given in names:
        try:
            mask = dataclasses.replace(load_mask(given), **window)
        except (ValueError, ModuleNotFoundError) as error:  # MaskFileError is a ValueError
            raise EvalError(f"mask: {error}") from error
        except OSError as error:
            raise EvalError(f"mask: {given}: {error.strerror or error}") from error
        if mask.sink is None or mask.recent is None:
            raise EvalError(f"mask: {given} does not say its window; give --sink and --recent")
        name = Path(given).name.removesuffix(".safetensors").removesuffix(".pth")
        if name in (DENSE, *BASELINES, *masks):
            raise EvalError(f"mask: expected files of different names than others, got {name}")
        masks[name] = mask
    return masks


def read_documents(path: Path, tokenizer: Any) -> tuple[str, ...]:
    """Return the paragraphs of a text; those with a special token of the model are left out."""
    [text] = read_text([path])
    special = [token for token in tokenizer.all_special_tokens if token]
    paragraphs = (" ".join(p.split()) for p in text.split("\n\n"))
    return tuple(dict.fromkeys(p for p in paragraphs if p and not any(t in p for t in special)))


def _digest(mask: ChannelMask) -> str:
    kept = hashlib.blake2b(mask.keep.tobytes(), digest_size=8).hexdigest()
    return f"{kept}, window {mask.sink} + {mask.recent}"
