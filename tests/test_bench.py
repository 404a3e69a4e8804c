"""Every suite runs and saves what it measured, and pages are drawn from that alone."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from test_captioning import tiny_captioner
from test_peers import shrink

from qvision_lab.benchmark import loading, maps, peers, recovery, tables
from qvision_lab.captioning import load
from qvision_lab.cli import main
from qvision_lab.model.loading.checkpoint import (
    Checkpoint,
    Provenance,
    load_checkpoint,
    save_checkpoint,
)

SUITES = ("parameters", "latency", "peers", "loading", "folder")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a quick run of all suites writes, on a tiny checkpoint."""
    captioner, folder = tiny_captioner(), tmp_path_factory.mktemp("bench")
    origin = Provenance("a test", "native", None, {}, "float32")
    checkpoint = Checkpoint(captioner.model, captioner.processor, origin)
    save_checkpoint(checkpoint, folder / "tiny")
    words = ["--quick", "--model", str(folder / "tiny"), "--output", str(folder / "results")]
    git = replace(peers.PEERS[0], config=copy.deepcopy(peers.PEERS[0].config))
    shrink(git.config)
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(peers, "PEERS", (git,))
        patch.delenv("OPENAI_API_KEY", raising=False)
        assert main(["bench", *SUITES, *words]) == 0
    return folder / "results"


def rows(results, suite):
    result = json.loads((results / f"{suite}.json").read_text())
    assert result["quick"]
    assert result["machine"]["cores"]
    assert "torch" in result["versions"]
    return result["rows"]


def test_latency_rows_tell_how_they_were_taken(results):
    found = rows(results, "latency")
    ways = {(row["mode"], row["dtype"], row["batch"]) for row in found}
    assert {("original", "fp32", 1), ("default", "bf16", 16), ("compiled", "int8", 1)} <= ways
    assert all(len(row["seconds"]) == 2 for row in found)
    assert all(row["same_tokens"] == 1.0 for row in found if row["dtype"] == "fp32")


def test_loading_reads_what_it_needs(results):
    card, ours, half = rows(results, "loading")
    assert card["ratio_to_card"] == 1
    assert half["gigabytes_needed"] == ours["gigabytes_needed"] / 2
    (load,) = ours["loads"]
    assert load["captioning_gigabytes"] >= load["peak_gigabytes"] >= load["resident_gigabytes"]


def test_both_ways_load_the_same_weights(tiny, tmp_path):
    loading.write_published(tmp_path, tiny)
    for model in (loading.load_the_cards_way(tmp_path), load_checkpoint(tmp_path).model):
        for name, weights in model.state_dict().items():
            assert weights.equal(tiny.state_dict()[name]), name


def test_folder_notes_memory_and_rates(results):
    (row,) = rows(results, "folder")
    assert row["pictures"] == 64
    assert row["late_gigabytes"] > 0.1
    shares = [m / f for m, f in zip(row["model_seconds"], row["seconds"], strict=True)]
    assert row["share_of_model_rate"]["median"] == pytest.approx(sum(shares) / 2)


@pytest.fixture
def devices(results, tmp_path):
    """The same results on the CPU and on two GPUs, one of which has a way of its own."""
    for slug, gpu in (("nvidia_b", "NVIDIA B"), ("cpu", None), ("nvidia_a", "NVIDIA A")):
        for path in results.glob("*.json"):
            result = json.loads(path.read_text())
            result["machine"] |= {"gpu": gpu, "processor": "Some CPU", "threads": 2}
            if gpu == "NVIDIA A" and result["name"] == "latency":
                result["rows"][1]["mode"] = "its own"
            if gpu == "NVIDIA A" and result["name"] == "peers":
                peer = result["rows"][0]
                peer["fastest_seconds"] = peer["seconds"]
                peer["fastest_seconds_per_caption"] = peer["seconds_per_caption"]
                peer |= {"fastest_ratio_to_compiled": 4.0, "ratio_to_compiled": 8.0}
            (tmp_path / slug).mkdir(exist_ok=True)
            (tmp_path / slug / path.name).write_text(json.dumps(result))
    return tmp_path


