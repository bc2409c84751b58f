"""ChannelMask: its checks, its files and every way to spoil them, exact budgets."""

import copy
import dataclasses
import doctest
import json
import os
import pickle
import sys

import numpy as np
import pytest

import leank
from leank import _C, ChannelMask, MaskFileError, mask_files, masks

pytest.importorskip("safetensors", reason="needs safetensors")
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import save  # noqa: E402

METADATA = {
    "format_version": "1",
    "shape": "2,3,32",
    "ratio": "0.666667",
    "align": "16",
    "sink": "4",
    "recent": "96",
    "model": "m",
    "method": "",
}


def some_mask(**fields):
    keep = np.zeros((2, 3, 32), np.bool_)
    keep[0, 0] = True
    keep[0, 1, ::2] = True
    keep[1, 2, 16:] = True
    return ChannelMask(keep, **{"sink": 4, "recent": 96, "align": 16, "model": "m"} | fields)


# ------------------------------------------------------------------------------- the object


def test_properties():
    mask = some_mask(method="by hand")
    assert (mask.n_layers, mask.n_heads, mask.head_dim) == (2, 3, 32)
    assert mask.kept_per_head.tolist() == [[32, 16, 0], [0, 0, 16]]
    assert mask.kept_ratio == 64 / 192
    assert mask.ratio == pytest.approx(128 / 192)
    assert mask.empty_heads == 3 / 6
    assert repr(mask) == (
        "<ChannelMask m: 2 layers x 3 KV heads x 32 channels, 66.7% of K dropped, "
        "50.0% of heads empty, sink 4, recent 96, align 16>"
    )
    assert "sink unknown, recent unknown" in repr(some_mask(sink=None, recent=None))


def windows(**fields):
    """Make a mask whose layer 0 is not LeanK's."""
    keep = some_mask().keep.copy()
    keep[0] = True
    return ChannelMask(keep, **{"sink": 4, "recent": 96, "outside": (0,)} | fields)


def test_layers_outside_count_in_no_figure(tmp_path):
    mask, inside = windows(), dataclasses.replace(windows(), keep=windows().keep[1:], outside=())
    assert (mask.ratio, mask.empty_heads) == (inside.ratio, inside.empty_heads) == (5 / 6, 2 / 3)
    assert mask.predict_memory([300]) == inside.predict_memory([300])
    assert "83.3% of K dropped" in repr(mask) and repr(mask).endswith("align 8, 1 layers outside>")
    assert mask != dataclasses.replace(mask, outside=())
    assert pickle.loads(pickle.dumps(mask)) == mask
    mask.save(tmp_path / "mask.safetensors")
    assert ChannelMask.load(tmp_path / "mask.safetensors") == mask
    scores = np.random.default_rng(0).random((3, 2, 32))
    chosen = ChannelMask.from_scores(scores, 0.75, 8, outside=(1,))
    assert chosen.ratio == 0.75 and chosen.keep[1].all() and chosen.outside == (1,)
    np.testing.assert_array_equal(
        chosen.inside, ChannelMask.from_scores(scores[[0, 2]], 0.75, 8).keep
    )


@pytest.mark.parametrize(
    ("outside", "error", "message"),
    [
        ((1,), ValueError, "keep: expected every channel in layer 1, which is outside, got 16.7%"),
        ((2,), ValueError, r"outside: expected numbers of some of the 2 layers, got \[2\]"),
        ((0, 1), ValueError, "outside: expected numbers of some of the 2 layers"),
        ((0, 0), ValueError, "outside: expected numbers of some of the 2 layers"),
        ((-1,), ValueError, "outside: expected at least 0, got -1"),
        ((0.0,), TypeError, "outside: expected an int, got float"),
    ],
)
def test_outside_refused(outside, error, message):
    with pytest.raises(error, match=message):
        windows(outside=outside)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0;1", "metadata outside: expected layers, as in 0,2,4, got '0;1'"),
        ("9", "metadata ratio: expected 0.416667, got 0.833333"),
        ("", "metadata ratio: expected 0.416667, got 0.833333"),
        ("1", "metadata ratio: expected 0.000000, got 0.833333"),
    ],
)
def test_outside_in_a_file_refused(tmp_path, text, message):
    path = tmp_path / "mask.safetensors"
    windows().save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() | {"outside": text}
    path.write_bytes(save({"mask": windows().keep}, metadata))
    with pytest.raises(MaskFileError, match=message):
        ChannelMask.load(path)


