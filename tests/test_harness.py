"""Timing is interleaved, and a result holds everything that a ratio depends on."""

import json
from contextlib import suppress

import pytest
import torch

from qvision_lab.benchmark import harness
from qvision_lab.benchmark.harness import Spread, Table, growing_table, interleave, machine


def test_interleaves_after_a_warm_up():
    calls = []
    candidates = {"a": lambda: calls.append("A"), "b": lambda: calls.append("B")}
    seconds = interleave(candidates, rounds=3)
    assert "".join(calls) == "AB" * 4
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    assert len(interleave({"a": dict}, rounds=9, quick=True)["a"]) == 2


def test_a_table_is_saved_in_the_folder_of_its_device(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    table = Table(name="a b", settings={"size": 1}, rows=())
    path = table.save()
    assert path == tmp_path / "cpu" / "a_b.json"
    saved = json.loads(path.read_text())
    assert saved["settings"] == {"size": 1}
    assert saved["machine"]["cores"]
    assert saved["machine"]["gpu"] is None
    assert {"python", "torch", "qvision-lab"} <= saved["versions"].keys()
    assert {"model", "data", "commit"} <= saved.keys()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    table = Table(name="a b", rows=())
    assert table.save() == tmp_path / "nvidia_h100_80gb_hbm3" / "a_b.json"
    assert table.save(tmp_path / "mine") == tmp_path / "mine" / "a_b.json"
    on_cpu = Table(name="a b", machine=machine(gpu=False), rows=())
    assert on_cpu.save().parent.name == "cpu"


def test_spread_is_median_and_quartiles():
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert spread == Spread(3.0, 2.0, 4.0)
    assert (f"{spread:.1f}", f"{spread:ms}") == ("3.0 (2.0 to 4.0)", "3,000")
    assert f"{Spread(0.0123, 0, 0):ms}" == "12.3"


def test_a_table_is_saved_row_by_row(tmp_path):
    rows = [{"ratio": Spread(i, 2, 3), "seconds": [1.0], "why": None} for i in range(2)]
    for i, table in enumerate(growing_table("rows", rows, quick=True)):
        saved = json.loads(table.save(tmp_path).read_text())
        assert [row["ratio"]["median"] for row in saved["rows"]] == [*range(i + 1)]
        assert saved["quick"]
    assert str(table) == "ratio 1 (2 to 3)"


def test_a_suite_out_of_time_keeps_what_it_measured():
    kept = []

    def measure():
        for number in range(10**7):
            with suppress(Exception):  # as suites do
                kept.append(number)

    with pytest.raises(harness.OutOfTime), harness.time_limit(0.2):
        measure()
    assert kept
    with harness.time_limit(None):
        pass
