"""Studies: the same table in any order and after interruptions, and only what it supports."""

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import yaml
from distributed import Client, LocalCluster
from pandas.testing import assert_frame_equal

from qvision_lab.ablation import Study, averages, differences, summarise
from qvision_lab.ablation.analysis import holm
from qvision_lab.ablation.study import STUDIES
from qvision_lab.cli import main
from qvision_lab.data.atomic import locked
from qvision_lab.training.trainer import StageTrainer

SIZES = {
    "model.num_query_tokens": 2,
    "model.num_qformer_blocks": 1,
    "model.num_attention_heads": 2,
    "model.text_config": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "max_position_embeddings": 128,
        "attention_types": [[["global"], 1]],
    },
}
BUDGET = {
    "data.train.n": 6,
    "data.validation.n": 2,
    "training.phases.0.steps": 3,
    "training.batch_size": 4,
    "training.evaluations": 3,
    "training.precision": "float32",
}
TINY = Study(
    name="tiny",
    variants={"prefix": {"model.bridge": "prefix"}, "chance": {"control": True}},
    seeds=[0, 1],
    base=SIZES | BUDGET,
    scored=4,
    pointed=2,
)
TIMES = ["seconds", "latency"]


def changed(**fields) -> Study:
    """`TINY` with other fields."""
    return Study.parse(TINY.model_dump() | fields)


class AtOnce(Executor):
    """Runs come in the order in which they were submitted, one by one, in this process."""

    def submit(self, call, /, *args) -> Future:
        future = Future()
        future.set_result(call(*args))
        return future


class Shuffled(Executor):
    """Runs come in random order, once there are `n` of them."""

    def __init__(self, n: int):
        self.n, self.waiting = n, []

    def submit(self, call, /, *args) -> Future:
        self.waiting.append((Future(), call, args))
        if len(self.waiting) == self.n:
            for future, call, args in random.Random(1).sample(self.waiting, self.n):
                future.set_result(call(*args))
        return self.waiting[-1][0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all runs of `TINY`, and its table."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, TINY.run(folder, AtOnce(), processes=1)


def run_until(step: int, folder: Path, monkeypatch) -> None:
    """Carry out `TINY` until a step, counted over all runs, at which the process dies."""
    training_step, done = StageTrainer.training_step, []

    def dying(trainer, *args, **kwargs):
        done.append(trainer)
        if len(done) > step:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "training_step", dying)
        TINY.run(folder, AtOnce(), processes=1)


# --- the runner ----------------------------------------------------------------------------------


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


def test_another_order_gives_the_same_table_and_a_study_can_be_extended(finished, tmp_path):
    _, table = finished
    part = changed(variants={"prefix": {"model.bridge": "prefix"}}, seeds=[1])
    part.run(tmp_path, Shuffled(2), processes=1)
    rows = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/row.json")}
    again = TINY.run(tmp_path, Shuffled(4), processes=1)
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert len(list(tmp_path.glob("runs/*/row.json"))) == 6


def test_five_interruptions_change_nothing(finished, tmp_path, monkeypatch):
    _, table = finished
    rows = {}
    for step in random.Random(2).choices(range(1, 5), k=5):
        with pytest.raises(KeyboardInterrupt):
            run_until(step, tmp_path, monkeypatch)
        assert all(path.stat().st_mtime_ns == when for path, when in rows.items())
        rows = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/row.json")}
    again = TINY.run(tmp_path, AtOnce(), processes=1)
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))
    assert all(path.stat().st_mtime_ns == when for path, when in rows.items())
    assert again["seconds"].isna().any()  # of a run that was interrupted


def test_a_diverged_run_is_kept_as_failed_and_the_study_goes_on(tmp_path):
    wild = {"training.learning_rate": 1e30, "training.matrix_learning_rate": 1e30}
    study = changed(variants={"wild": wild}, seeds=[0])
    table = study.run(tmp_path, AtOnce(), processes=1).set_index("variant")
    assert "diverged" in table.loc["wild", "failed"]
    assert np.isnan(table.loc["wild", "CIDEr"])
    assert table.loc["base", "CIDEr"] >= 0
    sentences = summarise(table.reset_index())
    assert "wild: nothing can be said with 0 pairs of runs." in sentences
    assert sentences[-1].startswith("wild: 1 runs failed (diverged")


def test_arms_without_a_qformer_have_maps_where_they_read_patches(tmp_path):
    study = changed(
        variants={
            "image tokens": {"model.bridge_reads": "image_tokens"},
            "mean": {"model.bridge_reads": "mean_image_token"},
        },
        seeds=[0],
    )
    table = study.run(tmp_path, AtOnce(), processes=1).set_index("variant")
    assert 0 <= table.loc["image tokens", "pointing"] <= 1
    assert np.isnan(table.loc["mean", "pointing"])


