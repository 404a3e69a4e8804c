"""Scores of the model next to those of captions that read no image, or one that is similar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from torch.nn import functional as F

from qvision_lab.benchmark.harness import Table, identity_of
from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import CaptionDataset, ImageId, open_dataset
from qvision_lab.evaluation.report import COCO_METRICS, evaluate, evaluate_dataset
from qvision_lab.model.loading.checkpoint import EMBEDDED
from qvision_lab.training.features import FeatureCache

SCENES = {"train": 6000, "test": 1000}  # of each split


def run_benchmarks(
    captioner: Captioner, quick: bool = False, data: str | None = None
) -> Iterator[Table]:
    """Score captions of the split `test` of `data` (by default Scenes), learned from `train`.

    Sources, each with an interval: the model, greedy and with 3 beams; the captions that it makes
    without an image (visual tokens of zero) and of the mean image token of each patch; the first
    caption of the nearest training image, by the cosine of the tower's mean states; and each
    reference against the others of its image, averaged: what a person scores, or a true caption.
    """
    train, test = (_open(data, split, quick) for split in ("train", "test"))
    model, metrics = captioner.model, [*COCO_METRICS]
    metrics += [test.judge.name] if test.judge else []
    sources = {}
    for preset, name in {"greedy": "model, greedy", "beam": "model, 3 beams"}.items():
        captions = captioner.caption((image.picture for image in test), preset=preset)
        sources[name] = [caption.text for caption in captions]
    with TemporaryDirectory() as folder:
        cache = FeatureCache(folder, model, "bfloat16")
        known, asked = (cache.encode(part, model, captioner.processor) for part in (train, test))
        mean_image = sum(known.view(image_id).float() for image_id in train.ids) / len(train)
        means = [F.normalize(known.means(train.ids)), F.normalize(asked.means(test.ids))]  # [N,C]
    nearest = (means[1] @ means[0].T).argmax(1).tolist()
    sources["nearest training image"] = [train[i].references[0] for i in nearest]
    with torch.no_grad():
        _, visual = model.encode(vision_states=mean_image[None].to(model.device))
        blank = torch.zeros_like(visual.visual_tokens)
        for name, tokens in {"mean image": visual.visual_tokens, "no image": blank}.items():
            ids = model.generate(visual_tokens=tokens, max_new_tokens=30, do_sample=False)
            sources[name] = [captioner.processor.decode(ids[0])] * len(test)
    about = {"quick": quick, "settings": {"train": train.name, "test": test.name}}
    about["identity"] = identity_of(captioner, train=train, test=test)
    source = captioner.provenance.source
    about["name"] = "baselines" if source == EMBEDDED else f"baselines {Path(source).name}"
    rows = []
    for name, texts in sources.items():
        report = evaluate_dataset(dict(zip(test.ids, texts, strict=True)), test, metrics)
        rows += _rows(name, report.table)
        yield Table(rows=tuple(rows), **about)
    rows += _rows("a reference, by the others", score_references(test.references))
    yield Table(rows=tuple(rows), **about)


def score_references(references: Mapping[ImageId, Sequence[str]]) -> pd.DataFrame:
    """Scores of each reference against the others of its image: means of score and interval."""
    tables = []
    for left_out in range(min(map(len, references.values()))):
        captions = {key: texts[left_out] for key, texts in references.items()}
        others = {k: [*texts[:left_out], *texts[left_out + 1 :]] for k, texts in references.items()}
        tables.append(evaluate(captions, others, COCO_METRICS).table)
    return pd.concat(tables).groupby(level=0, sort=False).mean()


def _rows(source: str, scores: pd.DataFrame) -> list[dict]:
    table = scores.to_dict("index")
    return [{"source": source, "metric": name, **row} for name, row in table.items()]


def _open(data: str | None, split: str, quick: bool) -> CaptionDataset:
    n = 8 if quick else None
    if data is None:
        return open_dataset(f"scenes:{split}", n=n or SCENES[split])
    return open_dataset(data, split=split, n=n)
