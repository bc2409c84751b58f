"""Replay the corpus of the fuzz targets at the Python border; `make fuzz-replay` has the C ones."""

import os
from pathlib import Path

import pytest

from .fuzz import border

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
FILES = [path for name in border.TARGETS for path in sorted((CORPUS / name).iterdir())]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name, value in border.OFFLINE.items():
        monkeypatch.setitem(os.environ, name, value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name[:12]}")
def test_replay(path):
    package = {"mask_file": "safetensors", "pth": "torch", "cli": "typer"}[path.parent.name]
    pytest.importorskip(package, reason=f"needs {package}")
    border.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus():
    programs = {path.stem.removeprefix("fuzz_") for path in CORPUS.parent.glob("fuzz_*.c")}
    assert {path.name for path in CORPUS.iterdir()} == programs | set(border.TARGETS)
    files = (path for path in CORPUS.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in files) < 300_000
