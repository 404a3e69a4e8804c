"""Captions of a data set from and to files, and all its scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset, ImageId, some
from qvision_lab.evaluation.chair import coco_vocabulary
from qvision_lab.evaluation.report import COCO_METRICS, EvaluationReport, evaluate


def read_results(path: str | Path) -> dict[ImageId, str]:
    """Captions by image id, from COCO's results format: `[{"image_id": 1, "caption": "..."}]`.

    Raises:
        ValueError: the file is damaged or of another format, or an image is repeated.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = [(row["image_id"], row["caption"]) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path} is no results file ([{{"image_id": ..., "caption": ...}}, ...]): {error}'
        ) from error
    if repeated := some("image", [i for i, n in Counter(i for i, _ in pairs).items() if n > 1]):
        raise ValueError(f"{path} has several captions for {repeated}; keep one of each.")
    return dict(pairs)


def write_results(captions: Mapping[ImageId, str], path: str | Path) -> Path:
    """Write captions in COCO's results format, which evaluation servers take."""
    rows = [{"image_id": image_id, "caption": text} for image_id, text in captions.items()]
    return write_atomic(Path(path), json.dumps(rows))


def read_captions(path: str | Path, dataset: CaptionDataset) -> dict[ImageId, str]:
    """Captions by image id, from the output of `Captioner.caption_dataset`.

    Raises:
        ValueError: some images could not be captioned; the others stay in the file.
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


def evaluate_dataset(
    captions: Mapping[ImageId, str],
    dataset: CaptionDataset,
    metrics: Sequence[str] | None = None,
    **settings,
) -> EvaluationReport:
    """Score captions of a data set with its references, objects and judge.

    Args:
        metrics: by default COCO's four and SPICE, "chair" where all objects are known, and that of
            the data set's judge ("scenes").
        settings: `confidence`, `resamples` and `seed` of `evaluate`.
    """
    judge = dataset.judge
    known = all(image.objects is not None for image in dataset)
    if metrics is None:
        metrics = (*COCO_METRICS, "spice", *["chair"] * known, *([judge.name] if judge else []))
    return evaluate(
        captions,
        dataset.references,
        metrics,
        objects=dataset.objects if known else None,
        vocabulary=judge.vocabulary if judge else coco_vocabulary(),
        judge=judge,
        **settings,
    )