def test_doctests():
    result = doctest.testmod(masks, extraglobs={"leank": leank})
    assert result.attempted > 3 and result.failed == 0


def test_is_frozen_and_copies_its_array():
    keep = np.ones((1, 1, 8), np.bool_)
    mask = ChannelMask(keep)
    keep[:] = False
    assert mask.keep.all()
    with pytest.raises(ValueError, match="read-only"):
        mask.keep[0, 0, 0] = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.sink = 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_frozen(duplicate):
    mask = some_mask()
    other = duplicate(mask)
    assert other == mask and not other.keep.flags.writeable
    assert other != dataclasses.replace(mask, recent=97)
    assert other != dataclasses.replace(mask, keep=np.ones_like(mask.keep))
    assert other != "mask"


@pytest.mark.parametrize(
    ("keep", "fields", "error", "message"),
    [
        (np.ones((1, 1, 8), np.uint8), {}, TypeError, "keep: expected dtype bool, got uint8"),
        (np.ones((1, 8), np.bool_), {}, ValueError, r"head_dim\), got \(1, 8\)"),
        (np.ones((0, 1, 8), np.bool_), {}, ValueError, r"got \(0, 1, 8\)"),
        (np.ones((1, 1, 12), np.bool_), {}, ValueError, "multiple of 8 up to 512, got 12"),
        (np.ones((1, 1, 520), np.bool_), {}, ValueError, "multiple of 8 up to 512, got 520"),
        (np.ones((1, 1, 8), np.bool_), {"align": 12}, ValueError, "align: .*multiple of 8, got 12"),
        (np.ones((1, 1, 8), np.bool_), {"align": 0}, ValueError, "align: expected at least 8"),
        (np.ones((1, 1, 8), np.bool_), {"align": 16}, ValueError, "got 8 in layer 0, head 0"),
        (np.ones((1, 1, 8), np.bool_), {"sink": -1}, ValueError, "sink: expected at least 0"),
        (np.ones((1, 1, 8), np.bool_), {"recent": 0}, ValueError, "recent: expected at least 1"),
        (
            np.ones((1, 1, 8), np.bool_),
            {"sink": 4.0},
            TypeError,
            "sink: expected an int, got float",
        ),
        (np.ones((1, 1, 8), np.bool_), {"recent": True}, TypeError, "recent: .* got bool"),
        (np.eye(8, dtype=np.bool_)[None], {}, ValueError, "got 1 in layer 0, head 0"),
    ],
)
def test_refuses(keep, fields, error, message):
    with pytest.raises(error, match=message):
        ChannelMask(keep, **fields)


def test_predict_memory_sums_the_layers():
    mask = some_mask()
    expected = dict.fromkeys(_C.predict_memory(mask.keep[0], np.array([1]), sink=4, recent=96), 0)
    for keep in mask.keep:
        part = _C.predict_memory(
            keep, np.array([700, 5]), sink=4, recent=96, slack=10, dtype="bfloat16"
        )
        expected = {key: expected[key] + part[key] for key in expected}
    assert mask.predict_memory([700, 5], "bfloat16", slack=10) == expected
    assert expected["k_bytes"] < expected["v_bytes"] < 2 * 3 * 32 * 2 * (704 + 64)


def test_predict_memory_needs_a_window():
    with pytest.raises(ValueError, match="expected a known window, got sink 4, recent None"):
        some_mask(recent=None).predict_memory([100])


# ------------------------------------------------------------------------------- from scores


@pytest.mark.parametrize("align", [8, 16, 32])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.7, 0.83, 1.0])
def test_from_scores_meets_the_budget_exactly(rng, ratio, align):
    alpha = rng.random((5, 3, 64))
    mask = ChannelMask.from_scores(alpha, ratio, align, sink=1, recent=2, model="x")
    assert mask.keep.sum() == round(alpha.size * (1 - ratio) / align) * align
    assert (mask.kept_per_head % align == 0).all()
    assert (mask.align, mask.sink, mask.recent, mask.model) == (align, 1, 2, "x")


def test_from_scores_keeps_the_best_channels(rng):
    alpha = rng.random((2, 2, 32))
    keep = ChannelMask.from_scores(alpha, 0.5, 8).keep
    for layer in range(2):
        for head in range(2):
            kept, scores = keep[layer, head], alpha[layer, head]
            if 0 < kept.sum() < 32:
                assert scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize(
    ("shape", "ratio", "align", "message"),
    [
        ((4, 8), 0.5, 8, "alpha: expected"),
        ((1, 1, 8), 1.5, 8, "ratio"),
        ((1, 1, 24), 0.5, 16, "align"),
    ],
)
def test_from_scores_refuses(shape, ratio, align, message):
    with pytest.raises(ValueError, match=message):
        ChannelMask.from_scores(np.zeros(shape), ratio, align)


