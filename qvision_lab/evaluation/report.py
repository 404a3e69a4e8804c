"""Scores with confidence intervals, of a system and of the difference to another; result files."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import norm
from tqdm.auto import tqdm

from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset, ImageId, find_repeated, some, take
from qvision_lab.data.identity import fingerprint, identify, read_identity
from qvision_lab.evaluation import bootstrap
from qvision_lab.evaluation.chair import Vocabulary
from qvision_lab.evaluation.java import UnavailableError, meteor
from qvision_lab.evaluation.metrics import METRICS, Evidence, Judge, Metric, judge_metric

COCO_METRICS = ("bleu", "meteor", "rouge", "cider")
PERCENT = [100, 100, 100, 1]  # a score, its interval and its denominator, as printed
NO_CASE = "no case"  # in place of a score
NUMBER = re.compile("0|-?[1-9][0-9]*")  # an id in a file that is a number, unless listed as text
SETTINGS = ("notes", "confidence", "resamples", "seed")  # fields saved unchanged


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Scores of captions; printed as a table, also in a notebook."""

    captions: Mapping[ImageId, str]
    counts: pd.DataFrame  # a row per image, in order of `captions`
    metrics: Mapping[str, Metric]  # those in `counts`
    notes: Mapping[str, str]  # caveats of a score, or why it is missing
    confidence: float  # of the intervals
    resamples: int  # of the images
    seed: int
    identity: Mapping[str, Any] = field(default_factory=identify)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a score: `score`, `low` and `high` of its interval, and `of`, its denominator.

        That is the number of images, or of cases for a share. Intervals of shares are Wilson's, by
        `share_interval`; others resample images, with their references and CIDEr's document
        frequencies, which come from all images, fixed.
        """
        rows, settings = {}, (self.resamples, self.confidence, self.seed)
        for metric in self.metrics.values():
            counts, of = self.counts_of(metric), [len(self.counts)] * len(metric.scores)
            if metric.shares:
                of = counts[:, 1::2].sum(0)
                interval = bootstrap.share_interval(
                    counts[:, ::2], counts[:, 1::2], self.confidence
                )
            else:
                interval = bootstrap.bootstrap_interval(counts, metric.formula, *settings)
            columns = zip(metric.formula(counts.sum(0)), *interval, of, strict=True)
            rows |= zip(metric.scores, columns, strict=True)
        table = pd.DataFrame.from_dict(rows, "index", columns=["score", "low", "high", "of"])
        return table.astype({"of": int})

    @property
    def scores(self) -> dict[str, float]:
        """Corpus scores by name, printed times 100; CIDEr: 0 to 10, all others: 0 to 1."""
        return self.table["score"].to_dict()

    @cached_property
    def per_image(self) -> pd.DataFrame:
        """One row an image: its caption and its scores, or nan."""
        table = pd.Series(self.captions).reindex(self.counts.index).to_frame("caption")
        for metric in self.metrics.values():
            table[[*metric.scores]] = metric.formula(self.counts_of(metric))
        return table

    def counts_of(self, metric: Metric) -> Float[np.ndarray, "images K"]:
        return self.counts[list(metric.counts)].to_numpy(float)

    def __str__(self) -> str:
        lines = [f"{len(self.counts):,} images; times 100, {self.confidence:.0%} intervals"]
        for name, score, low, high, of in (self.table * PERCENT).itertuples():
            value, interval = (f"{score:.1f}", f"[{low:.1f}, {high:.1f}]") if of else ("-", NO_CASE)
            lines.append(f"  {name:<18}{value:>8}   {interval:<16} of {int(of):,}")
        return "\n".join(lines + [f"  {name}: {note}" for name, note in self.notes.items()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{name}: {note}</p>" for name, note in self.notes.items())
        return (self.table * PERCENT).round(1).to_html(na_rep=NO_CASE) + notes

    def save(self, folder: str | Path) -> Path:
        """Write `scores.json` (settings and identity too), `images.csv` (captions and counts)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scores = json.loads(self.table.to_json(orient="index", double_precision=15))
        content = {"images": len(self.counts), "scores": scores, "metrics": list(self.metrics)}
        content |= {name: getattr(self, name) for name in SETTINGS} | dict(self.identity)
        texts = (i for i in self.captions if isinstance(i, str))
        content["text_ids"] = list(filter(NUMBER.fullmatch, texts))
        images = self.per_image.join(self.counts)
        table = images.to_csv(index_label="image_id", quoting=csv.QUOTE_NONNUMERIC)
        write_atomic(folder / "images.csv", table)
        write_atomic(folder / "scores.json", json.dumps(content, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "EvaluationReport":
        """Read the files of `save`; scores and intervals are recomputed from the counts."""
        content = json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8"))
        path = Path(folder) / "images.csv"
        how = {"keep_default_na": False, "float_precision": "round_trip"}
        images = pd.read_csv(path, dtype={"image_id": str, "caption": str}, **how)
        text = {*content.get("text_ids", ())}
        ids = [int(i) if NUMBER.fullmatch(i) and i not in text else i for i in images["image_id"]]
        images.index = pd.Index(ids, name="image_id")
        known = {score for metric in METRICS.values() for score in metric.scores}
        judged = judge_metric([score for score in content["scores"] if score not in known])
        metrics = {name: METRICS.get(name, judged) for name in content["metrics"]}
        counts = images[[name for metric in metrics.values() for name in metric.counts]]
        settings = {name: content[name] for name in SETTINGS}
        settings["identity"] = read_identity(content)
        return cls(images["caption"].to_dict(), counts.astype(float), metrics, **settings)


def evaluate(
    predictions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    metrics: Sequence[str] = COCO_METRICS,
    confidence: float = 0.95,
    *,
    objects: Mapping[ImageId, AbstractSet[str]] | None = None,
    vocabulary: Vocabulary | None = None,
    judge: Judge | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> EvaluationReport:
    """Score one caption per image against references, objects and the truth of drawn images.

    "bleu", "meteor", "rouge", "cider" and "spice" equal `COCOEvalCap`'s (Chen et al. 2015,
    arXiv:1504.00325); SPICE needs its jars, which are not downloaded. "chair" counts hallucinated
    objects; the metric of a judge ("scenes") every claim about a drawn image.

    Args:
        references: of the same images, at least one each.
        metrics: keys of `METRICS`, or the judge's name.
        confidence: of the intervals, from a bootstrap over images.
        objects: the categories in each image, for "chair"; by default named as COCO's.

    Raises:
        ValueError: images that differ between the arguments, an image without references, an
            unknown metric or one without its truth.
        RuntimeError: a Java program fails.
    """
    known = METRICS | ({judge.name: judge_metric(judge.rates)} if judge else {})
    for name in metrics:
        if name not in known:
            near = get_close_matches(name, known, 1) or [", ".join(known)]
            raise ValueError(f"no metric {name!r}; did you mean {near[0]}? A judge= adds its own.")
    if "chair" in metrics and objects is None:
        raise ValueError("the metric 'chair' needs objects=, those in each image.")
    _refuse_mismatch(predictions, references, "references")
    if objects is not None:
        _refuse_mismatch(predictions, objects, "objects")
    if judge and (unknown := some("image", [i for i in predictions if i not in judge.truths])):
        raise ValueError(f"{unknown} that the judge does not know.")
    captions, metrics = dict(predictions), {name: known[name] for name in metrics}
    references = {i: references[i] for i in captions}
    bare = [i for i, texts in references.items() if not texts or isinstance(texts, str)]
    if without := some("image", bare):
        raise ValueError(f"{without} without a list of references.")
    evidence = Evidence(captions, references, objects, vocabulary, judge)
    table, notes = pd.DataFrame(index=pd.Index(list(captions), name="image_id")), {}
    progress = tqdm(total=len(metrics), desc="tokenizing", unit="metric")
    with ThreadPoolExecutor(1) as pool, progress:
        if not all(metric.shares for metric in metrics.values()):
            pairs = zip(captions, evidence.words[0], strict=True)
            if empty := some("caption", [i for i, words in pairs if not words]):
                notes["no words"] = f"{empty}: no overlap with any reference"
        if "meteor" in metrics:
            evidence.meteor = pool.submit(meteor, *evidence.words)
        for name in sorted(metrics, key="meteor".__eq__):  # last, since it runs in parallel
            progress.set_description(name)
            try:
                table[[*metrics[name].counts]] = metrics[name].count(evidence)
            except UnavailableError as reason:
                notes[" ".join(metrics.pop(name).scores)] = str(reason)
            progress.update()
    table = table[[name for metric in metrics.values() for name in metric.counts]]
    return EvaluationReport(captions, table, metrics, notes, confidence, resamples, seed)


def evaluate_dataset(
    captions: Mapping[ImageId, str],
    dataset: CaptionDataset,
    metrics: Sequence[str] | None = None,
    model: str | None = None,
    **settings,
) -> EvaluationReport:
    """Score captions of a data set with its references, objects and judge.

    Args:
        model: digest of the weights that captioned, for the report's identity.
        metrics: by default COCO's four and SPICE, "chair" where all objects are known, and that of
            the data set's judge ("scenes").
        settings: `confidence`, `resamples` and `seed` of `evaluate`.
    """
    judge, objects = dataset.judge, dataset.objects
    if None in objects.values():
        objects = None
    if metrics is None:
        metrics = [*COCO_METRICS, "spice"] + ["chair"] * (objects is not None)
        metrics += [judge.name] if judge else []
    settings |= {"judge": judge, "vocabulary": judge.vocabulary if judge else None}
    report = evaluate(captions, dataset.references, metrics, objects=objects, **settings)
    return replace(report, identity=identify(model, {dataset.name: fingerprint(dataset)}))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Differences between two reports on the same images; printed as a table."""

    table: pd.DataFrame  # a row per score: difference, low, high, p, corrected
    images: int
    confidence: float  # that all intervals hold together

    def __str__(self) -> str:
        head = f"times 100; {self.confidence:.0%} intervals and p are corrected for their number"
        lines = [f"difference on {self.images:,} images; {head}, {self.table['p'].count()}"]
        for name, score, low, high, _, p in (self.table * [*PERCENT, 1]).itertuples():
            cells = f"{score:>+8.1f}   [{low:+.1f}, {high:+.1f}]   p = {p:.3f}"
            lines.append(f"  {name:<18}{cells if p == p else f'{NO_CASE:>8} of one'}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return (self.table * [*PERCENT, 1]).round(3).to_html(na_rep=NO_CASE)


def compare(report: EvaluationReport, baseline: EvaluationReport) -> Comparison:
    """Differences `report` - `baseline` of their common metrics, by `paired_difference`.

    All scores are one family: `corrected` is Holm's p, and the intervals are Bonferroni's.
    ValueError if the reports are not of the same images, or share no metric.
    """
    _refuse_mismatch(report.captions, baseline.captions, "the baseline")
    shared = [metric for name, metric in report.metrics.items() if name in baseline.metrics]
    if not shared:
        raise ValueError(f"no metric in common: {[*report.metrics]} and {[*baseline.metrics]}.")
    other = replace(baseline, counts=baseline.counts.loc[report.counts.index])
    settings, rows = (report.resamples, report.confidence, report.seed), {}
    for metric in shared:
        both = report.counts_of(metric), other.counts_of(metric)
        found = bootstrap.paired_difference(*both, metric.formula, *settings, metric.shares)
        columns = zip(found[0], *found[1], found[2], strict=True)
        rows |= zip(metric.scores, columns, strict=True)
    table = pd.DataFrame.from_dict(rows, "index", columns=["difference", "low", "high", "p"])
    tail, limits = (1 - report.confidence) / 2, ["low", "high"]
    wider = norm.isf(tail / max(1, table["p"].count())) / norm.isf(tail)
    table[limits] = wider * table[limits].add((1 / wider - 1) * table["difference"], axis=0)
    table["corrected"] = bootstrap.holm(table["p"])
    return Comparison(table, len(report.counts), report.confidence)


def _refuse_mismatch(
    predictions: Mapping[ImageId, object], others: Mapping[ImageId, object], name: str
) -> None:
    if not predictions:
        raise ValueError("there is no caption to score.")
    if wrong := some("prediction", [i for i, t in predictions.items() if not isinstance(t, str)]):
        raise ValueError(f"{wrong} that are no text; give caption.text.")
    if unknown := some("image", [i for i in predictions if i not in others]):
        raise ValueError(f"{unknown} with a caption but not in {name}; give the same images.")
    if missing := some("image", [i for i in others if i not in predictions]):
        raise ValueError(f"{missing} of {name} without a caption; give the same images.")


def read_results(path: str | Path) -> dict[ImageId, str]:
    """Captions by image id, from COCO's results format: `[{"image_id": 1, "caption": "..."}]`.

    ValueError if the file is damaged or of another format, or an image is repeated.
    """
    try:
        rows = enumerate(json.loads(Path(path).read_bytes()), start=1)
        kinds = {"image_id": int | str, "caption": str}
        pairs = [take(row, f"row {number}", **kinds) for number, row in rows]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{path} is no results file ([{{"image_id": ..., "caption": ...}}, ...]): {error}'
        ) from error
    if repeated := some("image", find_repeated([image_id for image_id, _ in pairs])):
        raise ValueError(f"{path} has several captions for {repeated}; keep one of each.")
    return dict(pairs)


def write_results(captions: Mapping[ImageId, str], path: str | Path) -> Path:
    """Write captions in COCO's results format, which evaluation servers take."""
    rows = [{"image_id": image_id, "caption": text} for image_id, text in captions.items()]
    return write_atomic(Path(path), json.dumps(rows))


def read_captions(path: str | Path, dataset: CaptionDataset) -> dict[ImageId, str]:
    """Captions by image id, from the output of `Captioner.caption_dataset`.

    ValueError if some images could not be captioned; the others stay in the file.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = {record["source"]: record for record in map(json.loads, filter(None, lines))}
    captions = {i: records.get(str(i), {}).get("caption") for i in dataset.ids}
    if failed := [i for i, caption in captions.items() if caption is None]:
        why = records.get(str(failed[0]), {}).get("error", "not tried")
        raise ValueError(
            f"{some('image', failed)} not captioned ({why}); repair them and run this again, which "
            "resumes, or evaluate the others as a subset."
        )
    return captions
