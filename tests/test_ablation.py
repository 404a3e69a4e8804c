"""Studies: the same table in any order and after interruptions, and only what it supports."""

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import file_limit, interrupted, random_images
from distributed import Client, LocalCluster
from pandas.testing import assert_frame_equal

from qvision_lab.ablation import Study, averages, crossover, study, summarise
from qvision_lab.ablation.analysis import differences, differences_of_scenes, part, parts
from qvision_lab.ablation.study import STUDIES
from qvision_lab.cli import main
from qvision_lab.data.atomic import locked
from qvision_lab.evaluation.bootstrap import holm
from qvision_lab.figures import draw_parts, findings_table, margin_of

TEXT = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 128}
SIZES = {"model.text_config": TEXT | {"attention_types": [[["global"], 1]]}}
SIZES |= {"model.num_query_tokens": 2, "model.num_attention_heads": 2}
SIZES |= {"model.num_qformer_blocks": 1}
BUDGET = {"data.train.n": 6, "data.validation.n": 2, "training.phases.0.steps": 3}
BUDGET |= {"training.batch_size": 4, "training.evaluations": 3, "training.precision": "float32"}
PREFIX = {"prefix": {"model.bridge": "prefix"}}
ARMS = PREFIX | {"chance": {"control": True}}
TINY = Study(name="tiny", variants=ARMS, seeds=[0, 1], base=SIZES | BUDGET, scored=4, pointed=2)
TIMES = ["seconds", "latency"]


def changed(**fields) -> Study:
    """`TINY` with other fields."""
    return Study.parse(TINY.model_dump() | fields)


class InTurn(Executor):
    """Runs come one by one, in this process; of each `n` in random order."""

    def __init__(self, n: int = 1):
        self.n, self.waiting = n, []

    def submit(self, call, /, *args) -> Future:
        future = Future()
        self.waiting.append((future, call, args))
        if len(self.waiting) == self.n:
            for each, call, args in random.Random(1).sample(self.waiting, self.n):
                each.set_result(call(*args))
            self.waiting.clear()
        return future


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all runs of `TINY`, and its table."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, TINY.run(folder, InTurn(), processes=1)


def test_a_table_has_a_row_a_run_and_gaps_where_an_arm_has_no_maps(finished):
    folder, table = finished
    assert table["variant"].tolist() == ["base"] * 2 + ["prefix"] * 2 + ["chance"] * 2
    assert table["seed"].tolist() == [0, 1] * 3
    assert table["failed"].isna().all()
    assert table.loc[table["variant"] == "prefix", "pointing"].isna().all()
    assert table.loc[table["variant"] != "prefix", "pointing"].between(0, 1).all()
    assert (table[TIMES] > 0).all().all()
    assert table["parameters"].nunique() == 2
    assert not list(folder.glob("runs/*/checkpoint-*"))
    curves = pd.read_csv(folder / "curves.csv")
    assert curves.groupby(["variant", "seed"])["loss"].count().eq(3).all()
    assert curves["eval_true"].between(0, 1).any()
    read = pd.read_csv(folder / "table.csv")
    assert_frame_equal(read, table.astype({"failed": float}))


def test_order_and_interruptions_change_nothing_and_a_study_can_be_extended(finished, tmp_path):
    def finished_rows() -> dict:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/row.json")}

    _, table = finished
    part = changed(variants=PREFIX, seeds=[1])
    part.run(tmp_path, InTurn(2), processes=1)
    rows = finished_rows()
    for i, step in enumerate((1, 2, 0, 1, 1)):  # of three in each of the other four runs
        with interrupted(step, OSError if i % 2 else KeyboardInterrupt):  # a full disk, too
            TINY.run(tmp_path, InTurn(), processes=1)
        assert rows.items() <= finished_rows().items()
        rows = finished_rows()
    again = TINY.run(tmp_path, InTurn(3), processes=1)  # what is left, in random order
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))
    assert rows.items() <= finished_rows().items()
    assert len(finished_rows()) == 6
    assert again["seconds"].isna().any()  # of a run that was interrupted