def test_from_scores_refuses_nan():
    with pytest.raises(ValueError, match="alpha: expected finite values"):
        ChannelMask.from_scores(np.full((1, 1, 8), np.nan), 0.5, 8)


# ------------------------------------------------------------------------------- mask files


@pytest.mark.parametrize("window", [(4, 96), (0, 1), (None, None), (None, 7)])
def test_round_trip(tmp_path, window):
    mask = some_mask(sink=window[0], recent=window[1], method="by hand: a, b", model="ä/b")
    mask.save(tmp_path / "a.safetensors")
    again = ChannelMask.load(str(tmp_path / "a.safetensors"))
    assert again == mask and not again.keep.flags.writeable


def test_documented_metadata(tmp_path):
    some_mask().save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata == METADATA
    for key in metadata:
        assert f"``{key}``" in mask_files.__doc__


def test_save_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    some_mask().save(path)
    before = path.read_bytes()

    def broken(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space left"):
        some_mask(recent=5).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    monkeypatch.undo()
    some_mask(recent=5).save(path)
    assert ChannelMask.load(path).recent == 5 and os.listdir(tmp_path) == ["a.safetensors"]


def write(path, tensors=None, drop=(), **changes):
    """Write a mask file that differs from a right one as told."""
    metadata = METADATA | changes
    metadata = {key: value for key, value in metadata.items() if key not in drop}
    tensors = {"mask": some_mask().keep} if tensors is None else tensors
    path.write_bytes(save(tensors, metadata))
    return path


def fails(path, message):
    with pytest.raises(MaskFileError, match=message) as caught:
        ChannelMask.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert isinstance(caught.value, ValueError)


def test_what_write_makes_is_right(tmp_path):
    assert ChannelMask.load(write(tmp_path / "m", other="ignored")) == some_mask()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "metadata format_version: expected '1', got '2'"),
        ({"shape": "3,2,32"}, "metadata shape: expected 2,3,32, got 3,2,32"),
        ({"ratio": "0.7"}, "metadata ratio: expected 0.666667, got 0.7"),
        ({"ratio": "nan"}, "metadata ratio: expected 0.666667, got nan"),
        ({"align": "x"}, "metadata align: expected a whole number, got 'x'"),
        ({"align": "12"}, "align: expected a multiple of 8, got 12"),
        ({"align": "32"}, "keep: expected a multiple of 32 .* got 16 in layer 0, head 1"),
        ({"sink": "-1"}, "metadata sink: expected a whole number, got '-1'"),
        ({"sink": ""}, "metadata sink: expected a whole number, got ''"),
        ({"sink": "²"}, "metadata sink: expected a whole number"),
        ({"sink": str(2**60)}, r"sink: expected less than 2\*\*60, got 1152921504606846976"),
        ({"recent": "9" * 30}, r"recent: expected less than 2\*\*60, got 999"),
        ({"recent": "9" * 5000}, "integer string conversion"),
        ({"outside": "9" * 30}, r"outside: expected numbers of some of the 2 layers"),
        ({"recent": "0"}, "recent: expected at least 1, got 0"),
        ({"recent": "512.0"}, "metadata recent: expected a whole number, got '512.0'"),
    ],
)
def test_wrong_metadata(tmp_path, changes, message):
    fails(write(tmp_path / "m.safetensors", **changes), message)


@pytest.mark.parametrize(
    "key", ["shape", "ratio", "align", "sink", "recent", "model", "method", "format_version"]
)
def test_missing_metadata(tmp_path, key):
    word = "got none" if key == "format_version" else f"got no {key}"
    fails(write(tmp_path / "m.safetensors", drop=[key]), word)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"keep": np.ones((2, 3, 32), np.bool_)}, "expected one tensor, mask, got keep"),
        ({}, "expected one tensor, mask, got none"),
        (
            {"mask": np.ones((2, 3, 32), np.bool_), "x": np.ones(1)},
            "expected one tensor, mask, got mask, x",
        ),
        ({"mask": np.ones((2, 3, 32), np.uint8)}, "tensor mask: expected dtype BOOL, got U8"),
        ({"mask": np.ones((2, 3, 32), np.float32)}, "expected dtype BOOL, got F32"),
        ({"mask": np.ones((6, 32), np.bool_)}, "metadata shape: expected 6,32, got 2,3,32"),
        ({"mask": np.ones((2, 3, 0), np.bool_)}, "metadata shape: expected 2,3,0"),
    ],
)
def test_wrong_tensor(tmp_path, tensors, message):
    fails(write(tmp_path / "m.safetensors", tensors), message)


