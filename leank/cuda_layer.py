"""One layer of a ``LeanKCache`` on an NVIDIA GPU, over ``leank.cuda.LayerCache``.

The prompt attends by the framework's attention; what comes of it before its last call is kept
dense until then. A step of one column after the prompt reads nothing on the host that depends on a
length, so that a compiled model can be captured in CUDA graphs: what is wrong with a step is noted
on the GPU, for `check`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ._cuda_ops import NO_COLUMN
from .cache_layer import NewTokens
from .cuda import LayerCache, decode, read_columns
from .static_layer import LeanKStaticLayer


class _Prompt:
    """The first columns of a prompt of which more is to come: dense K and V, and what is a token.

    Room for all of it is taken at once, so that columns are written in place, in inference mode and
    outside of it.
    """

    @torch.inference_mode(False)
    def __init__(self, k: torch.Tensor, v: torch.Tensor, n_all: int) -> None:
        shape = (*k.shape[:2], n_all, k.shape[3])
        self.k, self.v = (x.new_empty(shape) for x in (k, v))
        self.valid = torch.ones(len(k), n_all, dtype=torch.bool, device=k.device)
        self.n_columns = 0

    def put(
        self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write columns behind those that are there; return K and V with them, and count none."""
        n = self.n_columns + k.shape[2]
        new = slice(self.n_columns, n)
        self.k[:, :, new], self.v[:, :, new] = k.detach(), v.detach()
        self.valid[:, new] = True if valid is None else valid
        return self.k[:, :, :n], self.v[:, :, :n]

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> _Prompt:
        """Return one whose row i is row rows[i], with tensors of its own."""
        index = torch.from_numpy(rows).to(self.k.device)
        new = _Prompt.__new__(_Prompt)
        new.k, new.v, new.valid = self.k[index], self.v[index], self.valid[index]
        new.n_columns = self.n_columns
        return new


