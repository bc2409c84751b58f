"""``generate()`` need not wait for each step on a GPU before it queues the next one.

transformers can read one step late whether all rows are finished, and undo the step too many; it
does so on "mps" alone. With a ``LeanKCache`` on an NVIDIA GPU it does so here, too: for a model of
8B shape and one row the GPU waited for the host in an eighth of each step (kernels/README.md,
"Patched models"). All other calls are as they were.
"""

from __future__ import annotations

import torch
from transformers.generation import utils

from .cache import LeanKCache

_Theirs = utils.DeferredStopCheck


class _StopCheck(_Theirs):
    """transformers' class, for a ``LeanKCache`` on a GPU as well."""

    @staticmethod
    def is_supported(
        device: torch.device, cache: object, cache_is_returned: bool, is_assistant: bool
    ) -> bool:
        """Whether to tell one step late."""
        first = cache.packed[0] if isinstance(cache, LeanKCache) else None
        if first is None or not first.counts_on_device or device.type != first.device_type:
            return _Theirs.is_supported(device, cache, cache_is_returned, is_assistant)
        # To undo a column must lose nothing, which sliding windows of fixed length cannot do.
        can_undo = not cache_is_returned or (cache.is_croppable and first.window["slack"] > 0)
        return can_undo and not is_assistant

    def __init__(self, input_ids, max_length, cache, cache_is_returned, streamer=None) -> None:
        is_ours = isinstance(cache, LeanKCache)
        self._ours = cache if is_ours else None
        self._to_crop = self._ours if cache_is_returned else None
        # Steps that fit: one too many would end in an error where there was none.
        self._room = cache.max_cache_len - cache.n_columns if is_ours else None
        # Theirs would have layers record what a crop needs, which slack holds anyway.
        super().__init__(input_ids, max_length, cache, cache_is_returned and not is_ours, streamer)

    def __call__(self, unfinished_sequences, tokens, length: int) -> bool:
        """Whether to stop; for a next step that would not fit it waits, and raises if it comes."""
        stops = super().__call__(unfinished_sequences, tokens, length)
        if self._room is None or stops:
            return stops
        self._room -= 1
        if self._room >= 0:
            return False
        if unfinished_sequences.max() == 0:
            return True
        self._ours.packed[0].check_room(1)  # a graph would not know
        return False

    def finish(self) -> int:
        """Take back what was computed too much; returns how many steps."""
        n_steps = super().finish()
        if n_steps and self._to_crop is not None:
            self._to_crop.check()  # a crop forgets what went wrong
            self._to_crop.crop(-n_steps)
        return n_steps


def register() -> None:
    """Let ``generate()`` know of it; what transformers knows without LeanK stays the same."""
    utils.DeferredStopCheck = _StopCheck