@pytest.mark.slow
def test_five_kills_change_nothing(finished, tmp_path):
    _, table = finished
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(TINY.model_dump(mode="json")))
    command = [sys.executable, "-m", "qvision_lab.cli", "ablate", str(path)]
    for seconds in random.Random(3).choices(range(8, 20), k=5):
        with subprocess.Popen([*command, "--output", str(tmp_path), "--processes", "1"]) as study:
            with suppress(subprocess.TimeoutExpired):
                study.wait(timeout=seconds)
            study.kill()  # its worker goes on with a run for a while
    again = TINY.run(tmp_path, InTurn(), processes=1)
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))


def test_steps_of_a_second_phase_follow_those_of_the_first(tmp_path):
    phases = [{"policy": "phase1", "steps": 3}, {"policy": "phase2", "steps": 5}]
    study = changed(base={**SIZES, **BUDGET, "training.phases": phases}, variants={}, seeds=[0])
    for number, steps in ((1, (1, 3)), (2, (2, 5))):
        folder = study.runs[0].folder(tmp_path) / f"phase-{number}"
        folder.mkdir(parents=True)
        pd.DataFrame({"step": steps, "loss": 1.0}).to_csv(folder / "curve.csv")
    assert study.curves(tmp_path)["step"].tolist() == [1, 3, 5, 8]


def test_a_diverged_run_is_kept_as_failed_and_arms_that_read_patches_have_maps(tmp_path):
    reads = ("image_tokens", "mean_image_token")
    arms = {name: {"model.bridge_reads": name} for name in reads}
    arms["wild"] = {f"training.{name}learning_rate": 1e30 for name in ("", "matrix_")}
    study = changed(variants=arms, seeds=[0])
    table = study.run(tmp_path, InTurn(), processes=1).set_index("variant")
    assert 0 <= table.loc["image_tokens", "pointing"] <= 1
    assert np.isnan(table.loc["mean_image_token", "pointing"])
    assert "diverged" in table.loc["wild", "failed"]
    assert np.isnan(table.loc["wild", "CIDEr"])
    assert table.loc["base", "CIDEr"] >= 0
    sentences = summarise(table.reset_index())
    assert "wild: nothing can be said with so few pairs of runs (0)." in sentences
    assert sentences[-1].startswith("wild: 1 of 1 runs failed (diverged")


def test_other_images_than_scenes_are_captioned_without_their_truth(tmp_path):
    lines = []
    for i, picture in enumerate(random_images(20, 32, 32)):
        picture.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "captions": [f"Picture {i}.", "A picture."]}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    other = changed(variants={}, seeds=[0], test={"source": str(tmp_path)})
    assert other.runs[0].key != changed(variants={}, seeds=[0]).runs[0].key
    row = other.run(tmp_path / "study", InTurn(), processes=1).iloc[0]
    assert row["CIDEr"] >= 0
    assert 1 <= row["effective_rank"] <= 3
    assert not {"true", "true_scenes", "pointing"} & set(row.index)


