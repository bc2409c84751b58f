"""``leank bench`` decode and append on the CPU, against torch's attention and caches.

All layers of the work are measured and averaged. Each contender walks over buffers of at least four
times the last-level cache, so that everything comes from memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import leank
from leank import _C
from leank._arrays import as_tensor
from leank.bench.clock import ReadRate, alternate
from leank.bench.lines import AppendLine, Line, Shape, Table, Timing
from leank.bench.machine import last_level_cache_bytes
from leank.bench.profiles import dense_bytes, needed_bytes, token_bytes
from leank.bench.truth import attend64, checked_error
from leank.bench.work import Options, Work

# Layers that dense peers walk over in a round.
_PEER_CALLS = 4


class OnCpu:
    """Checks and times shapes; everything runs with torch's number of threads."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._rotate_bytes = 4 * last_level_cache_bytes()

    @property
    def how(self) -> str:
        """What the numbers are, for the end of a report."""
        text = (
            "Times are us of one layer, the mean over the layers: medians of "
            f"{self._options.rounds} rounds, in which all take turns, over buffers of "
            f"{self._rotate_bytes >> 20} MiB or more, so that everything comes from memory. Peak: "
            "the faster of torch's sum and amax, in the same rounds. "
        )
        if self._options.append:
            return text + (
                "LeanK's time is that of a token within a page, and one time in "
                f"{_C.PAGE_TOKENS} of one that starts a page. index_copy_: as transformers' static "
                "caches store; cat: as its DynamicCache does, which copies what it holds."
            )
        return text + (
            "LeanK attends; `leank bench append` times storing. gqa: torch's SDPA as models call "
            "it; folded: with the query heads of a KV head as rows of one query."
        )

    def check(self, work: Work, table: Table) -> None:
        """Leave it to `lines`, which checks each shape on the caches that it times."""

    @torch.inference_mode()
    def lines(self, work: Work, shape: Shape, table: Table) -> Iterator[Line]:
        """Check, then time one shape."""
        options = self._options
        pruned = _Pruned(work, shape, options, self._rotate_bytes)
        table.checked(pruned.check(work.name))
        dense = _Dense(pruned, self._rotate_bytes)
        read = ReadRate(self._rotate_bytes)
        if options.append:
            mine = {
                "attend": pruned.attend,
                "append": pruned.append,
                "append, new page": pruned.append_to_new_page,
            }
            peers = {"index_copy_": dense.index_copy, "cat": dense.cat}
        else:
            mine, peers = {"attend": pruned.attend}, {"gqa": dense.gqa, "folded": dense.folded}
        times = alternate({**mine, **peers, **read.contenders()}, options.rounds)
        common = {
            "shape": shape,
            "dense_us": {name: times[name] for name in peers},
            "peak_gb_s": read.gb_s(times),
        }
        keep, elem_bytes = work.keep, pruned.q.itemsize
        if options.append:
            weights = (_C.PAGE_TOKENS - 1, 1)
            both = times["append"], times["append, new page"]
            n_bytes = token_bytes(keep[0], shape.n_rows, elem_bytes=elem_bytes)
            yield AppendLine(
                us=Timing.mean(both, weights),
                attending_us=times["attend"],
                needed_bytes=n_bytes,
                dense_bytes=n_bytes,
                **common,
            )
            return
        at = {**options.window, "elem_bytes": elem_bytes}
        yield Line(
            us=times["attend"],
            needed_bytes=float(np.mean([needed_bytes(layer, *shape, **at) for layer in keep])),
            dense_bytes=dense_bytes(keep[0], *shape, elem_bytes=elem_bytes),
            **common,
        )


