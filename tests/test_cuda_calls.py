"""What leank._cuda does before it reaches a device; none of this needs a GPU."""

import pytest

_cuda = pytest.importorskip("leank._cuda", reason="leank was built without CUDA")

ISSUE = (1, 32, 8, 65536 - 256, 256, 128, 128)  # B, Hq, Hkv, Lc, T, D, Dv
STRIDED = (256, 0, 0, 0)
LAUNCH = {"work": 256, "n_blocks": 132, "smem_bytes": 232_448, "stream": 0}


def learn_arguments(**change):
    tensors = dict.fromkeys(("q", "k_context", "v_context", "k", "v"), STRIDED)
    rest = {"alpha": 256, "start": None, "hidden": None, "sink": 0, "recent": 1, "scale": 1.0}
    return {"dtype": "bfloat16", "sizes": ISSUE, **tensors, **rest, **LAUNCH} | change


def learn_forward(**change):
    _cuda.learn_forward(**learn_arguments(**change), o=256, lse=256)


def layer():
    return _cuda.Layer(
        **dict.fromkeys(("page", "twin", "state", "real", "geom"), 256),
        **{"table_stride": 1, "real_stride": 64, "dtype": "bfloat16", "n_rows": 1, "n_heads": 1},
        **{"head_dim": 64, "sink": 0, "recent": 1, "slack": 0, "max_tokens": 64},
    )


def attend_arguments(n_strides):
    tensors = dict.fromkeys(("q", "k", "v", "o"), 256) | dict.fromkeys(("lse", "valid", "sinks"))
    strides = dict.fromkeys(("q_stride", "k_stride", "v_stride"), (0,) * n_strides)
    return tensors | strides | {"n_q_heads": 1, "scale": 1.0, "softcap": 0.0} | LAUNCH


def attend(**change):
    _cuda.attend(layer(), **attend_arguments(2) | change)


def span(**change):
    columns = {"position": 256, "n_columns": 1, "columns_before": 0}
    pieces = {"scratch": None, "twin_bytes": 0, "piece": 1}
    _cuda.span(layer(), **attend_arguments(3) | columns | pieces | change)


def append(**change):
    tensors = {"k": 256, "v": 256, "k_stride": (0, 0, 0), "v_stride": (0, 0, 0), "valid": None}
    rest = {"position": 256, "n_columns": 1, "columns_before": 0, "stream": 0}
    _cuda.append(layer(), **tensors | rest | change)


@pytest.mark.parametrize("backward", [False, True])
def test_learning_needs_little_memory_beside_its_results(backward):
    """The T x L array of one float32 per query head would take 2 GiB at 64k, 4 GiB at 128k."""
    for n_columns in (65536, 131072):
        sizes = (*ISSUE[:3], n_columns - 256, *ISSUE[4:])
        n_bytes = _cuda.learn_work_bytes(sizes=sizes, backward=backward, n_blocks=132)
        assert 0 < n_bytes < 20 << 20
    smollm2 = (8, 9, 3, 6000, 96, 64, 64)
    assert _cuda.learn_work_bytes(sizes=smollm2, backward=backward, n_blocks=132) < 20 << 20


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": (1, 32, 8, 64, 256, 72, 72)},
        {"sizes": (1, 32, 8, 64, 256, 128, 64)},
        {"sizes": (1, 30, 8, 64, 256, 128, 128)},
        {"sizes": (1, 32, 8, 64, 0, 128, 128)},
        {"sizes": (1, 32, 8, 2**29, 256, 128, 128)},
        {"sizes": (2**10, 2**10, 8, 64, 2**10, 128, 128)},
        {"smem_bytes": 48 << 10},
        {"recent": 0},
        {"sink": -1},
        {"scale": float("inf")},
        {"dtype": "float32"},
        {"work": None},
        {"alpha": None},
        {"q": (None, 0, 0, 0)},
        {"k_context": (None, 0, 0, 0)},
    ],
)
def test_learning_refuses_what_no_kernel_is_built_for(change):
    with pytest.raises(ValueError):
        learn_forward(**change)


def test_learning_takes_tuples():
    for change in ({"q": 256}, {"q": (1, 2)}, {"sizes": (1, 2)}, {"sizes": 3}):
        with pytest.raises(TypeError, match="expected"):
            learn_forward(**change)


@pytest.mark.parametrize("name, n_strides", [("attend", 2), ("span", 3), ("append", 3)])
def test_strides_are_as_many_as_axes(name, n_strides):
    call = {"attend": attend, "span": span, "append": append}[name]
    for strides in (0, (0,) * (n_strides - 1), (0,) * (n_strides + 1), ("0",) * n_strides):
        with pytest.raises(TypeError):
            call(k_stride=strides)


@pytest.mark.skipif(_cuda.device_count() > 0, reason="needs a machine without a GPU")
def test_a_refused_launch_says_why():
    """The error's number was read before the call that sets it."""
    calls = {"attend": attend, "span": span, "append": append, "learn_forward": learn_forward}
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: CUDA error [1-9]"):
            call()
