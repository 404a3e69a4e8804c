"""COCO's metrics equal COCO's code; intervals cover; wrong input is refused."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from scipy.stats import binomtest

import qvision_lab as ql
import qvision_lab.evaluation.java as java
from qvision_lab.cli import main
from qvision_lab.evaluation import evaluate_dataset, read_captions, read_results, write_results
from qvision_lab.evaluation.bootstrap import bootstrap_interval, paired_difference, share_interval
from qvision_lab.evaluation.metrics import METRICS, Metric, bleu_formula, ratio_formula
from qvision_lab.scenes.dataset import SceneJudge

ODD = "a dog\r\nsits\von a\u2028red\x85mat"
REFERENCES = {
    1: ["A man rides a red bicycle.", "A cyclist on a bike in the street."],
    2: ["Two dogs play with a ball.", "Dogs are playing on grass."],
    3: ["A hot dog on a plate, with mustard.", "There's a hot-dog (on a plate)"],
    4: ["The kitchen has a white refrigerator.", "A small kitchen, 1 1/2 walls."],
}
CAPTIONS = {
    1: "A man rides a red bicycle.",  # perfect
    2: "two dogs playing on the grass",
    3: "a plate with a hot dog",
    4: "A white fridge in a kitchen!",
}


def coco_eval_cap(predictions, references):
    """What COCOEvalCap does, less SPICE, which needs a download: corpus and image scores."""
    # Its own tokeniser would shift the lines at other breaks than a newline.
    clean = {i: java.LINE_BREAKS.sub(" ", text) for i, text in predictions.items()}
    tokenizer = PTBTokenizer()
    captions = tokenizer.tokenize({i: [{"caption": text}] for i, text in clean.items()})
    rows = {i: [{"caption": text} for text in references[i]] for i in predictions}
    wanted = tokenizer.tokenize(rows)
    bleu, bleus = Bleu(4).compute_score(wanted, captions, verbose=0)
    others = {"METEOR": Meteor(), "ROUGE-L": Rouge(), "CIDEr": Cider()}
    scores = {f"BLEU-{n}": score for n, score in enumerate(bleu, 1)}
    images = {f"BLEU-{n}": values for n, values in enumerate(bleus, 1)}
    for name, scorer in others.items():
        scores[name], images[name] = scorer.compute_score(wanted, captions)
    return scores, images


def test_scores_equal_cocoevalcap_on_coco(shared):
    """Of references held out: of other images, cut short, and with odd line breaks."""
    captions = ql.coco.open_dataset(shared / "coco_mini").references
    ids, held_out = list(captions), {i: texts[0] for i, texts in captions.items()}
    predictions = {i: held_out[j] for i, j in zip(ids, [*ids[1:], ids[0]], strict=True)}
    predictions |= {i: " ".join(held_out[i].split()[:5]) for i in ids[1::2]}
    predictions |= {i: held_out[i] for i in ids[::4]}
    predictions |= {ids[3]: ODD, ids[7]: "\r" + held_out[ids[7]], ids[8]: "a\u2029cat\f"}
    references = {i: texts[1:] for i, texts in captions.items()}
    scores, images = coco_eval_cap(predictions, references)
    report = ql.evaluate(predictions, references, resamples=2)
    assert report.scores == pytest.approx(scores, abs=1e-9)
    for score, values in images.items():
        np.testing.assert_allclose(report.per_image[score], values, atol=1e-9)


def test_a_report_is_printed_and_saved(tmp_path, capfd):
    odd = {5: "", 6: "...", 7: "😀", 8: "word " * 10_000}
    references = REFERENCES | {i: REFERENCES[i - 4] for i in odd}
    metrics = ("meteor", "bleu", "rouge", "cider", "spice")
    report = ql.evaluate(CAPTIONS | odd, references, metrics, resamples=50)
    out, err = capfd.readouterr()
    assert out == ""
    assert all("metric" in line for line in err.replace("\r", "\n").split("\n") if line.strip())
    bleu = [f"BLEU-{n}" for n in range(1, 5)]
    assert list(report.scores) == ["METEOR", *bleu, "ROUGE-L", "CIDEr"]
    assert report.notes["SPICE"].startswith("not available: ")
    assert report.notes["no words"].startswith("3 captions (5, 6, 7)")
    scores = report.per_image.drop(columns="caption")
    assert scores.loc[1, "METEOR"] == pytest.approx(1)  # a perfect caption
    assert scores.notna().all().all()
    assert scores.loc[5:7].max().max() < 1e-6
    assert (report.table["low"] <= report.table["score"]).all()
    assert "METEOR  " in str(report)
    assert "SPICE: not available" in str(report)
    assert "<table" in report._repr_html_()
    again = ql.EvaluationReport.load(report.save(tmp_path / "report"))
    pd.testing.assert_frame_equal(again.table, report.table)
    pd.testing.assert_frame_equal(again.per_image, report.per_image)
    assert again.notes == report.notes
    assert not list(tmp_path.rglob("*.partial"))


def test_meteor_ends_after_an_interruption(monkeypatch):
    started, popen = [], subprocess.Popen
    record = lambda *a, **k: started.append(popen(*a, **k)) or started[-1]  # noqa: E731
    monkeypatch.setattr(subprocess, "Popen", record)
    monkeypatch.setenv("PATH", "/nowhere")  # Java comes from its wheel
    interrupted = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setitem(METRICS, "bleu", replace(METRICS["bleu"], count=interrupted))
    with pytest.raises(KeyboardInterrupt):
        ql.evaluate(CAPTIONS, REFERENCES)
    started = [process for process in started if "-version" not in process.args]
    assert len(started) == 2  # the tokenizer and METEOR
    assert all(process.poll() is not None for process in started)


def test_spice_runs_with_its_jars(monkeypatch, tmp_path):
    """With a `java` that answers as SPICE does; the real jars are not ours to fetch."""
    for jar in java.SPICE_NEEDS:
        (tmp_path / jar).parent.mkdir(exist_ok=True)
        (tmp_path / jar).touch()
    fake = tmp_path / "java"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "items = json.load(open(sys.argv[sys.argv.index('-jar') + 2]))\n"
        "scores = [{'image_id': a['image_id'], 'scores': {'All': {'f': len(a['refs']) / 4}}}"
        " for a in reversed(items)]\n"
        "json.dump(scores, open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(java, "SPICE_FOLDER", tmp_path)
    monkeypatch.setattr(java, "find_java", lambda: str(fake))
    assert java.spice(["a", "b"], [["a"], ["a", "b"]]).tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("captions", "references", "metrics", "message"),
    [
        (CAPTIONS | {9: "a cat"}, {}, (), r"1 image \(9\) with a caption but not in references"),
        (CAPTIONS | {1: None}, {}, (), r"1 prediction \(1\) that are no text"),
        ({1: "a"}, {}, (), r"3 images \(2, 3, 4\) of references without a caption"),
        (CAPTIONS, {2: []}, (), r"1 image \(2\) without a list of references"),
        (CAPTIONS, {2: "A dog."}, (), r"1 image \(2\) without a list of references"),
        ({}, {}, (), "no caption to score"),
        (CAPTIONS, {}, ("cidre",), "no metric 'cidre'; did you mean cider"),
        (CAPTIONS, {}, ("scenes",), r"no metric 'scenes'.* A judge= adds its own"),
        (CAPTIONS, {}, ("chair",), "'chair' needs objects="),
    ],
)
def test_wrong_input_is_named(captions, references, metrics, message):
    with pytest.raises(ValueError, match=message):
        ql.evaluate(captions, REFERENCES | references, metrics)


def test_cider_of_one_image_is_no_number_and_chair_needs_no_other():
    metrics, objects = ("cider", "rouge", "chair"), {1: {"person"}}
    report = ql.evaluate({1: CAPTIONS[1]}, {1: ["x"]}, metrics, objects=objects, resamples=2)
    assert list(report.scores) == ["ROUGE-L", "CHAIR-i", "CHAIR-s", "CHAIR recall"]
    assert report.scores["CHAIR-i"] == 1 / 2  # the bicycle
    assert "single image" in report.notes["CIDEr"]
    with pytest.raises(ValueError, match="confidence=95"):
        _ = replace(report, confidence=95).table


def test_scenes_judge_equals_scenes_score(tmp_path):
    drawn = {i: ql.scenes.scene("val", 0, i) for i in range(12)}
    captions = {i: drawn[(i + i % 2) % 12].captions[0] for i in drawn}  # every other one is wrong
    references = {i: scene.captions for i, scene in drawn.items()}
    report = ql.evaluate(captions, references, ("scenes",), judge=SceneJudge(drawn), resamples=200)
    rates = ql.scenes.score(ql.scenes.check(captions[i], drawn[i]) for i in drawn)
    for name, rate in rates.items():
        assert report.scores[name] == pytest.approx(rate.value, nan_ok=True)
    assert 0 < report.table.loc["true", "low"] < 0.5 < report.table.loc["true", "high"] < 1
    again = ql.EvaluationReport.load(report.save(tmp_path))
    pd.testing.assert_frame_equal(again.table, report.table)
    assert list(again.metrics) == ["scenes"]
    assert (ql.compare(again, report).table.loc[["true", "outside"], "difference"] == 0).all()
    with pytest.raises(ValueError, match=r"12 images .* that the judge does not know"):
        ql.evaluate(captions, references, ("scenes",), judge=SceneJudge({}))


def test_comparisons_find_a_difference_and_only_that():
    references = {i: REFERENCES[i % 4 + 1] for i in range(60)}
    good = {i: CAPTIONS[i % 4 + 1] for i in references}
    worse = good | dict.fromkeys(range(0, 60, 3), "a thing in a place")
    backwards = dict(reversed(list(worse.items())))
    score = partial(ql.evaluate, references=references, metrics=("rouge", "bleu"))
    first, second, reordered = map(score, (good, worse, backwards))
    table = ql.compare(first, second).table
    assert (table["low"] > 0).all()
    assert (table["p"] < 0.01).all()
    pd.testing.assert_frame_equal(ql.compare(first, reordered).table, table)
    same = ql.compare(first, first).table
    assert (same[["difference", "low", "high"]] == 0).all().all()
    assert (same["p"] == 1).all()
    fewer = ql.evaluate({1: good[1]}, {1: references[1]}, ("rouge",))
    with pytest.raises(ValueError, match=r"59 images .* with a caption but not in the baseline"):
        ql.compare(first, fewer)


def mean_counts(rng, images):
    return np.stack([rng.gamma(2, 0.5, images), np.ones(images)], 1)


def bleu_like_counts(rng, images):
    """Captions of 6 to 12 words, a bit too short; longer n-grams are correct less often."""
    length = rng.integers(6, 13, images)
    closest = length + rng.integers(0, 2, images)
    guessed = length[:, None] - np.arange(4)
    ease = rng.beta(6, 4, images)[:, None]  # some images are easier
    correct = rng.binomial(guessed, ease ** np.arange(1, 5))
    return np.column_stack([length, closest, guessed, correct]).astype(float)


@pytest.mark.parametrize(
    ("counts_of", "formula"), [(mean_counts, ratio_formula), (bleu_like_counts, bleu_formula)]
)
def test_intervals_cover_the_truth(counts_of, formula):
    truth = formula(counts_of(np.random.default_rng(1), 2_000_000).sum(0))[-1]
    rng, covered = np.random.default_rng(0), 0
    for seed in range(500):
        low, high = bootstrap_interval(counts_of(rng, 300), formula, 400, seed=seed)
        covered += low[-1] <= truth <= high[-1]
    assert 0.92 <= covered / 500 <= 0.98


@pytest.mark.parametrize(("share", "images", "most"), [(0.95, 24, 1), (0.95, 24, 4), (0.8, 60, 4)])
def test_intervals_of_shares_cover_the_truth(share, images, most):
    """Also where outcomes of an image are alike (of a beta distribution)."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        cases = rng.integers(1, most + 1, images).astype(float)
        hits = rng.binomial(cases.astype(int), rng.beta(share, 1 - share, images)).astype(float)
        low, high = share_interval(hits, cases)
        covered += low <= share <= high
    assert 0.93 <= covered / 2000 <= 0.985