def test_a_second_command_is_refused_while_a_study_runs(tmp_path):
    class Nested(InTurn):
        def map(self, *arguments):
            with pytest.raises(ValueError, match="another command is writing to"):
                TINY.run(tmp_path, InTurn(), processes=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TINY.run(tmp_path, Nested(), processes=1)
    with locked(tmp_path):  # released
        assert not list(tmp_path.glob("runs/*/row.json"))


def test_the_command_runs_a_study_in_spawned_processes(finished, tmp_path, capsys):
    _, table = finished
    path, drawn, output = tmp_path / "study.yaml", tmp_path / "figures", str(tmp_path / "out")
    study = changed(variants=PREFIX, seeds=[0])
    path.write_text(yaml.safe_dump(study.model_dump(mode="json")))
    sentence = "prefix: nothing can be said with so few pairs of runs (1)."
    assert main(["ablate", str(path), "--output", output, "--processes", "1"]) == 0
    assert sentence in capsys.readouterr().out
    assert main(["findings", output, "--figures", str(drawn)]) == 0
    assert sentence in capsys.readouterr().out
    assert len(list(drawn.glob("study_*.png"))) == 3
    spawned = pd.read_csv(tmp_path / "out/table.csv").drop(columns=["failed", *TIMES])
    here = table[(table["seed"] == 0) & (table["variant"] != "chance")].reset_index(drop=True)
    assert_frame_equal(spawned, here.drop(columns=["failed", *TIMES]))


def test_an_interrupted_study_ends_its_workers_and_reports_what_is_kept(tmp_path):
    path = tmp_path / "study.yaml"
    study = changed(base={**TINY.base, "training.phases.0.steps": 100_000})
    path.write_text(yaml.safe_dump(study.model_dump(mode="json")))
    command = [sys.executable, "-m", "qvision_lab.cli", "ablate", str(path), "--processes", "1"]
    command += ["--output", str(tmp_path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    piped = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heard}
    with subprocess.Popen(command, **piped) as running, ExitStack() as stack:
        stack.callback(running.kill)  # also where the guard below ends the test
        while running.poll() is None and not list(tmp_path.glob("runs/*/phase-1")):
            os.sched_yield()
        running.send_signal(signal.SIGINT)  # to the parent alone
        output, _ = running.communicate(timeout=60)  # a guard: its run would take hours
    assert running.returncode == 130
    assert "interrupted: 0 of 6 runs are in" in output
    with locked(tmp_path):
        pass


def test_two_dask_workers_give_the_same_table(finished, tmp_path):
    _, table = finished
    study = changed(variants=PREFIX, seeds=[1])
    table = table[(table["seed"] == 1) & (table["variant"] != "chance")].reset_index(drop=True)
    with patch.dict(os.environ):  # dask leaves OMP_NUM_THREADS=1 there for all that come later
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        with cluster, Client(cluster) as client:
            again = study.run(tmp_path, client.get_executor(), processes=1)
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": {"model.num_query_token": 4}}, "x: model: there is no setting .*'num_query_tokens'"),
        ({"x": {"model.num_query_tokens": 2}}, "x is the same configuration as base"),
        ({key: {"model.dropout": 0.1} for key in "xy"}, "y is the same configuration as x"),
        ({"x": {"control": True, "seed": 1}}, "x is a control, so it changes nothing"),
        ({"x": {"model.num_attention_heads": 5}}, "(?s)x: model: .*num_attention_heads=5"),
        ({"x": {"model.bridge": "none"}}, "x: model.bridge='none'"),
        ({"x": {"training.phases.0.steps": 4}}, "x is trained on 32 captions and the base on 24"),
        ({"base": {"model.dropout": 0.1}}, "base is the same configuration as base"),
        ({"x": {"features": None}}, "x: features is null"),
    ],
)
def test_variants_that_make_no_comparison_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _ = changed(variants=changes).runs


def test_results_of_another_base_are_refused_with_the_difference(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match=r"base.model.dropout \(None, not 0.2\)"):
        changed(base={**TINY.base, "model.dropout": 0.2}).run(folder, InTurn())


def test_scenes_that_do_not_fit_on_the_disk_leave_no_half_file(tmp_path):
    with pytest.raises(OSError, match=r"requested|too large|No space|File"), file_limit(10_000):
        TINY.run(tmp_path, InTurn(), processes=1)
    assert not list(tmp_path.glob("features/*.safetensors"))


def test_studies_are_read_by_name_and_name_what_they_do_not_know(tmp_path):
    study = Study.read("architecture")
    assert len(study.variants) >= 12
    assert len(study.runs) == (1 + len(study.variants)) * 5
    assert len({run.key for run in study.runs}) == len(study.runs)
    with pytest.raises(ValueError, match=r"no study 'nonsense'.*architecture"):
        Study.read("nonsense")
    path = tmp_path / "study.yaml"
    path.write_text((STUDIES / "architecture.yaml").read_text().replace("seeds:", "seed:"))
    with pytest.raises(ValueError, match="no setting seed; did you mean 'seeds'"):
        Study.read(path)


def made_up(run, study) -> None:
    """In place of a run: CIDEr is best at twice the base's rate, and at half of the others'."""
    rate = run.recipe.training.learning_rate / 1e-3
    best = 2 if run.columns["variant"] == "base" else 0.5
    row = {"failed": None, "validation": -abs(rate - best)}
    row["steps run"] = run.recipe.training.phases[0].steps
    folder = run.folder(study)
    (folder / "phase-1").mkdir(parents=True)
    (folder / "phase-1/curve.csv").write_text("step,loss\n1,1\n")
    (folder / "row.json").write_text(json.dumps(row | ({"CIDEr": rate} if run.scored else {})))


