"""Memory of the process stays flat, however often a call is made and however it ends."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

import leank
from leank import _C, LayerCache, decode

from .boundary_calls import CALLS, ERRORS, ONES, small_cache
from .conftest import draw, random_keep

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc"),
    pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="ASan delays freeing"),
]


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_flat(one_round, n_rounds, warm_up, most):
    """Let memory grow by `most` bytes at most over n_rounds, after the first ones."""
    for i in range(warm_up):
        one_round(i)
    before = resident_bytes()
    for i in range(n_rounds):
        one_round(i)
    assert resident_bytes() - before < most


def test_nothing_leaks(rng):
    keep = random_keep(rng, 64, (0, 8, 64))
    k, v = (draw(rng, "float32", 2, 3, 130, 64) for _ in "kv")
    q = draw(rng, "float32", 2, 6, 130, 64)
    bad = k[..., :8]

    def one_round(i):
        limit = {"max_tokens": 200, "max_call": 5} if i % 2 else {}
        cache = LayerCache(keep, n_rows=2, sink=4, recent=16, **limit)
        decode(cache, q[:, :, :20], k[:, :, :20], v[:, :, :20])
        cache.append(k[:, :, :5], v[:, :, :5])
        other = cache.copy()
        other.crop(10)
        other.select(np.array([1, 1, 0]))
        other.select(np.array([0, 2]))
        other.append(k[:, :, :3], v[:, :, :3])
        cache.gather(0)
        cache.memory()
        _C._fail_allocation(1 + i % 12)
        try:
            other.copy().append(k[:, :, :5], v[:, :, :5])
        except MemoryError:
            pass
        _C._fail_allocation(0)
        with pytest.raises(ValueError):
            cache.append(bad, v)
        cache.append(k[:, :, :2], v[:, :, :2])

    # One leaked page a round would be 100 MB, a leaked row table 0.2 MB.
    assert_flat(one_round, 2000, 300, 3 << 20)


def test_rounds_of_create_append_decode_free():
    """A leak of 64 bytes a round would be 6 MB."""

    def one_round(_):
        cache = small_cache(20)
        decode(cache, ONES["q"][:, :, :1])

    assert_flat(one_round, 100_000, 1000, 2 << 20)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    cache = small_cache()
    assert_flat(lambda _: CALLS[name](cache.copy()), 10_000, 500, 1 << 19)


@pytest.mark.parametrize("name", ERRORS)
def test_error_paths(name):
    """A leak of 64 bytes a round would be 0.6 MB."""
    cache = small_cache()

    def one_round(_):
        try:
            ERRORS[name](cache)
        except Exception:
            return
        raise AssertionError("expected an error")

    assert_flat(one_round, 10_000, 500, 1 << 19)


@pytest.mark.parametrize("name", ["create", "append", "decode", "copy", "select", "learn_backward"])
def test_failing_allocations(name):
    """Each of the first eight allocations in turn."""
    cache = small_cache()

    def one_round(i):
        copy = cache.copy()
        _C._fail_allocation(1 + i % 8)
        try:
            CALLS[name](copy)
        except MemoryError:
            pass
        finally:
            _C._fail_allocation(0)

    assert_flat(one_round, 10_000, 500, 1 << 19)


@pytest.mark.long
def test_generate_20000_tokens():
    """All that grows is the cache, as predicted."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from .tiny_models import prompts, pruned, tiny

    n, every = 20_000, 500
    model, seen = tiny(max_position_embeddings=n + every), []

    def look(ids, scores):
        if ids.shape[1] % every == 0:
            seen.append((ids.shape[1], cache.memory(), resident_bytes()))
        return scores

    with leank.patch(model, pruned()) as handle:
        cache = leank.make_cache(model)
        options = {"max_new_tokens": n, "do_sample": False, "logits_processor": [look]}
        ids = model.generate(prompts([every])[0], past_key_values=cache, **options)
    assert ids.shape == (1, n + every) and len(seen) == n // every
    for length, memory, _ in seen:
        predicted = handle.mask.predict_memory([length])
        assert memory | {"slab_bytes": 0} == predicted | {"slab_bytes": 0}
    # The cache grows by 7 MB from here on, and what the allocator keeps for reuse moves by 4 MB.
    # Dense K and V would add 12 MB.
    (_, first, before), (_, last, after) = seen[7], seen[-1]
    assert after - before < last["slab_bytes"] - first["slab_bytes"] + (6 << 20)