def test_intervals_of_shares_are_wilsons_and_have_a_width():
    for hits in (0, 1, 12, 19):
        interval = share_interval((np.arange(19) < hits).astype(float), np.ones(19))
        wilson = binomtest(hits, 19).proportion_ci(method="wilson")
        assert interval.tolist() == pytest.approx([wilson.low, wilson.high])
    same = np.array([2.0, 0.0, 2.0, 2.0])  # two words an image, both right or both wrong
    alike, single = share_interval(same, np.full(4, 2.0)), share_interval(same / 2, np.ones(4))
    assert alike.tolist() == pytest.approx(single.tolist())
    assert np.isnan(share_interval(np.zeros(3), np.zeros(3))).all()


def test_a_score_without_a_case_says_so():
    objects = {i: {"person"} for i in CAPTIONS}
    captions = dict.fromkeys(CAPTIONS, "A thing.")
    report = ql.evaluate(captions, REFERENCES, ("rouge", "chair"), objects=objects, resamples=20)
    assert "CHAIR-i                  -   no case" in str(report)
    assert "CHAIR-s                0.0   [0.0, 49.0]      of 4" in str(report)
    for text in (str(report), report._repr_html_(), str(ql.compare(report, report))):
        assert "nan" not in text.lower()
    table = ql.compare(report, report).table
    assert table.loc["CHAIR-s", "high"] == -table.loc["CHAIR-s", "low"] > 1 / 4
    assert table.loc["ROUGE-L", "corrected"] == 1


