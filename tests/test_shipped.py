"""Shipped masks: the index agrees with the files, names are found, `leank masks` prints them."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("safetensors")

from leank import ChannelMask, shipped  # noqa: E402
from leank.shipped import ShippedMaskError, add, find, load, shipped_masks  # noqa: E402

MADE = {
    "seed": 3,
    "command": "leank learn smollm2 --ratio 0.7 --align 16 --seed 3 -o FILE",
    "gpu": "NVIDIA H200",
    "seconds": 48.25,
    "commit": "0123abc",
}


def some_mask(n_kept=16, sink=64, **fields):
    keep = np.zeros((3, 2, 64), bool)
    keep[:, 0, :n_kept] = True
    keep[0, 1, ::4] = True
    fields = {"align": 16, "recent": 512, "model": "SmolLM2-135M-Instruct"} | fields
    return ChannelMask(keep, sink=sink, **fields)


def results():
    kind = dict(kind="single", n=2000, dense=0.9, mask=0.88, loss_points=2.0, upper_points=2.4)
    kinds = [kind | {"kl": 0.01, "loss": 1.5}]
    kinds.append(kinds[0] | {"kind": "copy", "dense": 0.1, "mask": 0.12, "loss_points": -2.0})
    nothing = dict.fromkeys(("dense", "mask", "loss_points", "upper_points"))
    kinds.append(kinds[0] | {"kind": "continuation"} | nothing)
    return kinds[0] | {"kinds": kinds, "counted": ["single"]}


@pytest.fixture
def folder(tmp_path):
    """A folder with two masks, of which the later in the alphabet was added first."""
    add("tiny-70-b", some_mask(32), tmp_path / "masks", **MADE, results={})
    add("tiny-70-a", some_mask(), tmp_path / "masks", **MADE, results=results())
    return tmp_path / "masks"


# --------------------------------------------------------------------------- the real folder


def test_every_file_of_the_package_has_its_line_and_its_numbers():
    records = shipped_masks()
    files = {path.name for path in shipped.FOLDER.iterdir()} - {"README.md"}
    assert files == {"index.json"} | {f"{record.name}.safetensors" for record in records}
    assert len({record.name for record in records}) == len(records)
    for record in records:
        mask = load(record.name)  # compares the index with the file
        k, v = mask.keep.mean(), mask.keep.any(-1).mean()
        assert (record.kept_k, record.kept_v, record.kv_bytes) == (k, v, (k + v) / 2)
        assert record.empty_heads == (~mask.keep.any(-1)).mean()
        assert record.ratio == 1 - k
        assert (record.align, record.sink) == (mask.align, mask.sink)
        assert (record.recent, record.model) == (mask.recent, mask.model)
        assert record.command and record.commit and record.seconds > 0
        assert record.results["kinds"], "it was tested"
        for key in ("kept_k", "kept_v", "kv_bytes", "empty_heads"):
            assert record.results[key] == getattr(record, key), "this mask was tested"


# ------------------------------------------------------------------------------------ records


def test_masks_are_added_found_and_loaded(folder):
    assert [record.name for record in shipped_masks(folder)] == ["tiny-70-a", "tiny-70-b"]
    assert load("tiny-70-a", folder) == some_mask()
    record = find("tiny-70-a", folder)
    assert record.kept_k == (3 * 16 + 16) / (6 * 64) and record.ratio == 1 - record.kept_k
    assert record.kept_v == pytest.approx(4 / 6) and record.empty_heads == pytest.approx(2 / 6)
    assert record.kv_bytes == (record.kept_k + record.kept_v) / 2
    assert (record.seed, record.seconds, record.results) == (3, 48.25, results())
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "tiny-70-a.safetensors",
        "tiny-70-b.safetensors",
    ]


def test_a_mask_of_the_same_name_is_replaced(folder):
    other = add("tiny-70-a", some_mask(48), folder, **MADE | {"seed": 4}, results={})
    assert find("tiny-70-a", folder) == other and other.seed == 4
    assert load("tiny-70-a", folder) == some_mask(48)
    assert len(shipped_masks(folder)) == 2


def test_an_unknown_name_lists_those_near_it(folder):
    with pytest.raises(ShippedMaskError, match="one of 2 .* got 'tiny-07-a'; near it: tiny-70-a"):
        load("tiny-07-a", folder)
    with pytest.raises(ShippedMaskError, match="near it: tiny-70-a, tiny-70-b"):
        load("zzz", folder)


def test_without_masks_the_error_says_so(tmp_path):
    (tmp_path / "index.json").write_text('{"format_version": 1, "masks": []}')
    with pytest.raises(ShippedMaskError, match="got 'x'; there are none"):
        load("x", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ratio": 0.5}, "expected ratio 0.5 as in the index, got 0.8"),
        ({"empty_heads": 0.0}, "expected empty_heads 0.0 as in the index, got 0.3"),
        ({"sink": 4}, "expected sink 4 as in the index, got 64"),
        ({"model": "other"}, "expected model 'other' as in the index, got 'SmolLM2"),
    ],
)
def test_a_file_that_is_not_what_the_index_says(folder, change, message):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["masks"][0] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(ShippedMaskError, match=message):
        load("tiny-70-a", folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format_version": 2, "masks": []}', '{"format_version": 1, "masks": [{}]}']
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ShippedMaskError, match="index.json: expected an index of masks, .* got: "):
        shipped_masks(tmp_path)


@pytest.mark.parametrize("name", ["", "A-70", "../x", "a b", ".hidden", "a/b"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name: expected lower-case letters"):
        add(name, some_mask(), tmp_path, **MADE, results={})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_the_folder_as_it_was(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for mask, results in ((some_mask(sink=None), {}), (some_mask(), {"kl": float("nan")})):
        with pytest.raises(ValueError):
            add("tiny-70-a", mask, folder, **MADE, results=results)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_it_needs_only_numpy():
    code = """if True:
        import sys
        from leank.shipped import shipped_masks
        shipped_masks()
        print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------ `leank masks`


