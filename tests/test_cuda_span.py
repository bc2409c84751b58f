"""leank.cuda.decode of several columns, and of D 256, against the float64 rule and the CPU op."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leank import LayerCache

from .compare import assert_within_budget, truth_and_plain
from .compare import decode as widen
from .conftest import draw, left_padded, random_keep
from .cuda_tools import (
    assert_same_contents,
    make,
    needs_gpu,
    pretend,
    run_steps,
    to_coded,
    to_gpu,
    torch,
)
from .reference import History

pytestmark = needs_gpu
_cuda_ops = pytest.importorskip("leank._cuda_ops", reason="leank was built without CUDA")
DTYPES = ["bfloat16", "float16"]

# As in test_decode; a step of several columns comes after every row has a token.
DEFAULT = {
    "D": 64,
    "widths": (0, 8, 24, 64),
    "R": 2,
    "window": (10, 40, 20),
    "steps": (("append", (200, 70)), ("decode", (9, 9)), ("decode", (1, 1)), ("decode", (5, 2))),
}
TURNS = (("append", (300, 65)), ("decode", (70, 23)), ("decode", (1, 0)), ("decode", (3, 3)))
CASES = {
    **{f"R{R}": {"R": R} for R in (1, 3, 7, 8, 9, 16)},
    **{f"D{D}": {"D": D, "widths": (0, 8, 24, D - 8, D), "steps": TURNS} for D in (80, 96, 128)},
    "D256": {"D": 256, "widths": (0, 8, 40, 248, 256), "steps": TURNS},
    "D256_R8": {"D": 256, "widths": (80,), "R": 8, "steps": TURNS},
    "D256_R16": {"D": 256, "widths": (0, 40, 256), "R": 16, "steps": TURNS},
    "D128_R16": {"D": 128, "widths": (0, 40, 128), "R": 16, "steps": TURNS},
    "all_kept": {"widths": (64, 64), "steps": TURNS},
    "all_empty": {"widths": (0, 0), "steps": TURNS},
    "one_column_tile": {"R": 1, "steps": (("append", (200, 70)), ("decode", (2, 1)))},
    # 1024 columns of a head: several blocks of columns.
    "many_columns": {
        "R": 16,
        "window": (10, 40, 64),
        "steps": (("append", (150, 90)), ("decode", (64, 64)), ("decode", (200, 17))),
    },
    "no_slack": {"window": (10, 40, 0)},
    "pieces_of_two": {"window": (10, 40, 1), "steps": TURNS},
    "padded": {
        "steps": (
            ("append", (200, 70, 1)),
            ("decode", (9, 0, 4)),
            ("decode", (0, 0, 2)),
            ("decode", (30, 1, 17)),
        )
    },
    "crop": {
        "window": (10, 40, 20),
        "steps": (
            ("append", (400, 150)),
            ("decode", (9, 9)),
            ("crop", 402),
            ("decode", (17, 17)),
            ("crop", 290),
            ("decode", (70, 70)),
            ("crop", 270),
            ("decode", (3, 3)),
        ),
    },
    "prompt_comes_in_a_span": {
        "steps": (("append", (100, 0)), ("decode", (5, 3)), ("decode", (30, 30)))
    },
    "select": {
        "steps": (
            ("append", (150, 90, 270)),
            ("decode", (9, 9, 9)),
            ("select", (2, 0, 0)),
            ("decode", (30, 1, 9)),
            ("select", (1, 2)),
            ("decode", (9, 9)),
        )
    },
    "long": {
        "D": 128,
        "R": 4,
        "widths": (0, 16, 64, 128),
        "window": (64, 128, 64),
        "steps": (("append", (3000, 1500)), ("decode", (8, 8)), ("decode", (64, 64))),
    },
    "many_rows": {
        "R": 1,
        "widths": (0, 8),
        "steps": (("append", tuple(range(1, 400, 3))), ("decode", (3,) * 133)),
    },
    # More than slack allows in the ring of twins: these are elsewhere while the call attends.
    "long_turns": {
        "steps": (
            ("append", (200, 70)),
            ("decode", (300, 131)),
            ("decode", (1, 1)),
            ("decode", (130, 22)),
            ("crop", 610),
            ("decode", (90, 90)),
            ("crop", 600),
            ("decode", (5, 5)),
        )
    },
    "long_turns_in_the_sink": {
        "window": (300, 40, 0),
        "steps": (("append", (3, 130)), ("decode", (200, 70)), ("decode", (200, 200))),
    },
    "long_turns_select": {
        "window": (10, 40, 7),
        "steps": (
            ("append", (150, 90, 270)),
            ("decode", (70, 9, 0)),
            ("select", (2, 0, 0)),
            ("decode", (130, 1, 64)),
            ("select", (1, 2)),
            ("decode", (33, 90)),
        ),
    },
    "capped": {"softcap": 1.5, "steps": TURNS},
    "sinks": {"sinks": 3.0, "steps": TURNS},
    "capped_sinks_D256": {"D": 256, "softcap": 5.0, "sinks": 3.0, "R": 9, "steps": TURNS},
}
for window in [(0, 1, 0), (7, 1, 64), (33, 30, 5), (64, 64, 63), (65, 65, 64), (1000, 10, 3)]:
    CASES["window_{}_{}_{}".format(*window)] = {
        "window": window,
        "widths": (0, 8),
        "steps": (("append", (126, 200, 260)), ("decode", (70, 70, 2)), ("decode", (9, 9, 9))),
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_span_equals_rule(name, dtype):
    run_steps(DEFAULT | CASES[name], len(name), dtype)


@pytest.mark.parametrize("n_blocks", [1, 2, 7])
@pytest.mark.parametrize(
    "name", ["long", "padded", "many_columns", "D256", "D256_R8", "long_turns"]
)
def test_few_blocks(monkeypatch, name, n_blocks):
    """Few blocks have many parts each, one after the other."""
    pretend(monkeypatch, n_blocks=n_blocks)
    run_steps(DEFAULT | CASES[name], len(name), "bfloat16")


@pytest.mark.parametrize("name", ["long", "many_columns", "D80", "D256"])
def test_little_shared_memory(monkeypatch, name):
    """As much as sm_89 has: fewer columns of a block, and a ring of one tile at D 256."""
    pretend(monkeypatch, smem_bytes=101376)
    steps = tuple(x for x in (DEFAULT | CASES[name])["steps"] if max(x[1]) > 1)
    run_steps(DEFAULT | CASES[name] | {"steps": steps}, len(name), "bfloat16")


@pytest.mark.parametrize("name", ["long_turns", "long_turns_in_the_sink", "long_turns_select"])
@pytest.mark.parametrize("most", [1, 64, 100])
def test_pieces_of_a_long_call(monkeypatch, name, most):
    """As where many rows leave little scratch for each: pieces that are not all of the call."""
    plan = _cuda_ops._cuda.span_piece

    def shorter(layer, **sizes):
        piece, n_bytes = plan(layer, **sizes)
        return min(piece, most), n_bytes

    monkeypatch.setattr(_cuda_ops._cuda, "span_piece", shorter)
    run_steps(DEFAULT | CASES[name], len(name), "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_turn_of_3000(dtype):
    """Two pieces, of which some queries are compared: the truth takes long."""
    from leank.cuda import decode

    rng, window = np.random.default_rng(3), {"sink": 64, "recent": 128, "slack": 64}
    keep = random_keep(rng, 128, (0, 40))
    history = History(2, page=64, **window)
    gpu = make(keep, dtype, n_rows=2, max_tokens=4000, **window)
    cpu = LayerCache(keep, n_rows=2, dtype=dtype, **window)
    for counts in (900, 100), (3000, 700):
        history.settle()
        valid = left_padded(counts)
        k, v = (draw(rng, dtype, 2, 2, valid.shape[1], 128) for _ in "kv")
        history.put(k, v, valid)
        cpu.append(k, v, valid)
        if counts[0] == 900:
            gpu.append(*(to_gpu(x) for x in (k, v, valid)))
    q = draw(rng, dtype, 2, 4, 3000, 128)
    out = to_coded(decode(gpu, *(to_gpu(x) for x in (q, k, v)), valid=to_gpu(valid)))
    compared = np.array(
        [0, 1, 2047, 2048, 2049, 2299, 2300, 2301, 2999, *rng.integers(3000, size=5)]
    )
    for b, row in enumerate(history.rows):
        got, positions = widen(out[b], dtype), history.positions(b, 3000)
        assert not got[:, ~valid[b]].any()
        rule = {"sink": 64, "recent": 128, "lo": row.lo, "n0": row.n0, "scale": 128**-0.5}
        stored = (np.stack(x, axis=1) for x in (row.k, row.v))
        at = [positions[t] for t in compared]
        wanted = truth_and_plain(q[b][:, compared], *stored, at, keep, dtype, **rule)
        assert_within_budget(got[:, compared], *wanted, dtype, f"row {b}")
    assert_same_contents(gpu, cpu, dtype)


@st.composite
def cases(draw):
    D = draw(st.sampled_from((64, 80, 96, 128, 256)), "D")
    n_rows = draw(st.integers(1, 4), "B")
    widths = st.lists(
        st.sampled_from(sorted({0, 8, D // 16 * 8, D - 8, D})), min_size=1, max_size=4
    )
    prompt = st.tuples(*[st.integers(1, 400)] * n_rows)
    spans = st.tuples(*[st.integers(0, 100)] * n_rows).filter(any)
    return {
        "D": D,
        "widths": draw(widths, "widths"),
        "R": draw(st.integers(1, 16), "R"),
        "window": draw(st.tuples(st.integers(0, 130), st.integers(1, 130), st.integers(0, 70))),
        "softcap": draw(st.sampled_from((None, 2.0)), "softcap"),
        "sinks": draw(st.sampled_from((None, 3.0)), "sinks"),
        "steps": (("append", draw(prompt)), ("decode", draw(spans)), ("decode", draw(spans))),
    }


@given(cases(), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=60)
def test_span_of_random_shapes(case, dtype, seed):
    run_steps(case, seed, dtype)


# ------------------------------------------------------------------------------- what is not shapes


def filled(dtype="bfloat16", D=128, widths=(0, 8, 24, 128), length=700, T=9, **options):
    """Return a cache with a prompt, and the q, k and v of T columns; the same on every call."""
    rng = np.random.default_rng(1)
    options = {"sink": 10, "recent": 40, "slack": 20, "max_tokens": length + 200 + T} | options
    cache = make(random_keep(rng, D, widths), dtype, n_rows=2, **options)
    shape = (2, len(widths))
    cache.append(*(to_gpu(draw(rng, dtype, *shape, length, D)) for _ in "kv"))
    q = to_gpu(draw(rng, dtype, 2, 4 * len(widths), T, D))
    return cache, q, *(to_gpu(draw(rng, dtype, *shape, T, D)) for _ in "kv")


@pytest.mark.parametrize("T", [9, 500])
@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_agree_bit_for_bit(dtype, D, T):
    """Which block takes which part of the work differs from run to run, the result does not."""
    from leank.cuda import decode

    # With as much slack a crop leaves what the call saw, with less it would not.
    widths, slack = (0, 8, 24, 128, 64, 64, 32, 96), T + 80
    cache, *inputs = filled(dtype, D, widths, length=9000, T=T, slack=slack)
    first = decode(cache, *inputs)
    for _ in range(20):
        cache.crop(9000)
        assert torch.equal(decode(cache, *inputs), first)
    one = [x[:, :, :1].contiguous() for x in inputs]
    cache.crop(9000)
    first = decode(cache, *one)
    for _ in range(20):
        cache.crop(9000)
        assert torch.equal(decode(cache, *one), first)


def test_sliced_inputs():
    """Strided q, k and v, as a model's views of one projection are."""
    from leank.cuda import decode

    (cache, q, k, v), (other, *_) = filled(), filled()
    fused = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    parts = fused.split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
    assert torch.equal(decode(cache, q, k, v), decode(other, *parts))


