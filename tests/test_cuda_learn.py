"""leank.learning.mixed_attention on a GPU against the float64 truth and the CPU's operators."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leank.learning import mixed_attention

from .compare import assert_within_budget, encode
from .compare import decode as widen
from .cuda_tools import needs_gpu, to_coded, to_gpu, torch
from .test_learn_op import DEFAULT, NAMES, OUTPUTS, expect, make
from .test_learn_op import run as run_on_cpu

pytestmark = needs_gpu
pytest.importorskip("leank._cuda_built", reason="leank was built without CUDA")
DTYPES = ["bfloat16", "float16"]

# As in test_learn_op.
CASES = {
    **{f"R{R}": {"R": R} for R in range(1, 9)},
    **{f"D{D}": {"D": D, "R": 3} for D in (80, 96, 128)},
    **{f"D{D}_R1": {"D": D, "R": 1, "T": 100} for D in (80, 96, 128)},
    **{f"T{T}": {"T": T} for T in (1, 5, 64, 100, 257)},
    **{f"Lc{Lc}": {"Lc": Lc} for Lc in (0, 1, 63, 64, 65, 1000)},
    "one_token": {"Lc": 0, "T": 1, "R": 1},
    "no_context": {"Lc": 0, "T": 150, "R": 1},
    "window_least": {"window": (0, 1)},
    "window_no_sink": {"window": (0, 40)},
    "window_of_tiles": {"window": (64, 64)},
    "window_of_everything": {"window": (2**40, 2**59)},
    "window_recent_beyond": {"window": (0, 10**9)},
    "recent_times_R_is_2_to_64": {"window": (0, 2**59), "R": 32, "heads": 1, "T": 5},
    "sink_reaches_the_span": {"window": (60, 30), "Lc": 10, "T": 200, "heads": 1},
    "ragged": {"start": (0, 3, 199, 200, 201, 220, 239, 240), "R": 1},
    "ragged_long_span": {"start": (0, 70, 129), "Lc": 10, "T": 120, "R": 3},
    "hidden_one": {"hidden": (False, True)},
    "hidden_all": {"hidden": (True, True), "T": 150, "window": (3, 20)},
    "hidden_ragged": {"hidden": (True, False), "start": (0, 17, 205), "window": (0, 1)},
    "hidden_sink_in_span": {"hidden": (True, False), "window": (60, 30), "Lc": 10, "T": 150},
    "alpha_0": {"alpha": 0.0},
    "alpha_1": {"alpha": 1.0},
    "long": {"Lc": 5000, "T": 9, "R": 1, "start": (0,), "window": (64, 512)},
    "many_rows": {"start": tuple(2 * b % 200 for b in range(120)), "T": 3, "R": 1, "D": 64},
}


def run(arrays, d_o, options):
    """Return the outputs of both directions by name, as run_on_cpu does."""
    inputs = [to_gpu(arrays[name]) for name in NAMES]
    rule = [options.get(name) for name in ("start", "hidden")]
    rule = [None if x is None else to_gpu(x) for x in rule]
    rule += [options[name] for name in ("sink", "recent", "scale")]
    o, lse = torch.ops.leank.learn_forward(*inputs, *rule)
    grads = torch.ops.leank.learn_backward(to_gpu(d_o), o, lse, *inputs, *rule)
    return {name: to_coded(x) for name, x in zip(OUTPUTS, (o, lse, *grads), strict=True)}


def check(got, truths, dtype, label=""):
    for name, (truth, plain, terms) in truths.items():
        actual = got[name] if name in ("lse", "dalpha") else widen(got[name], dtype)
        # Not of float32, as on the CPU: alpha * q is rounded here.
        assert_within_budget(actual, truth, plain, dtype, f"{label} {name}", terms)


def poison(arrays, d_o, options, dtype):
    """Return copies whose padding columns hold NaN."""
    arrays, d_o = {name: x.copy() for name, x in arrays.items()}, d_o.copy()
    n_context = arrays["k_context"].shape[2]
    for b, start in enumerate(options["start"]):
        for name in ("k_context", "v_context"):
            arrays[name][b, :, :start] = encode(np.nan, dtype)
        for x in (arrays["q"], arrays["k"], arrays["v"], d_o):
            x[b, :, : max(start - n_context, 0)] = encode(np.nan, dtype)
    return arrays, d_o


def make_poisoned(case, seed, dtype):
    """Return (what make returns, the same with NaN as padding)."""
    arrays, d_o, options = make(DEFAULT | case, seed, dtype)
    return (arrays, d_o, options), (*poison(arrays, d_o, options, dtype), options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_learn_equals_formulas(name, dtype):
    clean, poisoned = make_poisoned(CASES[name], len(name), dtype)
    truths = expect(*clean, dtype)
    check(run(*poisoned), truths, dtype)
    check(run_on_cpu(*poisoned), truths, dtype, "on the CPU")


@st.composite
def cases(draw):
    Lc, T = draw(st.integers(0, 400), "Lc"), draw(st.integers(1, 150), "T")
    heads = draw(st.integers(1, 3), "Hkv")
    return {
        "R": draw(st.integers(1, 8), "R"),
        "heads": heads,
        "D": draw(st.sampled_from((64, 80, 96, 128)), "D"),
        "T": T,
        "Lc": Lc,
        "window": draw(st.tuples(st.integers(0, 200), st.integers(1, 200)), "window"),
        "start": draw(st.lists(st.integers(0, Lc + T), min_size=1, max_size=3), "start"),
        "hidden": draw(st.lists(st.booleans(), min_size=heads, max_size=heads), "hidden"),
        "alpha": draw(st.sampled_from(("random", 0.0, 1.0)), "alpha"),
    }


@given(cases(), st.sampled_from(DTYPES), st.integers(0, 1000))
@settings(max_examples=40)
def test_learn_of_random_shapes(case, dtype, seed):
    clean, poisoned = make_poisoned(case, seed, dtype)
    check(run(*poisoned), expect(*clean, dtype), dtype)


@pytest.mark.parametrize("n_blocks, smem_bytes", [(1, None), (40, None), (1000, 95_000)])
@pytest.mark.parametrize("name", ["D128", "ragged", "hidden_ragged", "T257", "long"])
def test_splits_and_stages(monkeypatch, name, n_blocks, smem_bytes):
    """Other devices cut the keys into other numbers of parts, and have room for one tile only."""
    from leank.learning import ops_cuda

    info = dict(ops_cuda.device_info(0)) | {"n_blocks": n_blocks}
    info["smem_bytes"] = smem_bytes or info["smem_bytes"]
    monkeypatch.setattr(ops_cuda, "device_info", lambda device: info)
    clean, poisoned = make_poisoned(CASES[name], len(name), "bfloat16")
    check(run(*poisoned), expect(*clean, "bfloat16"), "bfloat16")


# ------------------------------------------------------------------------------ same, bit for bit


def assert_same(got, told, label=""):
    for name in OUTPUTS:
        np.testing.assert_array_equal(got[name], told[name], f"{label} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_agree_bit_for_bit(dtype):
    case = DEFAULT | {"T": 150, "R": 3, "Lc": 3000, "start": (0, 60, 3100), "D": 128}
    arguments = make(case, 0, dtype)
    first = run(*arguments)
    for _ in range(20):
        assert_same(run(*arguments), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_may_slide_and_stride(dtype):
    """Strided views are read as they are; rows that are not 16-byte words are copied."""
    arrays, d_o, options = make(DEFAULT, 0, dtype)
    told = run(arrays, d_o, options)
    tensors = [to_gpu(arrays[name]) for name in NAMES[:-1]]
    alpha, start = to_gpu(arrays["alpha"]), to_gpu(options["start"])
    rule = (start, None, *(options[name] for name in ("sink", "recent", "scale")))

    def columns_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def channels_first(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def slide(x):
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(x.shape)

    def odd_rows(x):
        return torch.nn.functional.pad(x, (0, 1))[..., :-1]

    for change in (columns_first, channels_first, slide, odd_rows):
        views = [change(x) for x in tensors]
        o, lse = torch.ops.leank.learn_forward(*views, alpha, *rule)
        grads = torch.ops.leank.learn_backward(
            change(to_gpu(d_o)), change(o), lse, *views, alpha, *rule
        )
        got = [to_coded(x) for x in (o, lse, *grads)]
        assert_same(dict(zip(OUTPUTS, got, strict=True)), told, change.__name__)


def test_empty_rows():
    """A row of padding alone gives zeros, and lse -inf."""
    arrays, d_o, options = make(DEFAULT | {"start": (240, 0)}, 0, "bfloat16")
    got = run(arrays, d_o, options)
    assert np.isneginf(got["lse"][0]).all() and np.isfinite(got["lse"][1]).all()
    for name in ("o", "dq", "dk", "dv"):
        assert not got[name][0].any() and got[name][1].any(), name


def test_start_beyond_the_columns_means_their_end():
    arrays, d_o, options = make(DEFAULT | {"start": (240, 0)}, 0, "bfloat16")
    told = run(arrays, d_o, options)
    assert_same(run(arrays, d_o, options | {"start": np.array([2**40, -5])}), told)


# ----------------------------------------------------------------------- what torch does with it


def make_tensors(dtype=torch.bfloat16, B=2, Hkv=2, R=3, T=20, Lc=150, D=64):
    """Return the six tensors; q, k, v and alpha ask for gradients."""
    torch.manual_seed(0)

    def draw(n_heads, n_columns):
        return torch.randn(B, n_heads, n_columns, D, device="cuda").to(dtype)

    q, k, v = draw(Hkv * R, T), draw(Hkv, T), draw(Hkv, T)
    learned = [x.requires_grad_() for x in (q, k, v)]
    alpha = torch.rand(Hkv, D, device="cuda", requires_grad=True)
    return [learned[0], draw(Hkv, Lc), draw(Hkv, Lc), *learned[1:], alpha]


WINDOW = {"sink": 3, "recent": 10}


def gradients(function, inputs):
    o = function(*inputs)
    weights = torch.linspace(-1, 1, o.numel(), device=o.device).reshape(o.shape)
    learned = [x for x in inputs if x.requires_grad]
    return [o, *torch.autograd.grad((o.float() * weights).sum(), learned)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_and_checkpointed_are_the_same(dtype, backend):
    from torch.utils.checkpoint import checkpoint

    if backend == "inductor":
        pytest.importorskip("triton")
    inputs = make_tensors(dtype)
    start = torch.tensor([2, 160], device="cuda")
    function = functools.partial(mixed_attention, **WINDOW, start=start)
    expected = gradients(function, inputs)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for other in (compiled, lambda *x: checkpoint(function, *x, use_reentrant=False)):
        for x, y in zip(gradients(other, inputs), expected, strict=True):
            assert torch.equal(x, y)


def test_operators_pass_opcheck():
    *tensors, alpha = make_tensors()
    start = torch.tensor([0, 5], device="cuda")
    hidden = torch.tensor([True, False], device="cuda")
    args = (*tensors, alpha, start, hidden, 3, 10, 0.25)
    torch.library.opcheck(torch.ops.leank.learn_forward.default, args)
    with torch.no_grad():
        o, lse = torch.ops.leank.learn_forward(*args)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(torch.ops.leank.learn_backward.default, (o, o, lse, *detached))


def test_captured_in_a_graph():
    inputs = [x.detach() for x in make_tensors()]
    expected = mixed_attention(*inputs, **WINDOW)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = mixed_attention(*inputs, **WINDOW)
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)


def test_extra_memory_is_small():
    """No array of size T x L: here one of float32 for all heads would take 256 MiB."""
    inputs = make_tensors(B=1, Hkv=8, R=4, T=64, Lc=32_768 - 64, D=128)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = gradients(functools.partial(mixed_attention, sink=64, recent=512), inputs)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    assert extra < 40 << 20


# ---------------------------------------------------------------------------------------- errors


def test_arguments_that_do_not_fit_are_named():
    q, k_context, v_context, k, v, alpha = (x.detach() for x in make_tensors())
    names = ("q", "k_context", "v_context", "k", "v", "alpha")
    good = dict(zip(names, (q, k_context, v_context, k, v, alpha), strict=True))
    narrow = {name: x if name == "alpha" else x[..., :56] for name, x in good.items()}
    narrow["alpha"] = alpha[:, :56].contiguous()
    single = {name: x.float() for name, x in good.items()}
    for change, error, message in (
        ({"k": k.cpu()}, ValueError, "k: expected a tensor on cuda:0 as q is, got one on cpu"),
        ({"q": q.cpu()}, ValueError, "k_context: expected a tensor on cpu as q is"),
        ({"alpha": alpha.cpu()}, ValueError, "alpha: expected a tensor on cuda:0"),
        ({"start": torch.tensor([0, 0])}, ValueError, "start: expected a tensor on cuda:0"),
        ({"hidden": torch.tensor([True, False])}, ValueError, "hidden: expected a tensor on cuda"),
        (single, TypeError, "q: expected bfloat16 or float16 on CUDA, got torch.float32"),
        (narrow, ValueError, "expected a head dim of .* on CUDA, got 56"),
        (
            {"v": v[..., :56], "v_context": v_context[..., :56]},
            ValueError,
            "v: .* head dim of q, 64, got 56",
        ),
        ({"recent": 0}, ValueError, "recent: expected at least 1, got 0"),
        ({"sink": -1}, ValueError, "sink: expected at least 0, got -1"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ):
        with pytest.raises(error, match=message):
            mixed_attention(**(good | WINDOW | change))