def test_intervals_of_a_comparison_hold_together():
    rng, missed, rejected = np.random.default_rng(0), 0, 0
    names = [f"score {i}" for i in range(8)]
    metrics = {n: Metric((n,), (n, f"{n} of"), None, ratio_formula) for n in names}
    columns = [column for metric in metrics.values() for column in metric.counts]
    for seed in range(150):
        counts = np.ones((2, 60, 16))
        counts[..., ::2] = rng.normal(size=(2, 60, 8))
        rest = metrics, {}, 0.95, 199, seed
        tables = (pd.DataFrame(each, columns=columns) for each in counts)
        reports = [
            ql.EvaluationReport(dict.fromkeys(range(60), ""), each, *rest) for each in tables
        ]
        table = ql.compare(*reports).table
        missed += (table["low"] * table["high"] > 0).any()
        rejected += (table["corrected"] < 0.05).any()
    assert missed / 150 <= 0.09
    assert rejected / 150 <= 0.09


def test_a_p_value_under_the_null_is_uniform():
    rng, ones = np.random.default_rng(0), np.ones(80)
    p_values = []
    for _ in range(300):
        first, second = (np.stack([rng.normal(size=80), ones], 1) for _ in range(2))
        p_values += [*paired_difference(first, second, ratio_formula, resamples=199)[2]]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_more_cases_are_no_difference_of_shares():
    one = np.ones((150, 2))
    fewer = np.where(np.arange(150)[:, None] < 130, one, 0.0)  # the others say nothing
    fewer[0, 0] = 0  # and one case is wrong
    difference, interval, p_value = paired_difference(one, fewer, ratio_formula, shares=True)
    assert difference.item() == pytest.approx(1 / 130)
    assert interval[0].item() < 0 < interval[1].item()
    assert p_value.item() > 0.3


