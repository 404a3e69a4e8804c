"""What a captioner is worth on Scenes, where the truth of every picture is known."""

from __future__ import annotations

import json

from tqdm.auto import tqdm

from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import open_dataset
from qvision_lab.data.scenes.telling import tell
from qvision_lab.evaluation import EvaluationReport, evaluate_dataset

OVERLAP = ("bleu", "meteor", "rouge", "cider")
OURS, SIXTH = "captioner", "a sixth caption"

Scores = dict[str, dict[str, dict[str, float]]]


def score_on_scenes(captioner: Captioner, split: str, n: int, seed: int = 0) -> Scores:
    """Caption the first `n` scenes of a split with the model's own settings, and judge them.

    Returns:
        By whose captions they are (the captioner's, and a sixth one of each scene by the grammar
        that told its five references, which shows how far true captions differ), by the score's
        name: `score`, `low` and `high` of its 95% interval, and what it is `of`.
    """
    dataset = open_dataset(f"scenes:{split}", n=n, seed=seed)
    pictures = (image.picture for image in tqdm(dataset, f"captioning {split}", unit="picture"))
    told = captioner.caption(pictures, batch_size=50)
    ours = {i: caption.text for i, caption in zip(dataset.ids, told, strict=True)}
    sixth = {image.image_id: tell(image.scene, 6)[5] for image in dataset}
    return {
        OURS: _rows(evaluate_dataset(ours, dataset, ("scenes", *OVERLAP))),
        SIXTH: _rows(evaluate_dataset(sixth, dataset, OVERLAP)),
    }


def _rows(report: EvaluationReport) -> dict[str, dict[str, float]]:
    return json.loads(report.table.to_json(orient="index", double_precision=6))
