"""Every suite runs and saves what it measured, and pages are drawn from that alone."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import save_captioner, tiny_captioner
from test_peers import small

from qvision_lab.benchmark import costs, harness, loading, maps, peers, recovery, tables
from qvision_lab.benchmark.harness import Spread, Table, growing_table, interleave, machine
from qvision_lab.benchmark.training import IMAGES, random_batch
from qvision_lab.captioning import load
from qvision_lab.cli import main
from qvision_lab.model.captioner import IGNORED_LABEL
from qvision_lab.model.loading.checkpoint import load_checkpoint
from qvision_lab.training.trainer import has_bfloat16

SUITES = ("parameters", "latency", "peers", "loading", "folder", "training")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a quick run of all suites writes, on a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("bench")
    tiny = save_captioner(tiny_captioner(), folder / "tiny")
    words = ["--quick", "--model", str(tiny), "--output", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(peers, "PEERS", (small(peers.PEERS[0]),))
        patch.delenv("OPENAI_API_KEY", raising=False)
        assert main(["bench", *SUITES, *words]) == 0
    return folder / "results"


def rows(results, suite):
    result = json.loads((results / f"{suite}.json").read_text())
    assert result["quick"]
    assert result["machine"]["cores"]
    assert "torch" in result["versions"]
    return result["rows"]


def test_loading_reads_what_it_needs(results):
    card, *others = rows(results, "loading")
    assert [(row["way"], row["dtype"]) for row in others] == list(loading.METHODS[1:])
    for row in others:
        assert row["gigabytes_needed"] == card["gigabytes_needed"] / (1 + ("b" in row["dtype"]))
        (load,) = row["loads"]
        assert load["captioning_gigabytes"] >= load["peak_gigabytes"] >= load["resident_gigabytes"]


def test_captions_are_timed_by_every_method(tiny, results):
    result = json.loads((results / "latency.json").read_text())
    found = [row for row in result["rows"] if row["dtype"] == "fp32"]
    modes = [("original", 1), ("generate", 1), ("default", 1), ("default", 16), ("compiled", 1)]
    assert [(row["mode"], row["batch"]) for row in found] == modes
    assert all(row["same_tokens"] == 1.0 for row in found)
    original, _, default, sixteen, compiled = found
    assert original["ratio"]["median"] == 1
    ratios = [16 * a / b for a, b in zip(original["seconds"], sixteen["seconds"], strict=True)]
    assert sixteen["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    assert compiled["compile_seconds"] > 0
    weights = sum(p.numel() for p in tiny.decoder.parameters()) - 64 * 32  # without positions
    limit = 20 * 4 * weights / 1e9 / result["settings"]["read_gigabytes_per_second"]
    time = default["seconds_per_image"]["median"]
    assert default["times_the_limit"] == pytest.approx(time / limit)


def test_both_methods_load_the_same_weights(tiny, tmp_path):
    loading.write_published(tmp_path, tiny)
    theirs, ours = loading.load_the_cards_way(tmp_path), load_checkpoint(tmp_path).model
    for name, weights in tiny.state_dict().items():
        assert weights.equal(theirs.state_dict()[name]), name
        assert weights.equal(ours.state_dict()[name]), name


def test_folders_and_pixel_values_are_compared(results):
    (row,) = rows(results, "folder")
    assert row["pictures"] == 64
    assert row["late_gigabytes"] > 0.1
    shares = [m / f for m, f in zip(row["model_seconds"], row["seconds"], strict=True)]
    assert row["share_of_model_rate"]["median"] == pytest.approx(sum(shares) / 2)
    found = rows(results, "preprocessing")
    assert [row["size"] for row in found[::3]] == ["224 x 224", "640 x 480"]
    pillow, _, ours = found[3:]
    assert ours["method"] == "QVisionProcessor"
    assert ours["equal_values"] == pillow["equal_values"] == 1
    shares = [o / p for o, p in zip(ours["seconds"], pillow["seconds"], strict=True)]
    assert ours["share_of_time"]["median"] == pytest.approx(sum(shares) / 2)


def test_each_training_method_has_its_own_batches(tiny):
    torch.manual_seed(0)
    original, ours = (random_batch(way, tiny.config) for way in ("original", "ours"))
    assert original["input_ids"].shape == (IMAGES[0], 20)
    assert original["pixel_values"].shape == (IMAGES[0], 3, 32, 32)
    words = original["input_ids"] != tiny.config.pad_token_id
    assert torch.equal(words, original["labels"] != IGNORED_LABEL)
    assert ours["vision_states"].shape == (IMAGES[0], 4, 16)
    rows, longest = ours["input_ids"].shape
    assert rows == 5 * IMAGES[0]
    assert (ours["labels"][:, longest - 1] != IGNORED_LABEL).any()
    assert random_batch("ours", tiny.config, 3, packed=True)["input_ids"].shape[1] % 8 == 0


def test_training_rates_count_captions_and_images(results):
    found = {(row["precision"], row["way"]): row for row in rows(results, "training")}
    precisions = ("float32", "bfloat16") if has_bfloat16() else ("float32",)
    assert [*found] == [*product(precisions, ("original", "ours"))]
    assert found["float32", "original"]["fill_seconds"] is None
    drawn = tables.read_table("training", results).set_index("method")
    for (precision, way), row in found.items():
        per_image = {"original": 1, "ours": 5}[way]
        assert row["images_per_second"] == pytest.approx(8 * 2 / sum(row["seconds"]))
        assert row["captions_per_second"] == pytest.approx(per_image * row["images_per_second"])
        step, original = np.median(row["seconds"]), found[precision, "original"]["seconds"]
        ratio = np.median(original) / step
        cells = drawn.loc[f"{way}, {precision}"]
        assert cells["times the original's images"] == f"{ratio:.2f}"
        assert cells["times the original's captions"] == f"{per_image * ratio:.2f}"
        if way == "ours":
            filled = np.median(original) / (step + np.median(row["fill_seconds"]))
            assert cells["the same in the epoch that fills the cache"] == f"{filled:.2f}"


def test_both_methods_learn_for_as_many_minutes(results):
    found = rows(results, "learning")
    assert [row["way"] for row in found] == ["original", "ours"] * 2
    for earlier, later in zip(found[:2], found[2:], strict=True):
        assert later["images"] > earlier["images"] or later["minutes"] == earlier["minutes"]
        assert later["minutes"] >= 0.1
        assert later["captions"] == {"original": 1, "ours": 5}[later["way"]] * later["images"]
    drawn = tables.read_table("learning", results)
    assert drawn["CIDEr"].str.contains(r"\[.*\]").all()


def test_too_few_rounds_give_no_ratio(results, tmp_path):
    for name, quick in product(("peers", "loading"), (True, False)):
        result = json.loads((results / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(result | {"quick": quick}))
        title = {"peers": "times QVision's", "loading": "times as fast as the card's"}[name]
        first = tables.read_table(name, tmp_path).iloc[0]
        assert bool(first[title]) == quick
        assert first["device"].endswith(" rounds: no ratio)") != quick


def test_tables_record_machines_and_identity(results, devices, tmp_path):
    footer = tables.read_footer("latency", devices)
    assert footer.startswith("Rows of several machines")
    assert "Some CPU" in footer
    assert "NVIDIA A" in footer
    assert f"torch {torch.__version__.split('+')[0]}" in footer
    (tmp_path / "old").mkdir()
    recorded = json.loads((results / "folder.json").read_text())
    assert recorded["model"] in tables.read_footer("folder", results)
    for name in ("model", "commit", "data"):
        del recorded[name]
    (tmp_path / "old/folder.json").write_text(json.dumps(recorded))
    footer = tables.read_footer("folder", tmp_path / "old")
    assert "commit not recorded, model not recorded" in footer
    assert "several" not in footer


@pytest.fixture
def devices(results, tmp_path):
    """The same results on the CPU and on two GPUs, one of them with another method."""
    for slug, gpu in (("nvidia_b", "NVIDIA B"), ("cpu", None), ("nvidia_a", "NVIDIA A")):
        for path in results.glob("*.json"):
            result = json.loads(path.read_text())
            result["machine"] |= {"gpu": gpu, "processor": "Some CPU", "threads": 2}
            if gpu == "NVIDIA A" and result["name"] == "latency":
                result["rows"][1]["mode"] = "its own"
            if gpu == "NVIDIA A" and result["name"] == "peers":
                times = {"": 8.0, "fastest_": 4.0, "qvision_": 1.0, "qvision_compiled_": 1.0}
                result["rows"][0] |= {f"{name}seconds": [time] for name, time in times.items()}
            (tmp_path / slug).mkdir(exist_ok=True)
            (tmp_path / slug / path.name).write_text(json.dumps(result))
    return tmp_path


def test_every_device_has_its_own_rows(devices):
    on = ["CPU, Some CPU, 2 threads", "NVIDIA A", "NVIDIA B"]
    latency = tables.read_table("latency", devices)
    assert [*dict.fromkeys(latency.device)] == on
    assert latency[latency.method == "its own"].device.to_list() == ["NVIDIA A"]
    found = tables.read_table("peers", devices).set_index(["device", "system", "method"])
    assert found.loc[("NVIDIA A", "GIT base", "compiled"), "times QVision's, compiled"] == "4.00"
    assert ("NVIDIA B", "GIT base", "compiled") not in found.index
    names = [text.get_text() for text in tables.draw_ratios(devices).get_legend().texts]
    assert names == on


def test_claims_record_what_they_were_measured_on(devices):
    claims = tables.read_table("claims", devices)
    assert claims[claims.measured != tables.NOT_MEASURED].on.all()
    timed = claims[claims.line == "QVision, time"]
    assert timed.claimed.str.contains("names no hardware").all()
    assert {"CPU, Some CPU, 2 threads", "NVIDIA A", "NVIDIA B"} == set(timed.on)
    assert timed.measured.str.endswith("int8").any()
    (ours,) = claims[claims.line == "QVision, all"].measured  # counted once
    assert ours.startswith("574,061,314")
    cpu, default, compiled, _ = claims[claims.line == "GIT base"].measured
    assert default.endswith("default, fp32; times QVision's: 8.00")
    assert compiled.endswith("compiled, fp32; times QVision's: 4.00")
    assert "compiled" not in cpu


def test_a_recovery_is_scored_and_drawn(tmp_path):
    *_, grown = recovery.run_benchmarks(load(), quick=True)
    grown.save(tmp_path)
    whole, tuned = tables.read_table("recovery", tmp_path).to_dict("records")
    assert (whole["retrained on"], tuned["retrained on"]) == ("(not)", "48 images")
    assert whole["of the checkpoint's"] == "100.0%"
    curve, line, star = tables.draw_recovery(tmp_path).lines
    assert curve.get_xdata().tolist() == [1]
    for drawn, row in zip((line, star), grown.rows, strict=True):
        assert drawn.get_ydata()[0] == pytest.approx(100 * row["score"])


def test_costs_of_steps_are_in_those_of_the_base(tmp_path):
    threads = torch.get_num_threads()
    (measured,) = costs.run_benchmarks(load(), quick=True)
    assert torch.get_num_threads() == threads
    measured.save(tmp_path)
    table = tables.read_table("costs", tmp_path)
    arms = ["base", "without Q-Former", "prefix instead of bridge", "1 block"]
    assert table["arm"].tolist() == arms
    assert measured.machine["threads"] == 1
    assert all(len(row["seconds"]) == 2 for row in measured.rows)
    base, *others = measured.rows
    assert all(row["cost"] != base["cost"] for row in others)


def test_maps_are_scored_and_drawn(tmp_path):
    (scored,) = maps.run_benchmarks(load(), quick=True)
    scored.save(tmp_path)
    assert {row["measure"] for row in scored.rows} >= {"pointing", "deletion", "insertion"}
    table = tables.read_table("maps", tmp_path).set_index("map")
    drawn, chosen = table["points into the box, on test"], scored.settings["chosen"]
    differences = table["minus the chosen map's, same words"]
    assert (differences == "").to_dict() == {n: n == chosen.replace("_", " ") for n in drawn.index}
    assert table["points, on val (the choice)"].str.contains("of").all()
    assert scored.identity["data"].keys() == {"val", "test"}
    assert {"composition", "integrated gradients", "centre", "chance"} <= set(drawn.index)
    key = ("chance", "large", "test")
    chance = next(r for r in scored.rows if (r["method"], r["size"], r["split"]) == key)
    assert drawn["chance"].startswith(f"{100 * chance['value']:.1f} [")


def test_a_captioner_compared_with_itself_differs_nowhere():
    captioner = load()
    captioner.provenance = replace(captioner.provenance, source="runs/other/checkpoint")
    (compared,) = maps.run_benchmarks(captioner, quick=True)
    assert compared.name == "maps other"
    rows = {(row["method"], row["size"]): row for row in compared.rows}
    assert {row["measure"] for row in compared.rows} == {"pointing"}
    for method in maps.CANDIDATES:
        ours, theirs = (rows[name, "large"] for name in (method, f"{method}, embedded"))
        assert ours["value"] == theirs["value"]
        assert (ours["difference"], theirs["difference"]) == (0, None)
        assert isinstance(ours["words"], int)


def test_a_page_is_drawn_from_results(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {n}\n<!-- table {n} --><!-- end -->\n" for n in tables.NAMES))
    tables.fill(page, tmp_path / "nothing")
    lines = 13 + 5  # of the claims, and of the headlines; the other tables are one line
    others = [*tables.COLUMNS, "maps", "boxes", "baselines"]
    assert page.read_text().count("not measured") == lines + len(others)
    tables.fill(page, results)
    tables.fill(page, results)  # replaces what was drawn
    drawn = page.read_text()
    assert "574,061,314, 306,561,025 trained (53.40%)" in drawn
    assert "not measured (no endpoint" in drawn
    for block in re.findall(r"<!-- table \w+ -->\n\n(.+?)\n\n<!-- end -->", drawn, re.DOTALL):
        table = block.partition("\n\n")[0]  # before the machines
        assert len({line.count("|") for line in table.splitlines()}) == 1
    page.write_text("<!-- table nonsense --><!-- end -->")
    with pytest.raises(ValueError, match="no table 'nonsense'; choose among parameters"):
        tables.fill(page, results)
    assert tables.draw_ratios(results).get_xscale() == "log"
    with pytest.raises(ValueError, match=r"no latency\.json"):
        tables.draw_ratios(tmp_path / "nothing")


@pytest.mark.parametrize("name", [name for name in tables.COLUMNS if name != "preprocessing"])
def test_the_packages_results_fill_every_column(name):
    table = tables.read_table(name)
    empty = table.columns[~table.astype(bool).any()]
    unmeasured = {"seconds to compile", "the same in the epoch that fills the cache"}
    assert set(empty) <= unmeasured  # of a training step: by a run before they were measured


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
