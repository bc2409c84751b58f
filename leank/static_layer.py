"""One layer of a ``LeanKCache`` of fixed length: its pages are reserved before the first token."""

from __future__ import annotations

import numpy as np
import torch

from . import _C
from .cache_layer import LeanKLayer

# Tokens that are attended to and stored at once after the prompt: the dropped channels of as many
# are reserved, and longer calls come in pieces.
PIECE = _C.PAGE_TOKENS


class LeanKStaticLayer(LeanKLayer):
    """One layer for at most ``max_cache_len`` columns, which compiled forwards can use."""

    is_compileable = True

    def __init__(self, keep: np.ndarray, *, max_cache_len: int, **window: int) -> None:
        super().__init__(keep, **window)
        self.max_cache_len = max_cache_len

    def make_store(self, **sizes) -> _C.LayerCache:
        """Reserve pages; after a reset those that there are, if they fit."""
        if self.store is not None and all(
            getattr(self.store, name) == size for name, size in sizes.items()
        ):
            return self.store
        return super().make_store(**sizes, max_tokens=self.max_cache_len, max_call=PIECE)

    def piece_columns(self, n_columns: int) -> int:
        """Columns of a call that go together: how it is cut makes no difference to its result.

        Unless it is the prompt, which is not cut.
        """
        is_open = self.store.prompt_lengths < 0
        if is_open.any() and not is_open.all() and n_columns > PIECE:
            raise ValueError(
                f"k: expected at most {PIECE} columns because row {int(is_open.argmax())} of a "
                f"cache with max_cache_len has no token yet, got {n_columns}"
            )
        return n_columns if is_open.any() else PIECE

    def check_room(self, n_columns: int) -> None:
        """Require that so many columns more fit."""
        total = self.n_columns + n_columns
        if total > self.max_cache_len:
            raise ValueError(
                f"max_cache_len: expected at least {total}, the columns that the cache holds and "
                f"the {n_columns} of this call, got {self.max_cache_len}"
            )

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Check K and V, also that they fit, and return them."""
        self.check_room(key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Fail: what a crop may need would not fit into the reserved pages."""
        raise ValueError(
            "max_cache_len: expected a cache that grows for assisted generation or to record what "
            f"a crop needs, got one with max_cache_len={self.max_cache_len}"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers: always those that can ever be."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Columns that fit."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens and the announced prompt; the pages stay reserved."""
        store = self.store
        super().reset()
        if store is not None:
            store.reset()
            self.store = store
