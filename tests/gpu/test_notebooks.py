"""Notebooks as they stand, but for `DEVICE = "cuda"` in their parameter cell."""

import json
import re
from pathlib import Path
from time import perf_counter

import matplotlib.pyplot
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("number", ["06", "02", "03", "04", "05", "01"])
def test_a_notebook_runs_on_a_gpu(number, monkeypatch):
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    source = ["".join(cell["source"]) for cell in cells]
    if any("explore(" in cell for cell in source):
        pytest.importorskip("ipywidgets")
    monkeypatch.chdir(FOLDER)
    matplotlib.use("agg")
    changed, begun = 0, perf_counter()
    names = {"__name__": "__main__", "display": print}
    for place, cell in enumerate(source):
        cell, found = re.subn(r'^DEVICE = "cpu"', 'DEVICE = "cuda"', cell, flags=re.MULTILINE)
        changed += found
        exec(compile(cell, f"{path.name}, cell {place}", "exec"), names)
        matplotlib.pyplot.close("all")
    assert changed == 1
    print(f"{path.name}: {perf_counter() - begun:.0f} s, imports apart")  # for its opening cell