def test_learning_rates_are_tuned_for_each_arm_and_length_on_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "carry_out", made_up)
    many = {"lengths": [3, 6], "costs": {"prefix": 0.5}, "rates": [0.5, 1, 2]}
    plan = changed(variants=PREFIX, **many)
    table = plan.run(tmp_path, InTurn(), processes=1)
    assert (table["steps"] == table["steps run"]).all()
    arms = table.groupby(["variant", "length", "equal", "tuned"])
    assert len(arms) == 12
    assert arms["seed"].agg(list).map(lambda seeds: seeds == [0, 1]).all()
    rates = arms["rate"].unique().map(list)
    tuned = rates.xs(True, level="tuned").groupby("variant").first()
    assert tuned.to_dict() == {"base": [2.0], "prefix": [0.5]}
    assert rates.xs(False, level="tuned").map(lambda rate: rate == [1.0]).all()
    assert set(table.query("equal == 'compute'")["steps"]) == {6, 12}
    runs = 6 * (3 + 2 + 2)  # three tune, two seeds each tuned and not
    assert len(list(tmp_path.glob("runs/*"))) == runs - 7  # 6 steps of prefix are in two arms
    assert [*parts(table)] == [
        *("3 steps, tuned", "compute of 3 base steps, tuned"),
        *("6 steps, tuned", "compute of 6 base steps, tuned"),
        *("3 steps", "compute of 3 base steps"),
        *("6 steps", "compute of 6 base steps"),
    ]
    unfinished = table[(table["variant"] != "base") | (table["length"] == 6)]
    longer = ["6 steps, tuned", "compute of 6 base steps, tuned"]
    assert [*parts(unfinished)] == [*longer, *(title.removesuffix(", tuned") for title in longer)]
    tuning = pd.read_csv(tmp_path / "tuning.csv")
    assert (
        tuning.groupby(["variant", "length", "equal"])["rate"].agg(list).map(tuple) == (0.5, 1, 2)
    ).all()
    assert tuning["validation"].max() == 0
    fair = part(table, 6, "compute")
    assert fair["steps"].tolist() == [6, 6, 12, 12]
    assert fair["rate"].tolist() == [2, 2, 0.5, 0.5]
    with pytest.raises(ValueError, match="no runs of 4 steps, tuned: True; lengths are 3, 6"):
        part(table, 4)
    with pytest.raises(ValueError, match="choose a length by `part`"):
        differences(table)
    with pytest.raises(ValueError, match="costs of x: they are of base, prefix"):
        _ = changed(variants=PREFIX, costs={"x": 1.0}).runs


def test_the_crossover_is_where_straight_lines_over_log_steps_meet():
    change = {100: -2.0, 1000: -1.0, 10_000: 1.0}  # meets zero in the middle of the last decade
    rows = [
        {"variant": name, "length": length, "seed": seed, "CIDEr": seed + (name != "base") * value}
        for length, value in change.items()
        for seed in range(5)
        for name in ("base", "longer")
    ]
    table = pd.DataFrame(rows)
    assert crossover(table, "longer") == pytest.approx([10**3.5] * 3)  # no noise between pairs
    assert crossover(table[table["length"] < 5000], "longer") == (np.inf,) * 3
    assert crossover(table[table["length"] > 5000], "longer") == (0, 0, 0)  # ahead throughout
    level = table[table["length"] > 500]
    level = level.assign(CIDEr=level["CIDEr"].where(level["length"] > 1000, level["seed"]))
    assert crossover(level, "longer") == pytest.approx([1000] * 3)  # exactly zero there
    with pytest.raises(ValueError, match="longer: a crossover takes two seeds"):
        crossover(table[table["seed"] == 0], "longer")


def test_a_crossover_that_three_seeds_leave_open_has_no_upper_end():
    rows = [
        {"variant": name, "length": length, "seed": seed, "CIDEr": (name != "base") * value}
        for length, values in {100: [-50, -40, -60], 1000: [10, -8, 16]}.items()
        for seed, value in enumerate(values)
        for name in ("base", "longer")
    ]
    at, low, high = crossover(pd.DataFrame(rows), "longer")
    assert 100 < low < at < 1000
    assert high == np.inf


