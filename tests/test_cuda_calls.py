"""What leank._cuda does before it reaches a device; none of this needs a GPU."""

import pytest

_cuda = pytest.importorskip("leank._cuda", reason="leank was built without CUDA")

ISSUE = (1, 32, 8, 65536 - 256, 256, 128, 128)  # B, Hq, Hkv, Lc, T, D, Dv
STRIDED = (256, 0, 0, 0)


def learn_arguments(**change):
    tensors = dict.fromkeys(("q", "k_context", "v_context", "k", "v"), STRIDED)
    rest = {"alpha": 256, "start": None, "hidden": None, "sink": 0, "recent": 1, "scale": 1.0}
    launch = {"work": 256, "n_blocks": 132, "smem_bytes": 232_448, "stream": 0}
    return {"dtype": "bfloat16", "sizes": ISSUE, **tensors, **rest, **launch} | change


def learn_forward(**change):
    _cuda.learn_forward(**learn_arguments(**change), o=256, lse=256)


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


@pytest.mark.skipif(_cuda.device_count() > 0, reason="needs a machine without a GPU")
def test_a_refused_launch_says_why():
    """The error's number was read before the call that sets it."""
    layer = _cuda.Layer(
        **dict.fromkeys(("page", "twin", "state", "real", "geom"), 256),
        **{"table_stride": 1, "real_stride": 64, "dtype": "bfloat16", "n_rows": 1, "n_heads": 1},
        **{"head_dim": 64, "sink": 0, "recent": 1, "slack": 0, "max_tokens": 64},
    )
    tensors = {"k": 256, "v": 256, "k_stride": (0, 0, 0), "v_stride": (0, 0, 0), "valid": None}
    rest = {"position": 256, "n_columns": 1, "columns_before": 0, "stream": 0}
    for name, call in (
        ("append", lambda: _cuda.append(layer, **tensors, **rest)),
        ("learn_forward", learn_forward),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: CUDA error [1-9]"):
            call()
