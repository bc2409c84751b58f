"""Files that are written in one step."""

import pytest

from leank._files import replacing


@pytest.mark.parametrize("partial", [None, "half"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, partial):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), replacing(path, partial) as file:
        file.write(b"ne")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path, partial) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_taken(tmp_path):
    (tmp_path / "half").write_bytes(b"longer than the new one")
    with replacing(tmp_path / "file", "half") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"), replacing(tmp_path / "none" / "file"):
        pass
