"""leank.cuda.LayerCache: torch.compile and CUDA graphs, limits, memory, large sizes, errors."""

import copy

import numpy as np
import pytest

from leank import LayerCache as CpuLayerCache

from .conftest import random_keep
from .cuda_tools import make, needs_gpu, torch

pytestmark = needs_gpu
pytest.importorskip("leank.cuda", reason="leank was built without CUDA")

WIDTHS = (0, 16, 40, 128)
WINDOW = {"sink": 10, "recent": 40, "slack": 20}
# What inductor imports warns about things that it uses itself.
compiles = pytest.mark.filterwarnings("ignore")


def keep_of(widths=WIDTHS, D=128):
    return random_keep(np.random.default_rng(7), D, widths)


def filled(length=300, n_rows=2, max_tokens=None, keep=None):
    """Return a cache with a prompt; the same contents on every call."""
    keep = keep_of() if keep is None else keep
    cache = make(keep, "bfloat16", n_rows=n_rows, max_tokens=max_tokens or length + 70, **WINDOW)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (n_rows, len(keep), length, keep.shape[1])
    k, v = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in "kv"
    )
    cache.append(k, v)
    return cache


def column(cache, R=4, seed=2):
    """Return q, k and v of one column."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(cache.n_rows, cache.n_heads * r, 1, cache.head_dim) for r in (R, 1, 1)]
    return [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for shape in shapes
    ]


def contents(cache):
    rows = [x.view(torch.int16).clone() for b in range(cache.n_rows) for x in cache.gather(b)]
    return rows, cache.n_columns, cache.lengths.tolist(), cache.lo.tolist()


def assert_equal_contents(one, other):
    assert one[1:] == other[1:]
    for x, y in zip(one[0], other[0], strict=True):
        assert torch.equal(x, y)


# ------------------------------------------------------------------------------ compile and graphs


@compiles
def test_compiled_step_equals_eager():
    from leank.cuda import decode

    eager, compiled = filled(), filled()

    @torch.compile(fullgraph=True)
    def step(q, k, v):
        return decode(compiled, q * 2, k, v) + 1

    for i in range(3):
        q, k, v = column(eager, seed=i)
        assert torch.equal(step(q, k, v), decode(eager, q * 2, k, v) + 1)
    assert_equal_contents(contents(compiled), contents(eager))


@compiles
def test_compiled_step_clones_no_pages():
    from leank.cuda import decode

    cache = filled(length=100, n_rows=8, max_tokens=16384)
    assert cache.slab.numel() > 100 << 20

    @torch.compile(fullgraph=True)
    def step(q, k, v):
        return decode(cache, q, k, v)

    q, k, v = column(cache)
    step(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step(q, k, v)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert cache.lengths.tolist() == [104] * 8


@compiles
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_steps_equal_eager(compiled):
    """A captured step goes on from whatever is stored, and its replays allocate nothing."""
    from leank.cuda import decode

    eager, cache = filled(), filled()

    def step(q, k, v):
        return decode(cache, q, k, v)

    run = torch.compile(step, fullgraph=True) if compiled else step
    inputs = column(cache)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    cache.crop(300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for i in range(70):
        new = column(cache, seed=i)
        for x, y in zip(inputs, new, strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(out, decode(eager, *new))
    del new, x, y
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert_equal_contents(contents(cache), contents(eager))


def test_steps_of_one_layer_that_follow_each_other():
    """A step makes its plan while the one before advances the lengths, also into a new page.

    Heads of a row are planned by several warps.
    """
    from leank.cuda import decode

    keep = random_keep(np.random.default_rng(3), 64, (0, 8, 24, 64, 16, 40, 0, 32, 64, 56))
    n_steps = 20
    eager, cache = (filled(length=250, n_rows=8, keep=keep) for _ in range(2))
    steps = [column(cache, R=2, seed=i) for i in range(n_steps)]
    decode(cache, *steps[0])
    cache.crop(250)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [decode(cache, *step) for step in steps]
    expected = []
    for step in steps:
        expected.append(decode(eager, *step))
        torch.cuda.synchronize()
    for _ in range(30):
        graph.replay()
        for out, told in zip(outs, expected, strict=True):
            assert torch.equal(out, told)
        assert_equal_contents(contents(cache), contents(eager))
        cache.crop(250)


def test_layers_that_follow_each_other_share_a_workspace():
    from leank.cuda import decode

    masks = [keep_of((128,)), keep_of((0, 8, 16, 24, 128, 40, 64, 56)), keep_of()]
    caches = [filled(length=700 - 200 * i, keep=keep) for i, keep in enumerate(masks)]
    inputs = [column(cache) for cache in caches]
    alone = [decode(cache, *x) for cache, x in zip(caches, inputs, strict=True)]
    for cache, length in zip(caches, (700, 500, 300), strict=True):
        cache.crop(length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [decode(cache, *x) for cache, x in zip(caches, inputs, strict=True)]
    for _ in range(20):
        graph.replay()
        for out, told, cache, length in zip(outs, alone, caches, (700, 500, 300), strict=True):
            assert torch.equal(out, told)
            cache.crop(length)


def test_the_host_knows_what_was_replayed():
    """append and crop go on from what replays have stored, also after a reset."""
    from leank.cuda import decode

    eager, cache = filled(), filled()
    inputs = column(cache)
    decode(cache, *inputs)
    cache.crop(300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(cache, *inputs)
    k, v = (torch.cat([x] * 20, 2) for x in inputs[1:])
    for one, replay in ((eager, lambda: decode(eager, *inputs)), (cache, graph.replay)):
        one.reset()
        one.append(k, v)
        for _ in range(10):
            replay()
        one.append(k, v)
        replay()
        one.crop(45)
        replay()
    assert cache.n_columns == 46
    assert_equal_contents(contents(cache), contents(eager))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_append_in_a_capture_is_refused():
    cache = filled()
    _, k, v = column(cache)
    with (
        pytest.raises(RuntimeError, match="append: expected no capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cache.append(k, v)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda cache: cache.copy()])
def test_a_copy_has_pages_of_its_own(make_copy):
    from leank.cuda import decode

    cache, alone = filled(), filled()
    other = make_copy(cache)
    assert_equal_contents(contents(other), contents(cache))
    for seed in (1, 2):
        decode(other, *column(other, seed=seed))
    assert_equal_contents(contents(cache), contents(alone))
    new = column(cache, seed=3)
    assert torch.equal(decode(cache, *new), decode(alone, *new))


def test_a_captured_step_goes_on_after_select():
    """Beams are reordered between replays."""
    from leank.cuda import decode

    eager, cache = filled(n_rows=3), filled(n_rows=3)
    inputs = column(cache)
    decode(cache, *inputs)
    cache.crop(300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(cache, *inputs)
    for rows in ([1, 1, 0], torch.tensor([2, 0, 0], device="cuda"), [0, 1, 2], [2, 2, 2]):
        graph.replay()
        assert torch.equal(out, decode(eager, *inputs))
        for one in (cache, eager):
            one.select(rows)
        for x in inputs:
            x.mul_(0.5)
    assert_equal_contents(contents(cache), contents(eager))


def test_select_with_rows_of_a_narrow_type():
    """More rows than the type of `rows` can count."""
    cache = filled(length=5, n_rows=300, keep=np.ones((1, 64), bool))
    told = cache.gather(7)
    cache.select(np.full(300, 7, np.uint8))
    for b in (0, 128, 255, 256, 299):
        for x, y in zip(cache.gather(b), told, strict=True):
            assert torch.equal(x, y)
    assert len(set(cache._table[0, :, 0].tolist())) == 300


def test_more_rows_than_shared_memory_has_room_for():
    from leank.cuda import decode

    cache = filled(length=1, n_rows=40_000, max_tokens=1, keep=np.ones((1, 64), bool))
    with pytest.raises(ValueError, match="40000 rows, .* bytes of shared memory of a block"):
        decode(cache, column(cache)[0])


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([0, 2], IndexError, "rows: expected 0 to 1, got 2"),
        ([-1], IndexError, "rows: expected 0 to 1, got -1"),
        ([], TypeError, "rows: expected integers"),
        ([0.5], TypeError, "rows: expected integers"),
        ([[0]], TypeError, "rows: expected integers"),
        ([0] * 65536, ValueError, "rows: expected 1 to 65535 rows"),
    ],
)
def test_bad_rows_are_named_and_change_nothing(rows, error, message):
    cache = filled()
    before = contents(cache)
    with pytest.raises(error, match=message):
        cache.select(rows)
    assert_equal_contents(contents(cache), before)


# ------------------------------------------------------------------------------------------- limits


def test_columns_beyond_the_limit_are_refused():
    from leank.cuda import decode

    cache = filled(length=300, max_tokens=301)
    q, k, v = column(cache)
    before = contents(cache)
    with pytest.raises(ValueError, match="at most max_tokens = 301 columns, got 300 \\+ 2"):
        cache.append(torch.cat([k, k], 2), torch.cat([v, v], 2))
    assert_equal_contents(contents(cache), before)
    decode(cache, q, k, v)
    before = contents(cache)
    with pytest.raises(ValueError, match="got 301 \\+ 1"):
        decode(cache, q, k, v)
    assert_equal_contents(contents(cache), before)


@pytest.mark.parametrize("limit", [302, 320])
def test_a_replay_beyond_the_limit_writes_nothing_and_is_reported(limit):
    """At 320 a page ends as well: nothing beyond the tables is looked at."""
    from leank.cuda import decode

    cache = filled(length=limit - 2, max_tokens=limit)
    inputs = column(cache)
    graph = torch.cuda.CUDAGraph()
    decode(cache, *inputs)
    cache.crop(limit - 2)
    with torch.cuda.graph(graph):
        out = decode(cache, *inputs)
    for _ in range(2):
        graph.replay()
    assert out.any()
    cache.check()
    slab = cache.slab.clone()
    graph.replay()
    assert torch.equal(cache.slab, slab)
    assert not out.any()
    with pytest.raises(RuntimeError, match=f"went past max_tokens = {limit}"):
        cache.check()
    assert cache.n_columns == limit
    cache.crop(limit - 2)
    cache.check()


def test_memory_is_that_of_a_reserved_cpu_cache():
    cache = filled(length=300, max_tokens=3000)
    cpu = CpuLayerCache(cache.keep, n_rows=2, dtype="bfloat16", max_tokens=3000, **WINDOW)
    told = cpu.memory()
    assert cache.memory() == told | {"slab_bytes": cache.slab.numel()}
    assert cache.slab.numel() == told["total_bytes"]


def test_more_than_two_to_the_31_elements():
    """Addresses in a slab of 4.3 GB; the truth is dense attention in float64."""
    from leank.cuda import LayerCache, decode

    length, D = 2**20 + 100, 128
    cache = LayerCache(np.ones((8, D), bool), n_rows=1, max_tokens=length, **WINDOW)
    assert cache.slab.numel() // 2 > 2**31
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(n):
        shape = (1, 8, n, D)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    rows = []
    for first in range(0, length - 1, 2**17):
        n = min(2**17, length - 1 - first)
        k, v = draw(n), draw(n)
        cache.append(k, v)
        rows.append((k[0, 7].clone(), v[0, 7].clone()))
    # The last key, beyond 2**31 elements, is that of nearly all the weight.
    q, v = draw(1), draw(1)
    k = q * 2
    rows.append((k[0, 7], v[0, 7]))
    out = decode(cache, q, k, v)
    k64, v64 = (torch.cat(x).double() for x in zip(*rows, strict=True))
    truth = torch.softmax(k64 @ q[0, 7, 0].double() / D**0.5, 0) @ v64
    assert torch.softmax(k64 @ q[0, 7, 0].double() / D**0.5, 0)[-1] > 0.5
    torch.testing.assert_close(out[0, 7, 0].double(), truth, rtol=2e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": torch.float32}, "dtype: expected torch.bfloat16 or torch.float16"),
        ({"n_rows": 0}, "n_rows: expected 1 to 65535"),
        ({"max_tokens": 0}, "max_tokens: expected 1 to"),
        ({"keep": np.ones((2, 40), bool)}, "keep: expected a head dim of"),
        ({"keep": np.eye(2, 128, dtype=bool)}, "multiple of 8 channels"),
        ({"device": "cpu"}, "device: expected a CUDA device, got cpu"),
        ({"sink": -1}, "sink: expected at least 0"),
    ],
)
def test_bad_options_are_named(options, message):
    from leank.cuda import LayerCache

    options = {"keep": keep_of(), "n_rows": 2, "max_tokens": 100, **WINDOW} | options
    with pytest.raises(ValueError, match=message):
        LayerCache(options.pop("keep"), **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, k, v: (q.half(), k, v), TypeError, "q: expected torch.bfloat16"),
        (lambda q, k, v: (q, k[:1], v), ValueError, "k: expected \\(2, 4, 1, 128\\)"),
        (lambda q, k, v: (q, k, v.cpu()), ValueError, "v: expected device cuda"),
        (lambda q, k, v: (q[:, :-1], k, v), ValueError, "q: expected a multiple of 4"),
        (lambda q, k, v: (q, k, None), ValueError, "k, v: expected both or neither"),
        (
            lambda q, k, v: (q[..., :1].expand(-1, -1, -1, 128), k, v),
            ValueError,
            "q: expected a contiguous last axis",
        ),
    ],
)
def test_bad_inputs_are_named_and_change_nothing(change, error, message):
    from leank.cuda import decode

    cache = filled()
    before = contents(cache)
    with pytest.raises(error, match=message):
        decode(cache, *change(*column(cache)))
    assert_equal_contents(contents(cache), before)


def test_rows_that_are_not_aligned_are_refused():
    from leank.cuda import decode

    cache = filled()
    q, k, v = column(cache)
    shifted = torch.cat([k.flatten()[:1], k.flatten()])[1:].view_as(k)
    before = contents(cache)
    with pytest.raises(ValueError, match="k: expected rows that begin at multiples of 16 bytes"):
        decode(cache, q, shifted, v)
    assert_equal_contents(contents(cache), before)
    decode(cache, q, k, v)
    assert cache.n_columns == 301