def test_results_are_read_and_bad_ones_refused(tmp_path):
    path = write_results({1: "a\u2028cat", 2: "😀"}, tmp_path / "results.json")
    assert read_results(path) == {1: "a\u2028cat", 2: "😀"}
    path.write_text('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]')
    with pytest.raises(ValueError, match=r"several captions for 1 image \(1\)"):
        read_results(path)
    for damaged in ('[{"image_id": 1, "capt', "{}x", '[{"id": 1}]'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="no results file"):
            read_results(path)


def test_a_dataset_is_captioned_resumed_and_scored(tmp_path):
    dataset = ql.coco.open_dataset("scenes:val", n=6)
    captioner = ql.load()

    def texts(images) -> list[str]:
        return [each.text for each in captioner.caption(image.picture for image in images)]

    whole = captioner.caption_dataset(dataset, tmp_path / "whole.jsonl", batch_size=4)
    captioner.caption_dataset(dataset.images[:2], tmp_path / "half.jsonl")
    half = captioner.caption_dataset(dataset, tmp_path / "half.jsonl")
    assert (whole.captioned, half.captioned, half.skipped) == (6, 4, 2)
    captions = read_captions(whole.output, dataset)
    assert captions == read_captions(half.output, dataset)
    assert list(captions.values()) == texts(dataset)
    report = evaluate_dataset(captions, dataset, ("scenes", "chair"), resamples=10)
    assert report.table.loc["true", "of"] == 6
    other = ql.coco.open_dataset("scenes:crowd", n=6)  # the same ids, other images
    assert captioner.caption_dataset(other, half.output).captioned == 6
    assert list(read_captions(half.output, other).values()) == texts(other)
    with pytest.raises(ValueError, match=r"1 image \(6\) not captioned"):
        read_captions(whole.output, ql.coco.open_dataset("scenes:val", n=7))


def test_the_command_scores_and_compares(tmp_path, capsys):
    """Of a folder of COCO's kind, which knows its objects."""
    folder = ql.scenes.write_coco(tmp_path / "scenes", 5, split="val")
    dataset = ql.coco.open_dataset(folder)
    good = write_results({i: r[0] for i, r in dataset.references.items()}, tmp_path / "good.json")
    bad = write_results(dict.fromkeys(dataset.ids, "A white train."), tmp_path / "bad.json")
    metrics = ["--metrics", "rouge", "chair", "--resamples", "20"]
    command = ["eval", "--data", str(folder), *metrics, "--output"]
    assert main([*command, str(tmp_path / "a"), "--predictions", str(bad)]) == 0
    baseline = ["--baseline", str(tmp_path / "a")]
    assert main([*command, str(tmp_path / "b"), "--predictions", str(good), *baseline]) == 0
    scores = (tmp_path / "a/scores.json").read_bytes()
    assert main([*command, f"{tmp_path}/b/../a", "--predictions", str(good), *baseline]) == 2
    assert (tmp_path / "a/scores.json").read_bytes() == scores
    printed = capsys.readouterr().out
    assert "CHAIR-s" in printed
    assert "difference on 5 images" in printed
    assert ql.EvaluationReport.load(tmp_path / "b").scores["ROUGE-L"] > 0.9
    assert main(["eval", "--data", str(tmp_path / "nowhere")]) == 2
    assert main([*command, str(tmp_path / "c"), "--predictions", str(tmp_path / "none.json")]) == 2
