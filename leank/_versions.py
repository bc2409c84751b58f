"""The oldest transformers that LeanK works with."""

from __future__ import annotations

import functools
import re

OLDEST_TRANSFORMERS = 5, 21  # as in pyproject.toml, of which nothing is left where pip did not look


@functools.cache
def old_transformers() -> str | None:
    """Say what is wrong with the transformers that is installed, without importing it.

    With an older one, calls would fail in the middle: its caches have other methods.
    """
    import importlib.metadata  # 20 ms

    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(x) for x in re.findall(r"\d+", version)[:2])
    if numbers >= OLDEST_TRANSFORMERS:
        return None
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    return f"transformers: expected {oldest} or newer, got {version}: pip install 'leank[hf]'"