def test_a_long_call_leaves_what_short_ones_do():
    """Contents, lo and lengths, also where the ring of twins goes round more than once."""
    from leank.cuda import decode

    (at_once, *inputs), (one_by_one, *_) = (filled(T=301) for _ in range(2))
    valid = torch.ones(2, 301, dtype=torch.bool, device="cuda")
    valid[1, 50:170] = False
    whole = decode(at_once, *inputs, valid=valid)
    outputs = []
    for first in range(0, 301, 7):
        new = slice(first, first + 7)
        q, k, v = (x[:, :, new] for x in inputs)
        outputs.append(decode(one_by_one, q, k, v, valid=valid[:, new]))
    # The order of sums differs.
    torch.testing.assert_close(whole, torch.cat(outputs, 2), rtol=2e-2, atol=2e-3)
    for cache in (at_once, one_by_one):
        assert cache.lengths.tolist() == [1001, 881] and cache.lo.tolist() == [896, 768]
    for b in range(2):
        for got, told in zip(at_once.gather(b), one_by_one.gather(b), strict=True):
            assert torch.equal(got.view(torch.int16), told.view(torch.int16))
    for cache in (at_once, one_by_one):
        cache.crop(990)
    step = [x[:, :, :1].contiguous() for x in inputs]
    assert torch.equal(decode(at_once, *step), decode(one_by_one, *step))