class _Pruned:
    """Filled caches of all layers of a mask, as often as memory is to be walked, and one step."""

    def __init__(self, work: Work, shape: Shape, options: Options, rotate_bytes: int) -> None:
        rng = np.random.default_rng(options.seed)
        self.n_rows, self.length = shape
        self.keep, self.options = work.keep, options

        def draw(n_heads: int, n_tokens: int) -> npt.NDArray:
            at = (self.n_rows, n_heads, n_tokens, work.head_dim)
            return random_array(rng, at, options.dtype)

        self.k, self.v = (draw(work.n_heads, self.length) for _ in "kv")
        self.q = draw(work.n_q_heads, 1)
        self.new = [draw(work.n_heads, 1) for _ in "kv"]
        self.out = np.empty_like(self.q)
        at = {**options.window, "dtype": options.dtype}
        rows = np.full(self.n_rows, self.length)
        live = sum(_C.predict_memory(layer, rows, **at)["total_bytes"] for layer in self.keep)
        self.caches = []
        for layer in list(self.keep) * max(1, math.ceil(rotate_bytes / live)):
            cache = leank.LayerCache(layer, n_rows=self.n_rows, **at)
            # The query is that of the last token, which must not be one of the prompt.
            if self.length > 1:
                cache.append(self.k[:, :, :-1], self.v[:, :, :-1])
            cache.append(self.k[:, :, -1:], self.v[:, :, -1:])
            self.caches.append(cache)

    def check(self, name: str) -> float:
        """Return the largest error; WrongResultError if it is beyond its bound.

        The layers checked have a head of each width that the mask has.
        """
        kept, seen, worst = self.keep.sum(2), set(), 0.0
        q, k, v = (as_tensor(x) for x in (self.q, self.k, self.v))
        for i, layer in enumerate(self.keep):
            if set(kept[i]) <= seen:
                continue
            seen |= set(kept[i])
            out = as_tensor(leank.decode(self.caches[i], self.q, n_threads=_n_threads()))
            for b in sorted({0, self.n_rows - 1}):
                truth = attend64(q[b, :, 0], k[b], v[b], layer, **self.options.window)
                where = f"{name}, layer {i}, row {b}"
                worst = max(worst, checked_error(out[b, :, 0], truth, where))
        # Add a token, so that appending does not allocate a page and a twin in each round.
        for cache in self.caches:
            cache.append(*self.new)
        return worst

    def _walk(self, i: int, step: Callable[[leank.LayerCache], object]) -> float:
        """Return seconds per call of `step` over the i-th set of layers."""
        total = 0.0
        for cache in self._layers(i):
            start = time.perf_counter()
            step(cache)
            total += time.perf_counter() - start
        return total / len(self.keep)

    def _layers(self, i: int) -> list[leank.LayerCache]:
        at = i * len(self.keep) % len(self.caches)
        return self.caches[at : at + len(self.keep)]

    def attend(self, i: int) -> float:
        """Attend to what is stored."""
        n = _n_threads()
        return self._walk(i, lambda cache: leank.decode(cache, self.q, out=self.out, n_threads=n))

    def append(self, i: int) -> float:
        """Store one token; the caches grow by one in each round."""
        return self._walk(i, lambda cache: cache.append(*self.new))

    def append_to_new_page(self, i: int) -> float:
        """Store a token that starts a page, as one in 64 does."""
        for cache in self._layers(i):
            cache.crop(self.length // _C.PAGE_TOKENS * _C.PAGE_TOKENS)
        return self.append(i)


class _Dense:
    """Dense K and V of one layer, several times, for torch."""

    def __init__(self, pruned: _Pruned, rotate_bytes: int) -> None:
        n_sets = max(2, math.ceil(rotate_bytes / (pruned.k.nbytes + pruned.v.nbytes)))
        self._pairs = [
            tuple(as_tensor(x.copy()) for x in (pruned.k, pruned.v)) for _ in range(n_sets)
        ]
        self._new = [as_tensor(x) for x in pruned.new]
        self._q = as_tensor(pruned.q)
        n_rows, n_q_heads, _, head_dim = self._q.shape
        self._folded = self._q.reshape(n_rows, pruned.k.shape[1], -1, head_dim)
        self._last = torch.tensor([pruned.length - 1])
        self._n_calls = min(_PEER_CALLS, n_sets)

    def _walk(self, i: int, call: Callable[[torch.Tensor, torch.Tensor], object]) -> int:
        for j in range(self._n_calls):
            call(*self._pairs[(i * self._n_calls + j) % len(self._pairs)])
        return self._n_calls

    def gqa(self, i: int) -> int:
        """Attend as a model calls it."""
        return self._walk(i, lambda k, v: sdpa(self._q, k, v, enable_gqa=True))

    def folded(self, i: int) -> int:
        """Attend with rows for query heads: the fastest arrangement known to us."""
        return self._walk(i, lambda k, v: sdpa(self._folded, k, v))

    def index_copy(self, i: int) -> int:
        """Store a token in its place."""
        new_k, new_v = self._new

        def store(k: torch.Tensor, v: torch.Tensor) -> None:
            k.index_copy_(2, self._last, new_k)
            v.index_copy_(2, self._last, new_v)

        return self._walk(i, store)

    def cat(self, i: int) -> int:
        """Store a token at the end of a copy."""
        new_k, new_v = self._new
        return self._walk(i, lambda k, v: (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)))


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray:
    """Return standard normal values as leank takes them: bfloat16 as uint16."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if dtype == "bfloat16":
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return values.astype(dtype)


def _n_threads() -> int:
    return torch.get_num_threads()