def test_seeds_and_scenes_both_widen_the_interval_of_true_captions():
    rng = np.random.default_rng(0)

    def runs(variant, effects, scenes):
        shares = 0.5 + np.add.outer(effects, scenes)
        hits = (rng.random(shares.shape) < shares) * 1
        true = ["".join("ny"[hit] for hit in row) for row in hits]
        return [{"variant": variant, "seed": i, "true_scenes": each} for i, each in enumerate(true)]

    still, varied = np.zeros(8), rng.normal(0, 0.15, 8)
    widths = {}
    for name, effects in {"still": still, "varied": varied}.items():
        table = pd.DataFrame(runs("base", still, np.zeros(400)) + runs("x", effects, np.zeros(400)))
        row = differences_of_scenes(table).loc["x"]
        assert row["n"] == 8
        assert row["low"] < row["difference"] < row["high"]
        widths[name] = row["high"] - row["low"]
    assert widths["varied"] > 1.5 * widths["still"]


@pytest.mark.parametrize(("seeds", "scenes"), [(0.05, 0.1), (0.01, 0.4)])
def test_intervals_over_seeds_and_scenes_cover_the_truth(seeds, scenes):
    """Of a difference that varies by so much over three seeds and over a hundred scenes."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        effects = np.add.outer(rng.normal(0, seeds, 3), rng.normal(0, scenes, 100))
        shares = {"base": np.full((3, 100), 0.5), "x": 0.5 + effects}
        table = pd.DataFrame(
            {"variant": name, "seed": seed, "true_scenes": "".join("ny"[hit] for hit in row)}
            for name, rows in shares.items()
            for seed, row in enumerate((rng.random(rows.shape) < rows) * 1)
        )
        row = differences_of_scenes(table).loc["x"]
        covered.append(row["low"] <= 0 <= row["high"])
    assert 0.93 <= np.mean(covered) <= 0.985
    exact = pd.DataFrame({"variant": ["base", "base", "x", "x"], "seed": [0, 1, 0, 1]})
    exact = exact.assign(true_scenes=["nn", "nn", "yy", "yy"])
    assert differences_of_scenes(exact).loc["x"].tolist() == [2, 1, 1, 1]
    with pytest.raises(ValueError, match="its images are no scenes"):
        differences_of_scenes(exact.drop(columns="true_scenes"))


def test_equivalence_is_claimed_within_the_margin_alone():
    table = simulated({"same": 0.0, "worse": -50.0}, 8, np.random.default_rng(3))
    rows = differences(table, margin=10)
    assert rows.loc["same", "equivalent"] < 0.01
    assert rows.loc["worse", "equivalent"] > 0.99
    _, worse, same = summarise(table, margin=10)
    p = rows.loc["same", "equivalent"]
    assert same.startswith(f"same: within 10 of the base (corrected p = {p:.2g}), ")
    assert "within" not in worse
    _, worse, _ = summarise(table, margin=1000)
    assert worse.startswith("worse: lowers CIDEr by ")
    assert "; within 1e+03 of the base (corrected p = " in worse
    assert differences(table, margin=0.1).loc["same", "equivalent"] > 0.05


def simulated(arms: dict[str, float], seeds: int, rng: np.random.Generator) -> pd.DataFrame:
    """A table of CIDEr around the effect of each arm, with noise of 1 between seeds."""
    rows = [
        {"variant": name, "seed": seed, "failed": None, "CIDEr": effect + rng.normal()}
        for name, effect in {"base": 0.0, **arms}.items()
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def test_ten_controls_are_flagged_as_rarely_as_their_level_says():
    rng = np.random.default_rng(0)
    controls = {f"control {i}": 0.0 for i in range(10)}
    studies = [differences(simulated(controls, 5, rng)) for _ in range(200)]
    assert np.mean([(rows["corrected"] < 0.05).any() for rows in studies]) <= 0.06
    covered = np.mean([(rows["low"] * rows["high"] <= 0).all() for rows in studies])
    assert covered >= 0.94  # all ten together


def test_differences_are_paired_by_seed():
    table = pd.DataFrame({"variant": ["base"] * 3 + ["better"] * 3, "seed": [0, 1, 2, 2, 1, 0]})
    table = table.assign(failed=None, CIDEr=[1.0, 2.0, 3.0, 3.3, 2.2, 1.1])
    row = differences(table).loc["better"]
    assert row["n"] == 3
    assert row["difference"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert [row["low"], row["high"]] == pytest.approx([0.2 - half, 0.2 + half], rel=1e-5)
    assert row["p"] == row["corrected"] == pytest.approx(0.074180, rel=1e-4)
    assert averages(table).loc["better", "CIDEr"] == pytest.approx(2.2)
    same = table.assign(CIDEr=[1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
    assert differences(same).loc["better", ["low", "high", "p"]].tolist() == [0, 0, 1]


def test_holm_multiplies_the_smallest_by_their_number():
    p = pd.Series({"a": 0.04, "b": 0.01, "c": np.nan, "d": 0.03})
    assert holm(p).dropna().to_dict() == pytest.approx({"a": 0.06, "b": 0.03, "d": 0.06})
    assert np.isnan(holm(p)["c"])


def test_an_arm_that_failed_is_in_every_table(tmp_path):
    table = simulated({"good": 5.0, "wild": 0.0}, 3, np.random.default_rng(3))
    wild = table["variant"] == "wild"
    table = table.assign(parameters=1.0, pointing=0.5, equal="steps", length=3)
    shorter, table = table.assign(length=2), table.astype({"failed": object})
    table.loc[wild, ["failed", "CIDEr", "pointing"]] = "diverged", np.nan, np.nan
    pd.concat([shorter, table]).to_csv(tmp_path / "table.csv", index=False)
    shown = findings_table(tmp_path).set_index(["trained", "variant"])
    assert shown["failed"].to_dict() == {
        (f"{steps} steps", name): "3" if (steps, name) == (3, "wild") else "0"
        for steps, name in product((2, 3), ("good", "base", "wild"))
    }
    gaps = ["runs", "CIDEr x 100", "above the base", "maps point"]
    assert shown.loc[("3 steps", "wild"), gaps].tolist() == ["0", "", "", ""]
    assert summarise(table)[-1] == "wild: 3 of 3 runs failed (diverged)."
    drawn = draw_parts(tmp_path)
    assert [ax.get_title("left") for ax in drawn.axes] == ["2 steps", "3 steps"]
    table[table["seed"] == 0].to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(ValueError, match="no interval to draw"):
        draw_parts(tmp_path)


def test_an_arm_of_which_all_learning_rates_fail_is_run_and_reported(tmp_path, monkeypatch):
    def failing(run, study) -> None:
        made_up(run, study)
        row = {"failed": "diverged"} if run.columns["variant"] == "prefix" else run.row(study)
        (run.folder(study) / "row.json").write_text(json.dumps(row))

    monkeypatch.setattr(study, "carry_out", failing)
    plan = changed(variants=PREFIX, lengths=[3], rates=[0.5, 1, 2], margin=3)
    table = plan.run(tmp_path, InTurn(), processes=1)
    failed = table[table["failed"].notna()]
    assert failed[["variant", "tuned", "rate"]].drop_duplicates().values.tolist() == [
        ["prefix", False, 1.0],
        ["prefix", True, 0.5],
    ]
    assert margin_of(tmp_path) == 3
    assert margin_of(tmp_path, "true") is None


def test_sentences_claim_what_intervals_support():
    table = simulated({"worse": -50.0, "same": 0.0}, 5, np.random.default_rng(3))
    sentences = summarise(table)
    rows = differences(table)
    lowered = -rows.loc["worse", "difference"]
    assert sentences[1].startswith(f"worse: lowers CIDEr by {lowered:.3g}, [")
    assert sentences[1].endswith(f", corrected p = {rows.loc['worse', 'corrected']:.2g}.")
    bound = rows.loc["same", ["low", "high"]].abs().max()
    assert sentences[2].startswith(f"same: no difference shown, up to {bound:.3g} is ")
    with pytest.raises(ValueError, match="its metrics are CIDEr"):
        differences(table, "BLEU")
