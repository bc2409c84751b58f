"""Import of the reference implementation's .pth masks."""

import numpy as np
import pytest

from leank import ChannelMask, MaskFileError

torch = pytest.importorskip("torch", reason="needs torch")


def pth(path, value):
    torch.save(value, path)
    return path


def blocks(widths, head_dim=64):
    tensor = torch.zeros(len(widths), 1, head_dim)
    for layer, width in enumerate(widths):
        tensor[layer, 0, :width] = 1
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_import(tmp_path, dtype):
    tensor = blocks([0, 32, 64])
    mask = ChannelMask.from_pth(pth(tmp_path / "m.pth", tensor.to(dtype)), sink=3, recent=9)
    assert np.array_equal(mask.keep, tensor.bool().numpy())
    assert (mask.sink, mask.recent, mask.model) == (3, 9, "")
    assert ".pth" in mask.method


@pytest.mark.parametrize(
    ("widths", "align"), [([0, 32, 64], 32), ([8, 64], 8), ([16, 48], 16), ([0], 64), ([64], 64)]
)
def test_align_is_the_largest_that_fits(tmp_path, widths, align):
    assert ChannelMask.from_pth(pth(tmp_path / "m.pth", blocks(widths))).align == align


def test_window_is_not_known(tmp_path):
    mask = ChannelMask.from_pth(pth(tmp_path / "m.pth", blocks([8])))
    assert mask.sink is None and mask.recent is None


def test_a_wrong_argument_is_not_the_files_fault(tmp_path):
    path = pth(tmp_path / "m.pth", blocks([8]))
    with pytest.raises(ValueError, match="^sink: expected at least 0, got -1") as caught:
        ChannelMask.from_pth(path, sink=-1)
    assert not isinstance(caught.value, MaskFileError)


@pytest.mark.parametrize(
    "make",
    [
        torch.nn.Parameter,
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: torch._neg_view(-tensor),
        lambda tensor: tensor.transpose(0, 2).contiguous().transpose(0, 2),
    ],
    ids=["parameter", "grad", "negative", "transposed"],
)
def test_tensors_of_other_kinds(tmp_path, make):
    """Found by fuzzing: NumPy does not take some of them as they are."""
    tensor = blocks([8, 64])
    mask = ChannelMask.from_pth(pth(tmp_path / "m.pth", make(tensor.clone())))
    assert np.array_equal(mask.keep, tensor.bool().numpy())


class Executes:
    def __reduce__(self):
        return print, ("a .pth file must not run this",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (blocks([8]) * 0.5, r"expected the values 0 and 1, got 0.5 at \(0, 0, 0\)"),
        (blocks([8]) * float("nan"), r"got nan at \(0, 0, 0\)"),
        (blocks([8]) - 1, r"got -1.0 at \(0, 0, 8\)"),
        (blocks([8, 12]), "expected a multiple of 8 .* got 12 in layer 1, head 0"),
        (blocks([8], head_dim=12), "multiple of 8 up to 512, got 12"),
        (torch.zeros(0, 2, 8), r"got \(0, 2, 8\)"),
        (blocks([8])[0], r"expected a float tensor .*, got torch.float32 \(1, 64\)"),
        (blocks([8]).bool(), "expected a float tensor .*, got torch.bool"),
        (blocks([8]).long(), "expected a float tensor .*, got torch.int64"),
        (blocks([8]).to_sparse(), "expected a dense tensor .*, got one that is torch.sparse_coo"),
        (blocks([8]).to("meta"), "expected a dense tensor .*, got one that is .* on meta"),
        (
            torch.ones(1).expand(10**6, 10**6, 8),
            r"expected a value for each of \(1000000, 1000000, 8\), got 1 values",
        ),
        ({"mask": blocks([8])}, "expected one tensor, got dict"),
        (Executes(), "expected a file written by torch.save, got: Weights only load failed"),
    ],
)
def test_wrong_content(tmp_path, capsys, value, message):
    path = pth(tmp_path / "m.pth", value)
    with pytest.raises(MaskFileError, match=message) as caught:
        ChannelMask.from_pth(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_corrupt_files(tmp_path):
    data = pth(tmp_path / "m.pth", blocks([8, 16])).read_bytes()
    path = tmp_path / "bad.pth"
    for bad in (
        b"",
        data[:10],
        data[: len(data) // 2],
        data[:-1],
        b"no zip file at all",
        b"\x80\x02.",
    ):
        path.write_bytes(bad)
        with pytest.raises(MaskFileError, match="expected a file written by torch.save"):
            ChannelMask.from_pth(path)


@pytest.mark.parametrize(
    ("name", "shape", "dropped", "heads"),
    [
        ("llama3.1-8b-instruct.pth", (32, 8, 128), 0.6875, {0: 47, 32: 120, 64: 67, 96: 22}),
        ("qwen2.5-7b-insturct.pth", (28, 4, 128), 0.7098, {0: 35, 32: 34, 64: 33, 96: 10}),
    ],
)
def test_the_authors_masks(name, shape, dropped, heads, reference_mask):
    mask = ChannelMask.from_pth(reference_mask(name), sink=128, recent=896)
    assert mask.keep.shape == shape
    assert round(mask.ratio, 4) == dropped
    widths, counts = np.unique(mask.kept_per_head, return_counts=True)
    assert dict(zip(widths.tolist(), counts.tolist(), strict=True)) == heads
    assert mask.align == 32
