"""The harness takes turns, and writes down everything that a ratio hangs on."""

import json

import pytest

from qvision_lab.benchmark.harness import Spread, compare, growing_table


def test_takes_turns_after_a_warm_up(tmp_path):
    calls = []
    comparison = compare(
        lambda: calls.append("A"),
        lambda: calls.append("B"),
        name="a vs b",
        rounds=3,
        settings={"size": 1},
    )
    assert "".join(calls) == "AB" * 4
    saved = json.loads(comparison.save(tmp_path).read_text())
    assert len(saved["baseline"]) == len(saved["candidate"]) == 3
    ratios = [a / b for a, b in zip(saved["baseline"], saved["candidate"], strict=True)]
    assert saved["speedup"]["median"] == pytest.approx(sorted(ratios)[1])
    assert saved["ratio"] == saved["speedup"]["median"]
    assert saved["settings"] == {"size": 1}
    assert {"python", "torch"} <= saved["versions"].keys()
    assert saved["machine"]["cores"]
    assert [path.name for path in tmp_path.iterdir()] == ["a_vs_b.json"]


def test_quick_takes_two_rounds():
    comparison = compare(dict, dict, name="nothing", quick=True)
    assert len(comparison.baseline) == 2
    assert comparison.quick


def test_spread_is_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_no_rounds():
    with pytest.raises(ValueError, match="rounds=0"):
        compare(dict, dict, name="nothing", rounds=0)


def test_a_table_is_saved_row_by_row(tmp_path):
    for table in growing_table("rows", iter([Spread(1, 2, 3), Spread(4, 5, 6)]), quick=True):
        table.save(tmp_path)
        saved = json.loads((tmp_path / "rows.json").read_text())
        assert saved["rows"][-1]["median"] == table.rows[-1].median
    assert len(saved["rows"]) == 2
    assert saved["quick"]