def leank_masks(*words, columns=80):
    testing, cli = pytest.importorskip("typer.testing"), pytest.importorskip("leank.cli")
    env = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    return testing.CliRunner().invoke(cli.app, ["masks", *map(str, words)], env=env)


def test_the_list(folder):
    longest = "smollm2-135m-instruct-70-32x224-a16"
    add(longest, some_mask(), folder, **MADE, results=results())
    result = leank_masks("--folder", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["tiny-70-a"] == ["64+512", "16", "16.7%", "41.7%", "+2.00"]
    assert rows["tiny-70-b"] == ["64+512", "16", "29.2%", "47.9%", "-"]
    assert longest in rows


@pytest.mark.parametrize("columns", [80, 200])
def test_all_of_one(folder, columns):
    result = leank_masks("tiny-70-a", "--folder", folder, columns=columns)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= columns
    words = " ".join(result.stdout.split())
    for said in (
        "SmolLM2-135M-Instruct",
        "the first 64 and the last 512 tokens",
        "16.67% (83.33% dropped), in multiples of 16 channels",
        "66.67%; 33.33% of the heads are empty",
        "in 48.2 s on NVIDIA H200, seed 3, commit 0123abc",
        "leank learn smollm2 --ratio 0.7",
        "│ single │ 2,000 │ 90.0% │ 88.0% │ +2.00 │ +2.40 │ 0.0100 │",
        "│ continuation │ 2,000 │ - │ - │ - │ - │ 0.0100 │",
        "│ mean of 1 │ 2,000 │ 90.0% │ 88.0% │ +2.00 │ +2.40 │ │",
    ):
        assert said in words, said


def test_json(folder):
    listed = json.loads(leank_masks("--folder", folder, "--json").stdout)
    assert listed == [record.as_json() for record in shipped_masks(folder)]
    one = json.loads(leank_masks("tiny-70-b", "--folder", folder, "--json").stdout)
    assert one == find("tiny-70-b", folder).as_json()


def test_an_empty_list_is_one_line(tmp_path):
    (tmp_path / "index.json").write_text('{"format_version": 1, "masks": []}')
    result = leank_masks("--folder", tmp_path)
    assert result.stdout == "No masks are shipped with this version.\n"
    assert json.loads(leank_masks("--folder", tmp_path, "--json").stdout) == []


def test_errors_end_with_2(folder, tmp_path):
    result = leank_masks("tiny-70-c", "--folder", folder)
    assert result.exit_code == 2 and "near it: tiny-70-" in result.stderr
    result = leank_masks("--folder", tmp_path / "none")
    where = tmp_path / "none" / "index.json"
    said = f"leank masks: {where}: No such file or directory\n"
    assert (result.exit_code, result.stderr) == (2, said)


def test_the_command_lists_the_packages_own():
    result = leank_masks("--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [record.as_json() for record in shipped_masks()]