class LeanKCudaLayer(LeanKStaticLayer):
    """One layer for at most ``max_cache_len`` columns, whose pages and lengths are on a GPU."""

    device_type = "cuda"
    dtypes = ("bfloat16", "float16")
    counts_on_device = True

    # The first column that a step stored with another mask than that of the columns before it, on
    # the device: int32 [], at least NO_COLUMN if there is none.
    misfit: torch.Tensor | None = None

    def __init__(self, keep: np.ndarray, **options: int) -> None:
        super().__init__(keep, **options)
        # What there is of a prompt that is not complete.
        self.prompt: _Prompt | None = None
        # Columns since which a crop has to lose nothing, while the past is recorded.
        self._held_from = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve pages where K is; after a reset those that there are serve, if they fit."""
        sizes = {
            "n_rows": key_states.shape[0],
            "dtype": key_states.dtype,
            "device": key_states.device,
        }
        if self.store is None or any(getattr(self.store, name) != x for name, x in sizes.items()):
            self.store, self.is_initialized = None, False  # first, so that there is room
            store = LayerCache(self.keep, max_tokens=self.max_cache_len, **self.window, **sizes)
            self._keep_misfit(torch.full((), NO_COLUMN, dtype=torch.int32, device=store.device))
            self.store = store
        self.store.tell_columns(0)
        self.is_initialized = True

    @torch.inference_mode(False)  # else it could only be changed in that mode
    def _keep_misfit(self, misfit: torch.Tensor) -> None:
        self.misfit = misfit.clone()
        torch._dynamo.mark_static_address(self.misfit, guard=False)

    # ---------------------------------------------------------------------------------- attention

    def check_room(self, n_columns: int) -> None:
        """Require that so many columns more fit, and can be taken back if the past is recorded."""
        super().check_room(n_columns)
        if not self.record_past:
            return
        total, start = self.n_columns + n_columns, self._held_from
        if not self.is_initialized or self.store.is_empty:  # the prompt is not cropped
            start = max(start, self.prompt_columns or total)
        slack = self.window["slack"]
        if total - start > slack:
            raise NotImplementedError(
                f"k: expected at most slack = {slack} columns between crops while the past is "
                f"recorded (drafts of assisted generation) on a GPU, got {total - start}"
            )

    def can_step(self, n_columns: int) -> bool:
        """Whether a next call of so many columns is a step: one column after the prompt."""
        is_after_prompt = self.is_initialized and self.prompt is None and not self.store.is_empty
        return n_columns == 1 and is_after_prompt

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Check K and V and return them; for a step `decode` checks them."""
        if self.can_step(key_states.shape[-2]):
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def dense_columns(self, n_columns: int) -> int:
        """How many of a next call's columns are of the prompt: the first ones."""
        if self.n_columns and self.prompt is None:
            return 0
        if self.prompt_columns is None:
            return n_columns
        return min(n_columns, self.prompt_columns - self.n_columns)

    def prefill(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        mask: torch.Tensor | None,
        dense: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Attend with columns of the prompt, densely; store them when it is complete."""
        n_past, n_columns = self.n_columns, self.n_columns + k.shape[2]
        n_all = self.prompt_columns or n_columns
        if not n_past and n_columns == n_all:
            out = super().prefill(query, k, v, valid, mask, dense)
        else:
            prompt = self.prompt or _Prompt(k, v, n_all)
            all_k, all_v = prompt.put(k, v, valid)
            if not n_past:
                out = dense(query, k, v, mask)  # with a gradient, if it is asked for
            else:
                mask = _causal(query, n_columns) if mask is None else mask
                out = dense(query, all_k, all_v, mask)
            if n_columns < n_all:
                prompt.n_columns, self.prompt = n_columns, prompt
            else:
                self.append(prompt.k, prompt.v, prompt.valid)
                self.prompt = None
        if self.record_past:
            self.hold_past(True)
        return out

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
        return valid

    def attend(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        terms: dict,
    ) -> torch.Tensor:
        """Store columns after the prompt and attend, by the kernels; returns [B, T, Hq, Dv]."""
        # A model that is compiled is on one GPU.
        if valid is not None and valid.device != query.device:
            valid = valid.to(query.device)
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
        return out.transpose(1, 2).contiguous()

    def check(self) -> None:
        """Raise if steps of a compiled model went wrong; waits for the GPU."""
        if self.store is None:
            return
        self.store.check()
        if int(self.misfit) < NO_COLUMN:
            raise ValueError(
                "attention_mask: expected the padding that the cache was filled with, and no "
                "columns to come, got another mask in a step; what was computed since is wrong"
            )

    # ------------------------------------------------------------------------- lengths, whole rows

    @property
    def n_columns(self) -> int:
        """Columns stored, for a forward that runs; others ask `counts`. May wait for the GPU."""
        if self.prompt is not None:
            return self.prompt.n_columns
        return self.store.columns_of_call if self.is_initialized else 0

    @staticmethod
    def counts(layers: list[LeanKCudaLayer]) -> list[int]:
        """Columns that each layer holds; waits for the GPU once, not for each of them."""
        stores = [x.store for x in layers if x.is_initialized and x.prompt is None]
        counts = iter(read_columns(stores))
        return [
            next(counts) if x.is_initialized and x.prompt is None else x.n_columns for x in layers
        ]

    @staticmethod
    def tell_columns(layers: list[LeanKCudaLayer], n_columns: int) -> None:
        """Let the next call of each layer go without asking a GPU how many columns there are."""
        for layer in layers:
            if layer.is_initialized and layer.prompt is None and layer.store.may_be_replayed:
                layer.store.tell_columns(n_columns)

    @property
    def real(self) -> np.ndarray:
        """Which columns are tokens: bool [B, columns]. Waits for the GPU."""
        if self.prompt is not None:
            return self.prompt.valid[:, : self.n_columns].cpu().numpy()
        return self.store.real

    def has_padding(self) -> bool:
        """Whether some column is no token of some row. Waits for the GPU."""
        return not self.real.all()

    def get_seq_length(self) -> int | torch.Tensor:
        """Columns stored; a tensor on the GPU once only the GPU knows."""
        if not self.is_initialized or self.prompt is not None:
            return self.n_columns
        if torch.compiler.is_compiling() or self.store.may_be_replayed:
            return self.store.columns
        return self.store.n_columns

    def activate_past_recording(self) -> None:
        """From now on, take no more columns between two crops than slack can give back."""
        self.record_past = True
        self.hold_past(True)

    def hold_past(self, on: bool) -> None:
        """Let a crop go back to the columns of now: those of `slack` are there anyway."""
        self._held_from = self.counts([self])[0]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that an index tensor or a boolean tensor names, in its order."""
        self.prepare_rows(indices)()

    def prepare_rows(self, indices: torch.Tensor) -> Callable[[], None]:
        """Return what does the rest of `batch_select_indices`; all memory is allocated by now."""
        if not self.n_columns:
            return lambda: None
        rows = np.arange(self.store.n_rows)[torch.as_tensor(indices).cpu().numpy()]
        change = self.store.prepare_select(rows)
        prompt = None if self.prompt is None else self.prompt.select(rows)

        def change_both() -> None:
            change()
            self.prompt = prompt

        return change_both

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.n_columns:
            self.batch_select_indices(torch.arange(self.store.n_rows).repeat_interleave(repeats))

    def crop_to(self, n_columns: int) -> None:
        """Keep the first ``n_columns`` columns; with none left, a new prompt is to come."""
        if self.prompt is not None and n_columns:
            self.prompt.n_columns = min(n_columns, self.prompt.n_columns)
        super().crop_to(n_columns)
        if self.misfit is not None:
            self.misfit.masked_fill_(self.misfit >= n_columns, NO_COLUMN)

    def reset(self) -> None:
        """Forget all tokens; the pages stay reserved, where they are."""
        super().reset()
        self.prompt, self._held_from = None, 0
        if self.misfit is not None:
            self.misfit.fill_(NO_COLUMN)

    def __deepcopy__(self, memo: dict) -> LeanKCudaLayer:
        """Copy with pages of its own."""
        new = super().__deepcopy__(memo)
        if self.misfit is not None:
            new._keep_misfit(self.misfit)
        if self.prompt is not None:
            new.prompt = self.prompt.select(np.arange(self.store.n_rows))
        return new


def _causal(query: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Return a mask [1, 1, T, n_columns] for the queries of the last T columns, to be added."""
    n_new = query.shape[2]
    mask = query.new_full((1, 1, n_new, n_columns), torch.finfo(query.dtype).min)
    return mask.triu(n_columns - n_new + 1)
