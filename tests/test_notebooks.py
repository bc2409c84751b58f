"""Each notebook runs from top to bottom, and is stored without outputs."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import leank

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
CELL_SECONDS = 600  # a cell that takes longer hangs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a notebook with this copy of leank, and returns its text."""
    monkeypatch.setenv("PYTHONPATH", str(Path(leank.__file__).parents[1]))
    monkeypatch.delenv("LEANK_REFERENCE_MASKS", raising=False)
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):  # not the user's kernels
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    empty = tmp_path / "cwd"
    empty.mkdir()

    def run(name):
        notebook = nbformat.read(FOLDER / name, as_version=4)
        place = {"metadata": {"path": str(empty)}}
        NotebookClient(notebook, timeout=CELL_SECONDS, resources=place).execute()
        assert os.listdir(empty) == []
        outputs = [x for cell in notebook.cells for x in cell.get("outputs", ())]
        assert any("image/png" in x.get("data", ()) for x in outputs)
        return "".join(x["text"] for x in outputs if x.output_type == "stream")

    return run


def test_there_are_notebooks():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04"]


@pytest.mark.model
@pytest.mark.parametrize("name", NAMES)
def test_runs_with_what_is_shipped(run, name):
    said = run(name)
    assert ("LEANK_REFERENCE_MASKS is not set" in said) == name.startswith("02")


@pytest.mark.model
def test_masks_of_the_reference_are_looked_at(run, reference_mask, monkeypatch):
    folder = reference_mask("llama3.1-8b-instruct.pth").parent
    reference_mask("qwen2.5-7b-insturct.pth")
    monkeypatch.setenv("LEANK_REFERENCE_MASKS", str(folder))
    said = run("02_what_a_mask_keeps.ipynb")
    assert "Llama-3.1-8B: 68.75% of K dropped" in said
    assert "47 keep 0, 120 keep 32, 67 keep 64, 22 keep 96" in said
    assert "Qwen2.5-7B: 70.98% of K dropped" in said


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_without_outputs(name):
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert cell["metadata"] == {}
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}


@pytest.mark.parametrize("name", NAMES)
def test_ends_with_what_would_change_the_answer(name):
    *_, last = json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]
    assert last["cell_type"] == "markdown"
    assert "## What would change the answer\n" in last["source"]
