"""What `make docs` does not see: parameters without words, numbers that are in two places."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import leank

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", leank.__all__)
def test_public_names_are_documented_with_what_they_take_and_raise(name):
    pages = (ROOT / "docs" / "api.md").read_text()
    assert re.search(rf"^\.\. auto(function|class|exception|module):: leank\.{name}$", pages, re.M)
    value = getattr(leank, name)
    text = inspect.getdoc(value)
    if inspect.ismodule(value) or issubclass(type(value), type) and issubclass(value, Exception):
        assert text
        return
    described = re.split(r"^Parameters\n-+$", text, maxsplit=1, flags=re.M)[-1]
    heads = re.findall(r"^(\S.*?) *(?: : .*)?$", described.split("\n\n")[0], re.M)
    names = {part.strip(" *") for head in heads for part in head.split(",")}
    assert set(inspect.signature(value).parameters) - names == set()
    assert "\nRaises\n------\n" in text


def test_the_readme_has_the_numbers_of_the_kernels_page():
    rows = re.findall(r"^\| (.*tokens.*) \| ([\d.]+) us, cuDNN \| ([\d.]+) us \| ([\d.]+)x \|$",
                      (ROOT / "README.md").read_text(), re.M)  # fmt: skip
    kernels = (ROOT / "kernels" / "README.md").read_text()
    lines = re.findall(r"^\| .*B (\d+), L (\w+) \| ([\d.]+) \| (.*) \|$", kernels, re.M)
    measured = {f"{b} x {length} tokens": cells.split(" | ") for b, length, _, cells in lines}
    assert len(rows) >= 4
    for what, dense, pruned, gain in rows:
        cells = measured[re.search(r"\d+ x \w+ tokens", what)[0]]
        if "Qwen" in what:
            cells = re.search(r"^\| Qwen.* L 32k \| [\d.]+ \| (.*) \|$", kernels, re.M)[1]
            cells = cells.split(" | ")
        assert [cells[0], cells[1], cells[4]] == [pruned, dense, gain], what


def test_the_picture_is_small_and_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    assert 0 < script["PICTURE"].stat().st_size < 100_000
    gains = dict(script["gains"]())
    assert len(gains) >= 8 and all(0.5 < gain < 3 for gain in gains.values())
    for _, dense, pruned in script["cache_gb"]():
        assert 1.4 < dense / pruned < 1.8
    script["draw"](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
