"""Timing is interleaved, and a result holds everything that a ratio depends on."""

import itertools
import json

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
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({"nothing": dict}, rounds=0)


def test_a_table_is_saved_in_the_folder_of_its_device(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    table = Table(name="a b", settings={"size": 1}, rows=())
    path = table.save()
    assert path == tmp_path / "cpu" / "a_b.json"
    saved = json.loads(path.read_text())
    assert saved["settings"] == {"size": 1}
    assert saved["machine"]["cores"]
    assert saved["machine"]["gpu"] is None
    assert {"python", "torch"} <= saved["versions"].keys()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    table = Table(name="a b", rows=())
    assert table.save() == tmp_path / "nvidia_h100_80gb_hbm3" / "a_b.json"
    assert "cuda" in table.versions
    assert table.save(tmp_path / "mine") == tmp_path / "mine" / "a_b.json"
    on_cpu = Table(name="a b", machine=machine(gpu=False), rows=())
    assert on_cpu.save().parent.name == "cpu"


def test_spread_is_median_and_quartiles():
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert spread == Spread(3.0, 2.0, 4.0)
    assert (
        f"{spread:.1f}, {spread:ms}, {Spread(0.0123, 0, 0):ms}" == "3.0 (2.0 to 4.0), 3,000, 12.3"
    )


def test_a_table_is_saved_row_by_row(tmp_path):
    for table in growing_table("rows", iter([Spread(1, 2, 3), Spread(4, 5, 6)]), quick=True):
        table.save(tmp_path)
        saved = json.loads((tmp_path / "rows.json").read_text())
        assert saved["rows"][-1]["median"] == table.rows[-1].median
    assert len(saved["rows"]) == 2
    assert saved["quick"]


def test_a_suite_out_of_time_keeps_what_it_measured():
    kept = []

    def measure():
        for number in itertools.count():
            try:
                kept.append(number)
            except Exception:  # as suites do
                pytest.fail("the time limit is not an error of a suite")

    with pytest.raises(harness.OutOfTime), harness.time_limit(0.2):
        measure()
    assert kept
    with harness.time_limit(None):
        pass
