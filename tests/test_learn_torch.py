"""leank.learning.mixed_attention: what autograd, torch.compile and checkpointing make of it."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from leank.learning import mixed_attention  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
WINDOW = {"sink": 3, "recent": 10}


def make(dtype=torch.float32, B=2, Hkv=2, R=3, T=20, Lc=70, D=16, Dv=24):
    """Return the six tensors; q, k, v and alpha ask for gradients."""
    torch.manual_seed(0)
    q = torch.randn(B, T, Hkv * R, D).to(dtype).transpose(1, 2)
    context = [torch.randn(B, Hkv, Lc, n).to(dtype) for n in (D, Dv)]
    k, v = (torch.randn(B, Hkv, T, n).to(dtype).requires_grad_() for n in (D, Dv))
    return [q.requires_grad_(), *context, k, v, torch.rand(Hkv, D, requires_grad=True)]


def learned(inputs):
    return [x for x in inputs if x.requires_grad]


def gradients(function, inputs):
    """Return the output and the gradients of a loss that weighs each output differently."""
    o = function(*inputs)
    weights = torch.linspace(-1, 1, o.numel()).reshape(o.shape)
    return [o, *torch.autograd.grad((o.double() * weights).sum(), learned(inputs))]


def eager(q, k_context, v_context, k, v, alpha, *, sink, recent, start=None, hidden=None):
    """Compute the same in float64 with a T x L array."""
    q, k_context, v_context, k, v, alpha = (
        x.double() for x in (q, k_context, v_context, k, v, alpha)
    )
    R = q.shape[1] // k.shape[1]
    k = torch.cat([k_context, k], 2).repeat_interleave(R, 1)
    v = torch.cat([v_context, v], 2).repeat_interleave(R, 1)
    alpha = alpha.repeat_interleave(R, 0)[:, None]
    first = torch.zeros(len(q), dtype=torch.int64) if start is None else start
    column = torch.arange(k.shape[2])
    position = column - first[:, None, None, None]
    query = position[..., -q.shape[2] :].transpose(2, 3)
    seen = (position >= 0) & (position <= query)
    middle = seen & (position >= sink) & (query - position >= recent)
    if hidden is not None:
        seen = seen & ~(middle & hidden.repeat_interleave(R)[:, None, None])
    scale = q.shape[3] ** -0.5
    s = torch.where(middle, (q * alpha) @ k.mT, q @ k.mT) * scale
    # Padding queries see nothing: their rows are all zero.
    A = torch.softmax(s.masked_fill(~seen, -1e30), -1) * seen.any(-1, keepdim=True)
    return A @ v


def assert_near(got, expected, dtype):
    for x, y in zip(got, expected, strict=True):
        assert torch.isfinite(x).all()
        error = (x.double() - y.double()).abs().max()
        assert error <= TOLERANCE[dtype] * y.abs().max() + 1e-12, error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "ragged", "hidden"])
def test_gradients_equal_those_of_autograd(dtype, options):
    options = {
        "plain": {},
        "ragged": {"start": torch.tensor([0, 75])},
        "hidden": {"start": torch.tensor([9, 20]), "hidden": torch.tensor([False, True])},
    }[options]
    inputs = make(dtype)
    got = gradients(lambda *x: mixed_attention(*x, **WINDOW, **options), inputs)
    assert [x.dtype for x in got] == [*[dtype] * 4, torch.float32]
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    assert_near(got, gradients(lambda *x: eager(*x, **WINDOW, **options), double), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_of_one_is_dense(dtype):
    q, k_context, v_context, k, v, alpha = make(dtype)
    mask = torch.arange(90) <= torch.arange(70, 90)[:, None]
    keys, values = torch.cat([k_context, k], 2), torch.cat([v_context, v], 2)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    ones = torch.ones_like(alpha)
    assert_near(
        [mixed_attention(q, k_context, v_context, k, v, ones, **WINDOW)], [dense.detach()], dtype
    )
    wide = mixed_attention(q, k_context, v_context, k, v, alpha, sink=0, recent=90)
    assert_near([wide], [dense.detach()], dtype)


def test_scale():
    inputs = make()
    default = mixed_attention(*inputs, **WINDOW)
    assert torch.equal(mixed_attention(*inputs, **WINDOW, scale=0.25), default)
    half = [inputs[0] * 0.5, *inputs[1:]]
    assert torch.equal(mixed_attention(*half, **WINDOW, scale=0.5), default)


# ------------------------------------------------------------------------- what torch does with it


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_and_checkpointed_are_the_same(dtype):
    inputs = make(dtype)

    def function(*x):
        return mixed_attention(*x, **WINDOW, start=torch.tensor([2, 80]))

    expected = gradients(function, inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for other in (compiled, lambda *x: checkpoint(function, *x, use_reentrant=False)):
        for x, y in zip(gradients(other, inputs), expected, strict=True):
            assert torch.equal(x, y)


def test_operators_pass_opcheck():
    q, k_context, v_context, k, v, alpha = make()
    hidden = torch.tensor([True, False])
    args = (q, k_context, v_context, k, v, alpha, torch.tensor([0, 5]), hidden, 3, 10, 0.25)
    torch.library.opcheck(torch.ops.leank.learn_forward.default, args)
    with torch.no_grad():
        o, lse = torch.ops.leank.learn_forward(*args)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(torch.ops.leank.learn_backward.default, (o, o, lse, *detached))


def test_gradient_of_an_expanded_output():
    """sum() hands down a gradient whose strides are all 0."""
    inputs = make()
    o = mixed_attention(*inputs, **WINDOW)
    got = torch.autograd.grad(o.sum(), learned(inputs))
    again = mixed_attention(*inputs, **WINDOW)
    told = torch.autograd.grad(again, learned(inputs), torch.ones_like(again))
    assert all(torch.equal(x, y) for x, y in zip(got, told, strict=True))


def test_threads_do_not_matter():
    inputs = make(T=100)
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(gradients(lambda *x: mixed_attention(*x, **WINDOW), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_the_operators_of_the_cuda_side_fit_beside():
    """A namespace has one library of kind DEF per process: that of leank/_cuda_ops.py."""
    code = "import leank.learning, torch; torch.library.Library('leank', 'DEF')"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ errors

REFUSED = {
    "dtype": ("q", lambda x: x.double(), TypeError, "q: expected float32, bfloat16 or float16"),
    "other_dtype": ("k", lambda x: x.half(), TypeError, "k: expected torch.float32 as q has"),
    "axes": ("v", lambda x: x[0], ValueError, r"v: expected 4 axes, got shape \(2, 20, 24\)"),
    "heads": ("q", lambda x: x[:, :5], ValueError, "q: expected a multiple of 2 heads, got 5"),
    "k": ("k", lambda x: x[:, :, 1:], ValueError, r"k: expected \(2, 2, 20, 16\), got"),
    "v": ("v", lambda x: x[:, :, 1:], ValueError, r"v: expected \(2, 2, 20, 24\), got"),
    "k_context": ("k_context", lambda x: x[:1], ValueError, r"k_context: expected \(2, 2, 70, 16"),
    "v_context": ("v_context", lambda x: x[..., 1:], ValueError, r"v_context: expected \(2, 2, 7"),
    "alpha_shape": ("alpha", lambda x: x[:1], ValueError, r"alpha: expected \(2, 16\), got"),
    "alpha_dtype": ("alpha", lambda x: x.bfloat16(), TypeError, "alpha: expected torch.float32"),
    "device": ("q", lambda x: x.to("meta"), ValueError, "q: expected a tensor on the CPU"),
    "gradient": ("k_context", lambda x: x.requires_grad_(), ValueError, "without gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_named(name):
    argument, change, error, message = REFUSED[name]
    names = ("q", "k_context", "v_context", "k", "v", "alpha")
    inputs = dict(zip(names, make(), strict=True))
    inputs[argument] = change(inputs[argument])
    with pytest.raises(error, match=message):
        mixed_attention(**inputs, **WINDOW)


def test_options_that_do_not_fit_are_named():
    inputs = make()
    for option, error, message in (
        ({"start": torch.zeros(2)}, TypeError, "start: expected torch.int64, got torch.float32"),
        ({"start": torch.tensor([0])}, ValueError, r"start: expected \(2,\), got \(1,\)"),
        ({"start": torch.tensor([0, 91])}, ValueError, "start: expected values from 0 to 90"),
        ({"hidden": torch.zeros(2)}, TypeError, "hidden: expected torch.bool"),
        ({"hidden": torch.zeros(3, dtype=torch.bool)}, ValueError, r"hidden: expected \(2,\)"),
        ({"recent": 0}, ValueError, "recent: expected at least 1"),
        ({"scale": np.inf}, ValueError, "scale: expected a finite number"),
    ):
        with pytest.raises(error, match=message):
            mixed_attention(*inputs, **(WINDOW | option))