def test_every_device_has_columns_of_its_own(devices):
    on = ["CPU, Some CPU, 2 threads", "NVIDIA A", "NVIDIA B"]
    latency = tables.latency(devices)
    assert [*dict.fromkeys(latency.columns.get_level_values(0))] == ["", *on]
    by_way = latency.set_index([("", "dtype"), ("", "way"), ("", "images at once")])
    (own,) = (key for key in by_way.index if key[1] == "its own")
    assert by_way.loc[own, "NVIDIA A"]["ms an image"]
    assert not by_way.loc[own, "NVIDIA B"].any()
    assert by_way.loc[("fp32", "compiled", 1), on[0]]["images a second"]
    assert "peak GB" not in latency["NVIDIA A"]  # nobody measured it
    found = tables.peers(devices).set_index([("", "system"), ("", "way")])
    fastest = found.loc[("GIT base", "compiled")]
    assert fastest["NVIDIA A", "times QVision's, compiled"] == "4.00"
    assert not fastest["NVIDIA B", "time"]
    header, rule, titles, *_ = tables.as_markdown(latency).splitlines()
    assert header.startswith(f"|  |  |  | {on[0]} |  |")
    assert header.count("|") == rule.count("|") == titles.count("|")
    assert tables.loading(devices).device.to_list() == [name for name in on for _ in range(3)]


def test_claims_say_what_they_were_measured_on(devices):
    claims = tables.claims(devices)
    assert claims.on.all()
    timed = claims[claims.line == "QVision, time"]
    assert set(timed.claimed) == {"~50 ms, no hardware named"}
    assert {"fp32, CPU, Some CPU, 2 threads", "fp32, NVIDIA A", "int8, NVIDIA B"} <= set(timed.on)
    (ours,) = claims[claims.line == "QVision, all"].measured  # counted once
    assert ours.startswith("574,061,314")
    git = claims[claims.line == "GIT base"].measured.to_list()
    assert "8 times QVision's compiled; compiled by its library" in git[1]
    assert "by its library" not in git[0] + git[2]


def test_figures_have_a_colour_a_device(devices):
    names = [text.get_text() for text in tables.draw_ratios(devices).get_legend().texts]
    assert names == ["CPU, Some CPU, 2 threads", "NVIDIA A", "NVIDIA B"]


def test_a_recovery_is_scored_and_drawn(tmp_path):
    *_, grown = recovery.run_benchmarks(load(), quick=True)
    grown.save(tmp_path)
    whole, tuned = tables.recovery(tmp_path).to_dict("records")
    assert (whole["learned anew from"], tuned["learned anew from"]) == ("(not)", "48 pictures")
    assert whole["of the checkpoint's"] == "100.0%"
    (curve, line) = tables.draw_recovery(tmp_path).lines
    assert curve.get_xdata().tolist() == [1]
    assert line.get_ydata()[0] == pytest.approx(100 * grown.rows[0].score)


def test_maps_are_scored_and_drawn(tmp_path):
    (scored,) = maps.run_benchmarks(load(), quick=True)
    scored.save(tmp_path)
    assert {row.measure for row in scored.rows} >= {"pointing", "deletion", "insertion"}
    drawn = tables.maps(tmp_path).set_index("map")["points into the box"]
    assert {"composition", "integrated gradients", "centre", "chance"} <= set(drawn.index)
    chance = next(row for row in scored.rows if row.method == "chance" and row.size == "large")
    assert drawn["chance"].startswith(f"{100 * chance.value:.1f} [")


def test_a_page_is_drawn_from_results(results, tmp_path):
    page = tmp_path / "page.md"
    marked = "".join(f"# {name}\n<!-- table {name} --><!-- end -->\n" for name in tables.TABLES)
    page.write_text(marked)
    tables.fill(page, tmp_path / "nothing")
    assert page.read_text().count("not measured") == 7 + 8  # a claim a line
    tables.fill(page, results)
    tables.fill(page, results)  # what was drawn is replaced
    drawn = page.read_text()
    assert "574,061,314, 306,561,025 trained (53.40%)" in drawn
    assert "not measured (no endpoint" in drawn
    for block in re.findall(r"<!-- table \w+ -->\n\n(.+?)\n\n<!-- end -->", drawn, re.DOTALL):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    page.write_text("<!-- table nonsense --><!-- end -->")
    with pytest.raises(ValueError, match="no table 'nonsense'; there are latency"):
        tables.fill(page, results)
    assert tables.draw_ratios(results).get_xscale() == "log"
    with pytest.raises(ValueError, match=r"no latency\.json"):
        tables.draw_ratios(tmp_path / "nothing")
