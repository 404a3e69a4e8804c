"""Scores with their intervals: of one system, and of two that captioned the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm.auto import tqdm

from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import ImageId, some
from qvision_lab.evaluation.bootstrap import bootstrap_interval, paired_difference
from qvision_lab.evaluation.chair import Vocabulary
from qvision_lab.evaluation.java import UnavailableError, meteor
from qvision_lab.evaluation.metrics import METRICS, Evidence, ratio_formula

if TYPE_CHECKING:
    from qvision_lab.scenes import Layout

COCO_METRICS = ("bleu", "meteor", "rouge", "cider")
SETTINGS = ("metrics", "notes", "confidence", "resamples", "seed")  # what is saved as it is


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What captions are worth; printed as a table, in a notebook too."""

    captions: Mapping[ImageId, str]
    counts: pd.DataFrame  # one row an image, in order of `captions`
    metrics: Sequence[str]  # those keys of `METRICS` whose counts there are
    notes: Mapping[str, str]  # what has to be known of a score, or why there is none
    confidence: float  # of the intervals, from so many resamples of the images
    resamples: int
    seed: int

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a score: `score`, the `low` and `high` end of its interval, and what it is `of`.

        `of` is the number of cases behind it: images, or for a share its denominator. A share of
        exactly 0 or 1 has no spread to resample: of n cases, one in n / 3 may still be otherwise.

        What is held fixed: the references of each image, and for CIDEr the document frequencies,
        which come from all images (those of a resample would make another, wider metric).
        """
        rows = {}
        for metric in self.metrics:
            counts, formula = self.counts_of(metric), METRICS[metric].formula
            how = self.resamples, self.confidence, self.seed
            low, high = bootstrap_interval(counts, formula, *how)
            total = counts.sum(0)
            of = total[1::2] if formula is ratio_formula else [len(counts)] * len(low)
            columns = zip(METRICS[metric].scores, formula(total), low, high, of, strict=True)
            rows |= {name: values for name, *values in columns}
        table = pd.DataFrame.from_dict(rows, "index", columns=["score", "low", "high", "of"])
        return table.astype({"of": int})

    @property
    def scores(self) -> dict[str, float]:
        """Corpus scores by name; BLEU, METEOR, ROUGE-L, shares: 0 to 1; CIDEr: 0 to 10."""
        return self.table["score"].to_dict()

    @cached_property
    def per_image(self) -> pd.DataFrame:
        """One row an image: its caption and its own scores; nan where it has none."""
        columns = {"caption": pd.Series(self.captions)}
        for metric in self.metrics:
            scores = METRICS[metric].formula(self.counts_of(metric))
            columns |= dict(zip(METRICS[metric].scores, scores.T, strict=True))
        return pd.DataFrame(columns, index=self.counts.index)

    def counts_of(self, metric: str) -> Float[np.ndarray, "images K"]:
        return self.counts[list(METRICS[metric].counts)].to_numpy(float)

    def __str__(self) -> str:
        lines = [f"{len(self.counts):,} images; times 100, {self.confidence:.0%} intervals"]
        lines += [
            f"  {name:<18}{100 * row.score:>8.1f}   "
            f"{f'[{100 * row.low:.1f}, {100 * row.high:.1f}]':<16} of {int(row.of):,}"
            for name, row in self.table.iterrows()
        ]
        return "\n".join(lines + [f"  {name}: {note}" for name, note in self.notes.items()])

    def _repr_html_(self) -> str:
        return (self.table * [100, 100, 100, 1]).round(1).to_html() + "".join(
            f"<p>{name}: {note}</p>" for name, note in self.notes.items()
        )

    def save(self, folder: str | Path) -> Path:
        """Write `scores.json` (with the settings) and `images.csv` (captions, scores, counts)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scores = json.loads(self.table.to_json(orient="index", double_precision=15))
        told = {"images": len(self.counts), "scores": scores}
        told |= {name: getattr(self, name) for name in SETTINGS}
        images = self.per_image.join(self.counts)
        write_atomic(folder / "images.csv", images.to_csv(index_label="image_id"))
        write_atomic(folder / "scores.json", json.dumps(told, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> EvaluationReport:
        """Read what `save` wrote; scores and intervals are computed from the counts anew."""
        told = json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8"))
        path = Path(folder) / "images.csv"
        images = pd.read_csv(path, index_col="image_id", keep_default_na=False)
        names = [name for metric in told["metrics"] for name in METRICS[metric].counts]
        settings = {name: told[name] for name in SETTINGS}
        return cls(images["caption"].to_dict(), images[names].astype(float), **settings)


def evaluate(
    predictions: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    metrics: Sequence[str] = COCO_METRICS,
    confidence: float = 0.95,
    *,
    objects: Mapping[ImageId, AbstractSet[str]] | None = None,
    vocabulary: Vocabulary | None = None,
    layouts: Mapping[ImageId, Layout] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> EvaluationReport:
    """Score captions as the field does, and against what is known to be in the pictures.

    "bleu", "meteor", "rouge", "cider" and "spice" equal `COCOEvalCap`'s (Chen et al. 2015,
    arXiv:1504.00325); SPICE's jars are used where they are, and never fetched. "chair" counts
    objects that are not there; "scenes" judges every claim about a drawn scene.

    Args:
        predictions: one caption an image.
        references: of the same images, at least one each.
        metrics: keys of `METRICS`.
        confidence: of the intervals, from a bootstrap over images.
        objects: for "chair": the categories in each image.
        vocabulary: the words that name them; by default COCO's.
        layouts: for "scenes": the truth of each.

    Raises:
        ValueError: for images that are not the same on both sides, an image without references, a
            metric that does not exist or lacks its truth.
        RuntimeError: if there is no Java, or one of its programs fails.
    """
    truths = {"objects": objects, "layouts": layouts}
    _refuse_unknown(metrics, truths)
    for name, of_images in ({"references": references} | truths).items():
        if of_images is not None:
            _refuse_mismatch(predictions, of_images, name)
    ids, metrics = list(predictions), tuple(dict.fromkeys(metrics))
    if without := [i for i in ids if not references[i] or isinstance(references[i], str)]:
        raise ValueError(f"{some('image', without)} without a list of references.")
    several = {i: references[i] for i in ids}
    evidence = Evidence(dict(predictions), several, objects, vocabulary, layouts)
    counts, notes = {}, {}
    progress = tqdm(total=len(metrics), desc="tokenizing", unit="metric")
    with ExitStack() as stack, progress:
        if any(METRICS[metric].needs == "words" for metric in metrics):
            pairs = zip(ids, evidence.words[0], strict=True)
            if silent := [i for i, words in pairs if not words]:
                notes["no words"] = f"{some('caption', silent)}: they overlap with nothing"
        if "meteor" in metrics:
            evidence.meteor = stack.enter_context(meteor(*evidence.words))
        for metric in sorted(metrics, key="meteor".__eq__):  # it works beside the others
            progress.set_description(metric)
            try:
                counts[metric] = METRICS[metric].count(evidence)
            except UnavailableError as reason:
                notes[" ".join(METRICS[metric].scores)] = str(reason)
            progress.update()
    kept = tuple(metric for metric in metrics if metric in counts)
    index = pd.Index(ids, name="image_id")
    tables = [pd.DataFrame(counts[metric], index, METRICS[metric].counts) for metric in kept]
    table = pd.concat([pd.DataFrame(index=index), *tables], axis=1)
    return EvaluationReport(dict(predictions), table, kept, notes, confidence, resamples, seed)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What one report has over another on the same images; printed as a table."""

    table: pd.DataFrame  # one row a score: difference, low, high, p
    images: int
    confidence: float

    def __str__(self) -> str:
        rows = [
            f"  {name:<18}{100 * row.difference:>+8.1f}   "
            f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}]   p = {row.p:.3f}"
            for name, row in self.table.iterrows()
        ]
        title = f"difference on {self.images:,} images; times 100, {self.confidence:.0%} intervals"
        return "\n".join([title, *rows])

    def _repr_html_(self) -> str:
        return (self.table * [100, 100, 100, 1]).round(3).to_html()


def compare(report: EvaluationReport, baseline: EvaluationReport) -> Comparison:
    """What `report` has over `baseline`, image by image: differences, intervals, p-values.

    `paired_difference` says how. Only metrics that both reports have are compared.

    Raises:
        ValueError: if the reports are not of the same images, or share no metric.
    """
    _refuse_mismatch(report.captions, baseline.captions, "the baseline")
    shared = [metric for metric in report.metrics if metric in baseline.metrics]
    if not shared:
        raise ValueError(f"no metric in common: {report.metrics} and {baseline.metrics}.")
    other = replace(baseline, counts=baseline.counts.loc[report.counts.index])
    how, rows = (report.resamples, report.confidence, report.seed), {}
    for metric in shared:
        both = report.counts_of(metric), other.counts_of(metric)
        difference, (low, high), p_value = paired_difference(*both, METRICS[metric].formula, *how)
        columns = zip(METRICS[metric].scores, difference, low, high, p_value, strict=True)
        rows |= {name: values for name, *values in columns}
    table = pd.DataFrame.from_dict(rows, "index", columns=["difference", "low", "high", "p"])
    return Comparison(table, len(report.counts), report.confidence)


def _refuse_unknown(metrics: Sequence[str], truths: Mapping[str, object]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            near = get_close_matches(str(metric), METRICS, 1) or [", ".join(METRICS)]
            raise ValueError(f"no metric {metric!r}; did you mean {near[0]}?")
        needs = METRICS[metric].needs
        if needs in truths and truths[needs] is None:
            raise ValueError(f"the metric {metric!r} needs {needs}=, the truth of each image.")


def _refuse_mismatch(
    predictions: Mapping[ImageId, object], others: Mapping[ImageId, object], name: str
) -> None:
    if not predictions:
        raise ValueError("there is no caption to score.")
    if wrong := [i for i, text in predictions.items() if not isinstance(text, str)]:
        raise ValueError(f"{some('prediction', wrong)} that are no text; give caption.text.")
    unknown = [i for i in predictions if i not in others]
    missing = [i for i in others if i not in predictions]
    if unknown or missing:
        parts = [(unknown, f"with a caption but not in {name}"), (missing, "without a caption")]
        said = " and ".join(f"{some('image', ids)} {what}" for ids, what in parts if ids)
        raise ValueError(f"{said}; both sides must have the same images.")
