"""The harness takes turns, and writes down everything that a ratio hangs on."""

import json

import pytest

from qvision_lab.benchmark.harness import Spread, compare


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
