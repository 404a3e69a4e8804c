"""Every notebook runs from top to bottom, at reduced sizes, and stores only what is compared."""

import os
import subprocess
import sys

import nbformat
import pytest
from conftest import NOTEBOOKS, run_notebook

CELL_TIMEOUT = 300  # seconds
ON_SCENES = {  # ids of cells that do the same whatever MODEL is
    "02": "truth|false|try|temperature|penalty|card-[^r]|sheet",
    "03": "$",
    "04": "case|truth|removal-areas|random",
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_runs(path):
    """By nbval, in the notebook's folder: no cell raises, and marked cells print what is stored."""
    options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, "-p", "no:cacheprovider", path],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "QVISION_QUICK": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("number", ON_SCENES)
def test_runs_on_photographs(number, monkeypatch):
    pytest.importorskip("timm")
    run_notebook(number, "MODEL = None", 'MODEL = "photos"', monkeypatch, ON_SCENES[number])


@each_notebook
def test_stored_outputs_are_those_that_are_compared(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":  # nbval compares marked cells, and needs their count
            compared = "NBVAL_CHECK_OUTPUT" in cell.source
            assert bool(cell.outputs) == compared, f"store or clear the output of {cell.id}"
            assert bool(cell.execution_count) == compared, f"store or clear its count: {cell.id}"
