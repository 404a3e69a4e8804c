"""Notebooks as they stand, but for `DEVICE = "cuda"` in their parameter cell."""

from time import perf_counter

import pytest
from conftest import run_notebook


@pytest.mark.parametrize("number", ["06", "02", "03", "04", "05", "01"])
def test_a_notebook_runs_on_a_gpu(number, monkeypatch):
    begun = perf_counter()
    run_notebook(number, 'DEVICE = "cpu"', 'DEVICE = "cuda"', monkeypatch)
    print(f"{number}: {perf_counter() - begun:.0f} s, imports apart")  # for its opening cell