@pytest.mark.parametrize(
    ("shape", "message"), [((6, 32), "keep: expected .n_layers"), ((2, 3, 12), "multiple of 8")]
)
def test_wrong_shape_that_the_metadata_agrees_with(tmp_path, shape, message):
    text = ",".join(map(str, shape))
    tensors = {"mask": np.ones(shape, np.bool_)}
    fails(write(tmp_path / "m", tensors, shape=text, ratio="0.000000"), message)


def test_a_tensor_without_axes(tmp_path):
    """Found by fuzzing: layers outside were looked for before the shape."""
    one = {"mask": np.array(True)}
    fails(write(tmp_path / "m", one, shape="", outside="0"), r"keep: expected .* got \(\)")


def test_a_byte_that_is_no_bool(tmp_path):
    path = write(tmp_path / "m.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] = 2
    path.write_bytes(data)
    fails(path, "expected bytes 0 and 1, got 2")


def test_a_flipped_byte_of_the_tensor(tmp_path):
    path = write(tmp_path / "m.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fails(path, "metadata ratio")


def test_every_truncation(tmp_path):
    data = write(tmp_path / "m.safetensors").read_bytes()
    path = tmp_path / "short.safetensors"
    for n in range(len(data)):
        path.write_bytes(data[:n])
        fails(path, f"expected a safetensors file, got {n} bytes")
    path.write_bytes(data + b"\0")
    fails(path, "expected a safetensors file")


def test_garbage(tmp_path, rng):
    path = tmp_path / "g.safetensors"
    path.write_bytes(rng.bytes(4096))
    fails(path, "expected a safetensors file, got 4096 bytes")


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_no_file(tmp_path, kind):
    if kind == "pth":
        pytest.importorskip("torch")
    load = ChannelMask.from_pth if kind == "pth" else ChannelMask.load
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    with pytest.raises(OSError):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        some_mask().save(tmp_path / "no folder" / "m.safetensors")


def test_paths_that_lead_nowhere(tmp_path):
    path, link = tmp_path / "m.safetensors", tmp_path / "link.safetensors"
    some_mask().save(path)
    for target, error in (("none", FileNotFoundError), (link.name, OSError), ("m/x", OSError)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(error, match="link.safetensors"):
            ChannelMask.load(link)
    with pytest.raises(NotADirectoryError, match="m.safetensors"):
        ChannelMask.load(path / "inside")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "m.safetensors")
    path.chmod(0)
    with pytest.raises(PermissionError, match="m.safetensors"):
        ChannelMask.load(path)


def test_symbolic_links(tmp_path):
    """A link is read through; saving takes its place, and what it led to stays."""
    path, link = tmp_path / "m.safetensors", tmp_path / "link.safetensors"
    some_mask().save(path)
    link.symlink_to(path)
    assert ChannelMask.load(link) == some_mask()
    some_mask(recent=5).save(link)
    assert ChannelMask.load(path) == some_mask() and not link.is_symlink()
    assert ChannelMask.load(link).recent == 5


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 2**63, 2**64, -1])
def test_absurd_shapes(tmp_path, size):
    """Headers that promise more than there is; nothing of that size is ever made."""
    for shape in ([size], [size, 1, 8], [1, size, 8], [size, size, size]):
        for end in (0, 8, size):
            tensor = {"dtype": "BOOL", "shape": shape, "data_offsets": [0, end]}
            header = json.dumps({"mask": tensor, "__metadata__": METADATA}).encode()
            path = tmp_path / "m.safetensors"
            path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
            fails(path, "expected a safetensors file")
    for length in (size % 2**64, 2**40):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        fails(path, "expected a safetensors file, got 10 bytes")


def test_without_safetensors(tmp_path, monkeypatch):
    path = write(tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for use in (lambda: ChannelMask.load(path), lambda: some_mask().save(path)):
        with pytest.raises(ModuleNotFoundError, match=r"needs safetensors: pip install 'leank\[hf"):
            use()
