"""Learning a mask: its attention, data, and two stages. Imports PyTorch.

What needs transformers as well is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from leank.learning.ops import mixed_attention

if TYPE_CHECKING:
    from leank.learning.feed import DataSettings
    from leank.learning.folder import ResumeError
    from leank.learning.plan import LearnError, Request, Target
    from leank.learning.run import Event, learn, learn_many
    from leank.learning.text import DataError
    from leank.learning.train import DivergedError, Settings, Step

_HOMES = {
    "DataError": "text",
    "DataSettings": "feed",
    "DivergedError": "train",
    "Event": "run",
    "LearnError": "plan",
    "Request": "plan",
    "ResumeError": "folder",
    "Settings": "train",
    "Step": "train",
    "Target": "plan",
    "learn": "run",
    "learn_many": "run",
}

__all__ = [
    "DataError",
    "DataSettings",
    "DivergedError",
    "Event",
    "LearnError",
    "Request",
    "ResumeError",
    "Settings",
    "Step",
    "Target",
    "learn",
    "learn_many",
    "mixed_attention",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'leank.learning' has no attribute {name!r}")
    return getattr(import_module(f"leank.learning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
