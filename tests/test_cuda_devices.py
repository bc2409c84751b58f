"""leank.cuda on real devices: what they refuse, memory that runs out, several of them, or none."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from .cuda_tools import make, on_gpu, torch
from .processes import ROOT

_cuda_ops = pytest.importorskip("leank._cuda_ops", reason="leank was built without CUDA")

WINDOW = {"sink": 10, "recent": 40, "slack": 20}
D = 64
HALF_CHANGED = "cache: expected one that is whole, got one that decode left half changed"


def keep_of():
    return np.arange(D) < np.array([[0], [16], [40], [D]])


def columns(cache, n, seed=2):
    """Draw q, k and v of n columns."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(cache.n_rows, cache.n_heads * r, n, D) for r in (2, 1, 1)]
    return [
        torch.randn(shape, generator=generator).to(cache.device, cache.dtype) for shape in shapes
    ]


def filled(length=300, n_rows=2, max_tokens=None, keep=None, seed=1, device="cuda"):
    keep = keep_of() if keep is None else keep
    options = {"n_rows": n_rows, "max_tokens": max_tokens or length + 70, "device": device}
    cache = make(keep, "bfloat16", **options, **WINDOW)
    cache.append(*columns(cache, length, seed)[1:])
    return cache


def contents(cache):
    rows = [x.view(torch.int16).cpu() for b in range(cache.n_rows) for x in cache.gather(b)]
    told = cache.lengths, cache.lo, cache.prompt_lengths, cache.columns
    return [x.cpu().numpy().tobytes() for x in (*rows, *told)], cache.real.tobytes()


# ------------------------------------------------------------------------------ memory and launches


@on_gpu
def test_pages_that_do_not_fit():
    from leank.cuda import LayerCache, decode

    with pytest.raises(torch.OutOfMemoryError):
        LayerCache(np.ones((8, D), bool), n_rows=64, max_tokens=2**23, **WINDOW)  # 1.1 TB
    cache, expected = (filled(max_tokens=6000) for _ in range(2))
    before, inputs = contents(cache), columns(cache, 65)
    with pytest.raises(torch.OutOfMemoryError):
        cache.select([0, 1] * 30000)  # 230 GB
    assert contents(cache) == before
    assert torch.equal(decode(cache, *inputs), decode(expected, *inputs))
    assert contents(cache) == contents(expected)


@pytest.fixture
def boastful(monkeypatch):
    """Say that blocks may have more shared memory than CUDA gives them: launches are refused."""

    @contextlib.contextmanager
    def run():
        info = _cuda_ops._device_info(0) | {"smem_bytes": 1 << 20}
        with monkeypatch.context() as patches:
            patches.setattr(_cuda_ops, "_device_info", lambda device: info)
            yield

    return run


@on_gpu
def test_a_refused_step_changes_nothing(boastful):
    """Of so many heads the order of their channels alone needs more than there is."""
    from leank.cuda import decode

    cache = filled(length=40, n_rows=1, keep=np.ones((4096, D), bool))
    other = filled()
    inputs, before = columns(cache, 1), (cache.slab.clone(), cache._state.clone())
    of_other = columns(other, 1)[0]
    expected = decode(other, of_other)
    with boastful(), pytest.raises(RuntimeError, match="attend: CUDA error"):
        decode(cache, *inputs)
    with pytest.raises(ValueError, match="need more than the .* bytes of shared memory"):
        decode(cache, *inputs)
    assert cache.n_columns == 40
    assert torch.equal(cache.slab, before[0]) and torch.equal(cache._state, before[1])
    # The workspace is as it was, too.
    assert torch.equal(decode(other, of_other), expected)


@on_gpu
def test_a_refused_span_makes_a_cache_unusable(boastful):
    """Its columns are stored when the kernel that attends is refused."""
    from leank.cuda import decode

    cache = filled(length=10, n_rows=20000, keep=np.ones((1, D), bool))
    inputs = columns(cache, 5)
    before = cache.slab.clone(), cache._state.clone()
    with pytest.raises(ValueError, match="need more than the .* bytes of shared memory"):
        decode(cache, *inputs)
    assert torch.equal(cache.slab, before[0]) and torch.equal(cache._state, before[1])
    with boastful(), pytest.raises(RuntimeError, match="span: CUDA error"):
        decode(cache, *inputs)
    assert not torch.equal(cache._state, before[1])
    for use in (
        lambda: cache.append(*inputs[1:]),
        lambda: decode(cache, *inputs),
        lambda: decode(cache, inputs[0][:, :, :1]),
        lambda: cache.select([0]),
        lambda: cache.gather(0),
        lambda: cache.check(),
    ):
        with pytest.raises(RuntimeError, match=HALF_CHANGED):
            use()
    cache.reset()
    assert not cache.lengths.any() and cache.n_columns == 0
    cache.append(*inputs[1:])
    assert torch.equal(torch.stack(cache.gather(19999)), torch.stack([x[-1] for x in inputs[1:]]))


# ----------------------------------------------------------------------------------- past the end