def test_refusals_change_nothing():
    from leank.cuda import decode

    cache, q, k, v = filled()
    before = cache.slab.clone()
    with pytest.raises(ValueError, match="k: expected \\(2, 4, 9, 128\\)"):
        decode(cache, q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match="q: expected \\(2, 16, 1, 128\\)"):
        decode(cache, q)
    with pytest.raises(ValueError, match="valid: expected \\(2, 9\\)"):
        decode(cache, q, k, v, valid=torch.ones(2, 1, dtype=torch.bool, device="cuda"))
    full, *inputs = filled(max_tokens=708)
    with pytest.raises(ValueError, match="at most max_tokens = 708 columns, got 700 \\+ 9"):
        decode(full, *inputs)
    empty = make(cache.keep, "bfloat16", n_rows=2, sink=10, recent=40, slack=4, max_tokens=50)
    with pytest.raises(ValueError, match="k: expected at most 5 columns because row 0 has no"):
        decode(empty, q, k, v)
    assert torch.equal(cache.slab, before) and cache.n_columns == 700
    assert full.n_columns == 700 and empty.n_columns == 0


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_is_refused():
    from leank.cuda import decode

    cache, *inputs = filled()
    with (
        pytest.raises(RuntimeError, match="q: expected one column in a step that is compiled or"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        decode(cache, *inputs)
