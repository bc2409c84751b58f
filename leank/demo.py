"""``leank demo``: one text, one question, a dense and a pruned cache, measured together.

The text is read into each cache once. Only then is the question asked, so that everything the
pruned model says about the text comes out of the pruned cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import leank
from leank import demo_text, smollm2
from leank.demo_measure import TIMED_STEPS, Bars, Measured, measure
from leank.loading import quiet, reason

_MASK = "smollm2-135m-instruct-70"
_MODEL = "SmolLM2-135M-Instruct"


class DemoError(Exception):
    """A mistake in what the user asked for; its text is one line."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``leank demo``; None is the demo's own."""

    model: str | None = None
    mask: str | Path | None = None
    text: Path | None = None
    question: str | None = None
    max_new_tokens: int = 48
    threads: int | None = None
    dtype: str = "float32"
    sink: int | None = None
    recent: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What was asked, and what was measured."""

    model: str
    dtype: str
    n_threads: int
    mask: leank.ChannelMask
    source: str
    n_text: int  # tokens that are read before the question, the chat template's included
    question: str
    fact: str | None  # the sentence to find, where the demo knows it
    fact_token: int  # its place among the tokens
    measured: Measured


def run(options: Options, bars: Console) -> Result:
    """Measure; progress bars go to `bars`.

    Raises
    ------
    DemoError
        If a file, the mask, the model or the text cannot be used.
    """
    text, question = _text_and_question(options)
    mask = _mask(options)
    with _threads(options.threads), quiet(), Bars(bars) as drawn:
        with drawn.bar("Loading the model", 1):
            model, tokenizer = _model(options)
        head, tail = encode(tokenizer, text, question)
        _check_length(model, head.shape[1], tail.shape[1], options.max_new_tokens)
        try:
            patched = leank.patch(model, mask)
        except (TypeError, ValueError) as error:
            raise DemoError(reason(error)) from error
        with patched, torch.inference_mode():
            measured = measure(patched, tokenizer, head, tail, options.max_new_tokens, drawn)
        n_threads = torch.get_num_threads()
    own = options.text is None and options.question is None  # then we know what is to be found
    return Result(
        model=options.model or _MODEL,
        dtype=options.dtype,
        n_threads=n_threads,
        mask=mask,
        source=demo_text.SOURCE if options.text is None else str(options.text),
        n_text=head.shape[1],
        question=question,
        fact=demo_text.FACT if own else None,
        fact_token=_place(tokenizer, text, question) if own else 0,
        measured=measured,
    )


def _text_and_question(options: Options) -> tuple[str, str]:
    if options.text is None:
        text, default = demo_text.logbook(), demo_text.QUESTION
    else:
        default = None
        try:
            text = options.text.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"text: {options.text}: {reason(error)}") from error
        if not text:
            raise DemoError(f"text: expected some text, got nothing in {options.text}")
    question = default if options.question is None else options.question.strip()
    if question is None:
        raise DemoError("question: expected one about your text, got none; give --question")
    if not question:
        raise DemoError("question: expected some text, got nothing")
    return text, question


def _mask(options: Options) -> leank.ChannelMask:
    try:
        mask = leank.load_mask(options.mask or _MASK)
    except (leank.MaskFileError, ModuleNotFoundError) as error:
        raise DemoError(f"mask: {error}") from error
    except OSError as error:
        raise DemoError(f"mask: {options.mask}: {reason(error)}") from error
    given = {"sink": options.sink, "recent": options.recent}
    mask = dataclasses.replace(mask, **{k: n for k, n in given.items() if n is not None})
    missing = [f"--{name}" for name in given if getattr(mask, name) is None]
    if missing:
        raise DemoError(f"mask: the file does not say its window; give {' and '.join(missing)}")
    return mask


def _model(options: Options) -> tuple[Any, Any]:
    try:
        name = str(smollm2.model_path()) if options.model is None else options.model
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        dtype = getattr(torch, options.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    # How transformers says that there is no such model, or that it needs another package.
    except (ImportError, OSError, ValueError) as error:
        raise DemoError(f"model: {options.model or _MODEL}: {reason(error)}") from error
    return model.eval(), tokenizer


def encode(tokenizer: Any, text: str, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens [1, T] before the question, and those from the question on."""
    if plain := tokenizer.chat_template is None:
        head, tail = f"{text}\n\n", f"Question: {question}\nAnswer:"
    else:
        message = {"role": "user", "content": f"{text}\n\n{question}"}
        chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        start = chat.rindex(question)
        head, tail = chat[:start], chat[start:]
    # A chat template writes its special tokens itself.
    first = tokenizer(head, add_special_tokens=plain, return_tensors="pt").input_ids
    second = tokenizer(tail, add_special_tokens=False, return_tensors="pt").input_ids
    return first, second


def _place(tokenizer: Any, text: str, question: str) -> int:
    before = text[: text.index(demo_text.FACT)]
    return encode(tokenizer, before, question)[0].shape[1]


def _check_length(model: Any, n_head: int, n_tail: int, max_new_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    n_after = n_tail + max(max_new_tokens, TIMED_STEPS + 1)
    if limit is not None and n_head + n_after > limit:
        raise DemoError(
            f"text: expected at most {max(0, limit - n_after):,} tokens, since the model's context "
            f"has {limit:,} and question and answer need {n_after}, got {n_head:,}"
        )


@contextlib.contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