@on_gpu
@pytest.mark.parametrize("limit", [302, 320])
def test_nothing_but_the_pages_is_written(monkeypatch, limit):
    """At 320 a page ends as well."""
    from leank.cuda import decode

    _cuda_ops.workspace(0)  # is made only once
    guard, there = 1 << 20, []

    def guarded(*shape, dtype, device):
        if dtype != torch.uint8:
            return zeros(*shape, dtype=dtype, device=device)
        there.append(torch.full((shape[0] + 2 * guard,), 0x5A, dtype=dtype, device=device))
        return there[-1][guard : guard + shape[0]].zero_()

    zeros = torch.zeros
    with monkeypatch.context() as patches:
        patches.setattr(torch, "zeros", guarded)
        cache = filled(length=limit - 3, max_tokens=limit)
    inputs = columns(cache, 1)
    graph = torch.cuda.CUDAGraph()
    decode(cache, *inputs)
    with torch.cuda.graph(graph):
        out = decode(cache, *inputs)
    for _ in range(2):
        graph.replay()
    assert out.any()
    before, memory = contents(cache), there[0].clone()
    for _ in range(70):
        graph.replay()
    assert not out.any()
    with pytest.raises(RuntimeError, match=f"went past max_tokens = {limit}"):
        cache.check()
    for call in (
        lambda: cache.append(*inputs[1:]),
        lambda: decode(cache, *inputs),
        lambda: decode(cache, *columns(cache, 3)),
    ):
        with pytest.raises(ValueError, match=f"at most max_tokens = {limit} columns, got {limit}"):
            call()
    assert torch.equal(there[0], memory) and len(there) == 1
    assert (memory[:guard] == 0x5A).all() and (memory[-guard:] == 0x5A).all()
    cache.crop(limit)
    assert contents(cache) == before


# ------------------------------------------------------------------------------ streams and devices


@on_gpu
def test_caches_of_two_streams():
    """In two threads at the same time; what each has is what it has alone."""
    from leank.cuda import decode

    steps = [columns(filled(length=4), 1, seed=seed) for seed in range(4)]
    turn = columns(filled(length=4), 30)

    def run(seed):
        outs = []
        with torch.cuda.stream(torch.cuda.Stream()):
            cache = filled(3000, max_tokens=3500, seed=seed)
            for i in range(200):
                outs.append(decode(cache, *steps[i % 4]))
                if i % 50 == 0:
                    outs.append(decode(cache, *turn))
            torch.cuda.current_stream().synchronize()
            return outs, contents(cache), cache._work

    torch.cuda.synchronize()
    alone = [run(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(run, range(2)))
    assert together[0][2] is not together[1][2]
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one[0], other[0], strict=True))
        assert one[1] == other[1]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_caches_of_two_devices(current):
    """Used by turns, whatever device is the current one, which stays that."""
    from leank.cuda import decode

    with torch.cuda.device(current):
        caches = [filled(n_rows=3, device=f"cuda:{i}") for i in range(2)]
        alone = filled(n_rows=3, device=f"cuda:{current}")
        for call in (
            lambda cache: decode(cache, *columns(cache, 1)),
            lambda cache: decode(cache, *columns(cache, 30)),
            lambda cache: cache.append(*columns(cache, 3)[1:]),
            lambda cache: cache.select([2, 0, 0]),
            lambda cache: decode(cache, columns(cache, 1)[0]),
            lambda cache: cache.crop(320),
            lambda cache: cache.select([1, 1]),
            lambda cache: decode(cache.copy(), *columns(cache, 1)),
        ):
            expected = call(alone)
            for cache in caches:
                got = call(cache)
                assert torch.cuda.current_device() == current
                assert got is None or torch.equal(got.cpu(), expected.cpu())
                assert contents(cache) == contents(alone)
        before = contents(alone)
        for cache, other in (caches, caches[::-1]):
            (q, k, v), foreign = columns(cache, 1), columns(other, 1)
            place = f"expected device {cache.device}, got {other.device}"
            for name, inputs in (("q", (foreign[0], k, v)), ("v", (q, k, foreign[2]))):
                with pytest.raises(ValueError, match=f"{name}: {place}"):
                    decode(cache, *inputs)
            with pytest.raises(ValueError, match=f"k: {place}"):
                cache.append(foreign[1], v)
            valid = torch.ones(2, 1, dtype=torch.bool, device=other.device)
            with pytest.raises(TypeError, match=f"valid: expected torch.bool on {cache.device}"):
                decode(cache, q, k, v, valid=valid)
            sinks = torch.zeros(q.shape[1], device=other.device)
            with pytest.raises(ValueError, match="sinks: expected contiguous float32"):
                decode(cache, q, k, v, sinks=sinks)
            assert contents(cache) == before and torch.cuda.current_device() == current


def test_devices_that_are_not_there():
    from leank.cuda import LayerCache

    n = torch.cuda.device_count()
    message = rf"device: expected one of the {n} GPUs that torch sees .*, got cuda:{n}"
    with pytest.raises(ValueError, match=message):
        LayerCache(keep_of(), n_rows=1, max_tokens=9, **WINDOW, device=f"cuda:{n}")


def test_devices_that_are_hidden():
    """Imports and `leank info` work, and a cache says what is missing."""
    code = """if True:
        import leank, numpy
        from leank.__main__ import main
        from leank.cuda import LayerCache
        assert leank.capabilities()["cuda_devices"] == {}
        for device in ("cuda", "cuda:0"):
            try:
                LayerCache(numpy.ones((2, 64), bool), n_rows=1, sink=1, recent=1, max_tokens=9,
                           device=device)
            except ValueError as error:
                print(error)
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code, "info"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for device, line in zip(("cuda", "cuda:0"), lines, strict=False):
        assert line == (
            "device: expected one of the 0 GPUs that torch sees (CUDA_VISIBLE_DEVICES hides "
            f"others), got {device}"
        )
    assert ["GPUs", "none"] in [line.split() for line in lines]
