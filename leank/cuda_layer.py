"""One layer of a ``LeanKCache`` on an NVIDIA GPU, over ``leank.cuda.LayerCache``.

The prompt attends by the framework's attention and comes in one call; then each call brings one
column. Such a step reads nothing on the host that depends on a length, so that a compiled model can
be captured in CUDA graphs: what is wrong with a step is noted on the GPU, for `check`.
"""

from __future__ import annotations

import torch

from .cache_layer import NewTokens
from .cuda import LayerCache, decode
from .static_layer import LeanKStaticLayer


class LeanKCudaLayer(LeanKStaticLayer):
    """One layer for at most ``max_cache_len`` columns, whose pages and lengths are on a GPU."""

    device_type = "cuda"
    dtypes = ("bfloat16", "float16")
    counts_on_device = True

    # Whether a step's mask was not that of the columns stored: bool [] on the device.
    misfit: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve pages where K is; after a reset those that there are serve, if they fit."""
        sizes = {
            "n_rows": key_states.shape[0],
            "dtype": key_states.dtype,
            "device": key_states.device,
        }
        if self.store is None or any(getattr(self.store, name) != x for name, x in sizes.items()):
            self.store, self.is_initialized = None, False  # first, so that there is room
            self.store = LayerCache(
                self.keep, max_tokens=self.max_cache_len, **self.window, **sizes
            )
            self._keep_misfit(torch.zeros((), dtype=torch.bool, device=self.store.device))
        self.is_initialized = True

    @torch.inference_mode(False)  # else it could only be changed in that mode
    def _keep_misfit(self, misfit: torch.Tensor) -> None:
        self.misfit = misfit.clone()
        torch._dynamo.mark_static_address(self.misfit, guard=False)

    # ---------------------------------------------------------------------------------- attention

    def check_room(self, n_columns: int) -> None:
        """Require a whole prompt, or one column, that fits."""
        if self.n_columns and n_columns > 1:
            raise NotImplementedError(
                "k: expected one column per call after the prompt on a GPU, whose kernels attend "
                f"with one token per row so far, got {n_columns}"
            )
        if not self.n_columns and self.prompt_columns not in (None, n_columns):
            raise NotImplementedError(
                f"k: expected the announced prompt of {self.prompt_columns} columns in one call, "
                f"as a GPU's kernels need it so far, got {n_columns}"
            )
        super().check_room(n_columns)

    def append(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Store a prompt; valid: bool [B, T], anywhere."""
        self.store.append(k, v, None if valid is None else valid.to(k.device))

    def step_columns(self, tokens: NewTokens, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Return ``valid``, bool [B, 1], of a step.

        The first pruned layer reads it from the mask before lengths change; the last forgets it.
        """
        cache = tokens.cache
        if tokens.index == cache.first_packed:
            cache.columns = self.store.step_columns(mask, self.misfit)
        valid = cache.columns
        if tokens.index == cache.last_packed:
            cache.columns = None
        # A compiled model is on one GPU.
        return valid if torch.compiler.is_compiling() else valid.to(self.store.device)

    def attend(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor,
        terms: dict,
    ) -> torch.Tensor:
        """Store one column and attend, by the decode kernel; returns [B, 1, Hq, Dv] contiguous."""
        out = decode(
            self.store,
            query,
            k,
            v,
            valid=valid,
            scale=terms.get("scale"),
            softcap=terms.get("softcap") or 0.0,
            sinks=terms.get("sinks"),
        )
        return out.transpose(1, 2)

    def check(self) -> None:
        """Raise if steps of a compiled model went wrong; waits for the GPU."""
        if self.store is None:
            return
        self.store.check()
        if self.misfit:
            raise ValueError(
                "attention_mask: expected the padding that the cache was filled with, and no "
                "columns to come, got another mask in a step; what was computed since is wrong"
            )

    # ------------------------------------------------------------------------- lengths, whole rows

    @property
    def n_columns(self) -> int:
        """Columns stored; waits for the GPU once only the GPU knows."""
        return self.store.n_columns if self.is_initialized else 0

    def get_seq_length(self) -> int | torch.Tensor:
        """Columns stored; a tensor on the GPU once only the GPU knows."""
        if not self.is_initialized:
            return 0
        if torch.compiler.is_compiling() or self.store.may_be_replayed:
            return self.store.columns
        return self.store.n_columns

    def activate_past_recording(self) -> None:
        """Fail: drafts are several tokens per row."""
        raise NotImplementedError(
            "activate_past_recording: expected a cache on the CPU, got one on a GPU, which takes "
            "one token per row and call after the prompt so far, and no drafts"
        )

    def crop_to(self, n_columns: int) -> None:
        """Keep the first ``n_columns`` columns; with none left, a new prompt is to come."""
        super().crop_to(n_columns)
        if self.misfit is not None:
            self.misfit.zero_()

    def reset(self) -> None:
        """Forget all tokens; the pages stay reserved, where they are."""
        super().reset()
        if self.misfit is not None:
            self.misfit.zero_()

    def __deepcopy__(self, memo: dict) -> LeanKCudaLayer:
        """Copy with pages of its own."""
        new = super().__deepcopy__(memo)
        if self.misfit is not None:
            new._keep_misfit(self.misfit)
        return new
