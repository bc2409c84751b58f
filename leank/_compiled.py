"""Attention to a cache of fixed length inside of ``torch.compile``: one torch operator per layer.

A compiled graph knows the cache as one small tensor, its state: which cache it is, and how many
columns it holds. Both are read when the graph runs, so that one graph serves every cache, at every
length. The operator declares that it changes the state: torch keeps such calls in their order, and
drops none. What it changes behind torch's back, the pages, is read by no other operator.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .cache_layer import NewTokens

_caches: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)

_LIBRARY = torch.library.Library("leank", "FRAGMENT")
_LIBRARY.define(
    "attend_stored(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor(a!) state, int layer, "
    "Tensor? sinks, float? scale, float? softcap) -> Tensor"
)


def new_state(cache: object) -> torch.Tensor:
    """Return the state of a cache without columns: int64 [number of the cache, columns]."""
    number = next(_numbers)
    _caches[number] = cache
    with torch.inference_mode(False):  # else it could only be changed in that mode
        return torch.tensor([number, 0])


def attend(
    query: torch.Tensor, tokens: NewTokens, mask: torch.Tensor | None, terms: dict
) -> torch.Tensor:
    """Attend in the code that is being compiled; returns [B, T, Hq, Dv]."""
    state, index = tokens.cache.state, tokens.index
    terms = [terms.get(name) for name in ("sinks", "scale", "softcap")]
    return torch.ops.leank.attend_stored(query, tokens.k, tokens.v, mask, state, index, *terms)


# The decorator runs it while a graph is traced: an error in traced code would only end the graph,
# and the code after it would be traced again, without the check.
@torch.compiler.assume_constant_result
def refuse(message: str) -> None:
    """Raise RuntimeError from the compiler."""
    raise RuntimeError(f"torch.compile: {message}")


def kernel(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let the operator run `function`, which takes (query, tokens, mask, terms)."""

    def run(q, k, v, mask, state, layer, sinks, scale, softcap):
        number, n_columns = state.tolist()
        cache = _caches.get(number)
        if cache is None:
            raise RuntimeError("LeanKCache: expected the cache of a compiled call, got none")
        if cache.layers[layer] is cache.packed[0]:
            cache.begin(k.shape[2], moved=layer > 0)
            if n_columns != cache.n_columns:
                raise RuntimeError(
                    f"LeanKCache: expected {n_columns} columns, as compiled forwards know, got "
                    f"{cache.n_columns}: an earlier forward did not finish, or layers were changed "
                    "one by one; cache.crop(0) goes on from what there is"
                )
        tokens = cache.new_tokens(k, v, layer)
        out = function(q, tokens, mask, {"sinks": sinks, "scale": scale, "softcap": softcap})
        cache.go_on()
        # Of the argument: torch may run this on a copy of the cache's own, and copies it back.
        state[1] = cache.n_columns
        return out

    _LIBRARY.impl("attend_stored", run, "CPU")
    return function


@torch.library.register_fake("leank::attend_stored", lib=_LIBRARY)
def _attend_fake(q, k, v, mask, state, layer, sinks, scale, softcap):
    n_rows, n_heads, n_columns, _ = q.shape
    return q.new_empty(n_rows, n_columns, n_heads, v.shape[-1])