def test_the_command_runs_a_study_in_spawned_processes(finished, tmp_path, capsys):
    _, table = finished
    path = tmp_path / "study.yaml"
    study = changed(variants={"prefix": {"model.bridge": "prefix"}}, seeds=[0])
    path.write_text(yaml.safe_dump(study.model_dump(mode="json")))
    arguments = ["ablate", str(path), "--output", str(tmp_path / "out"), "--processes", "1"]
    assert main(arguments) == 0
    sentence = "prefix: nothing can be said with 1 pairs of runs."
    assert sentence in capsys.readouterr().out
    drawn = tmp_path / "figures"
    assert main(["findings", str(tmp_path / "out"), "--figures", str(drawn)]) == 0
    assert sentence in capsys.readouterr().out
    assert len(list(drawn.glob("study_*.png"))) == 3
    spawned = pd.read_csv(tmp_path / "out/table.csv")
    here = table[(table["seed"] == 0) & (table["variant"] != "chance")].reset_index(drop=True)
    assert_frame_equal(
        spawned.drop(columns=["failed", *TIMES]), here.drop(columns=["failed", *TIMES])
    )


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
    again = TINY.run(tmp_path, AtOnce(), processes=1)
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))


@contextmanager
def dask_workers(n: int) -> Iterator[Executor]:
    """A real scheduler and workers, which have imported what they need."""
    with patch.dict(os.environ):  # dask leaves OMP_NUM_THREADS=1 there for all that come later
        cluster = LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None)
        with cluster, Client(cluster) as client:
            client.run(import_module, "qvision_lab.ablation.arm")
            yield client.get_executor()


def test_an_interrupted_study_ends_its_workers_and_reports_what_is_kept(tmp_path):
    path = tmp_path / "study.yaml"
    study = changed(base={**TINY.base, "training.phases.0.steps": 100_000})
    path.write_text(yaml.safe_dump(study.model_dump(mode="json")))
    command = [sys.executable, "-m", "qvision_lab.cli", "ablate", str(path), "--processes", "1"]
    command += ["--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
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
    with dask_workers(2) as workers:
        again = TINY.run(tmp_path, workers, processes=1)
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))


@pytest.mark.slow
def test_more_dask_workers_change_no_number_and_are_sooner_done(tmp_path):
    base = {"data.train.n": 300, "data.validation.n": 20, "training.phases.0.steps": 40}
    base |= {"training.batch_size": 24, "training.evaluations": 1}
    control = {"chance": {"control": True}}
    study = changed(variants=control, seeds=[0, 1, 2, 3], base=base, scored=50, pointed=5)
    tables, seconds = [], []
    for n in (1, 2):
        with dask_workers(n) as workers:
            start = perf_counter()
            tables.append(study.run(tmp_path / str(n), workers, processes=1).drop(columns=TIMES))
            seconds.append(perf_counter() - start)
    assert_frame_equal(*tables)
    print(f"8 runs: {seconds[0]:.0f} s by one worker, {seconds[1] / seconds[0]:.2f} of it by two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": {"model.num_query_token": 4}}, "x: there is no setting .*'num_query_tokens'"),
        ({"x": {"model.num_query_tokens": 2}}, "x is the same configuration as base"),
        (
            {"x": {"model.dropout": 0.1}, "y": {"model.dropout": 1e-1}},
            "y is the same configuration as x",
        ),
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
        changed(base={**TINY.base, "model.dropout": 0.2}).run(folder, AtOnce())


def test_a_full_disk_keeps_finished_runs(finished, tmp_path, monkeypatch):
    """The kernel refuses to let a file grow, as it does on a full disk."""
    _, table = finished
    limit, save = resource.getrlimit(resource.RLIMIT_FSIZE), StageTrainer._save_checkpoint
    saved = []

    def cramped(trainer, *args):
        saved.append(trainer)
        if len(saved) > 3:  # which are those of the first run
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            return save(trainer, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "_save_checkpoint", cramped)
        with pytest.raises(OSError, match=r"step 1 could not be saved in .*make room"):
            TINY.run(tmp_path, AtOnce(), processes=1)
    (row,) = tmp_path.glob("runs/*/row.json")
    kept = row.stat().st_mtime_ns
    again = TINY.run(tmp_path, AtOnce(), processes=1)
    assert row.stat().st_mtime_ns == kept
    assert_frame_equal(again.drop(columns=TIMES), table.drop(columns=TIMES))


def test_scenes_that_do_not_fit_on_the_disk_leave_no_half_file(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"requested|too large|No space|File"):
            TINY.run(tmp_path, AtOnce(), processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
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


# --- what its table supports ---------------------------------------------------------------------


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
    covered = np.mean([(rows["low"] * rows["high"] <= 0).mean() for rows in studies])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_differences_are_paired_by_seed():
    table = pd.DataFrame(
        {
            "variant": ["base"] * 3 + ["better"] * 3,
            "seed": [0, 1, 2, 2, 1, 0],
            "failed": None,
            "CIDEr": [1.0, 2.0, 3.0, 3.3, 2.2, 1.1],
        }
    )
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


def test_sentences_claim_what_intervals_support():
    table = simulated({"worse": -50.0, "same": 0.0}, 5, np.random.default_rng(3))
    sentences = summarise(table)
    rows = differences(table)
    lowered = -rows.loc["worse", "difference"]
    assert sentences[1].startswith(f"worse: lowers CIDEr by {lowered:.3g}, [")
    bound = rows.loc["same", ["low", "high"]].abs().max()
    assert sentences[2].startswith(f"same: no difference larger than {bound:.3g}, [")
    with pytest.raises(ValueError, match="its metrics are CIDEr"):
        differences(table, "BLEU")
