"""What a captioner is worth on Scenes, where every truth is known, and the card that tells it."""

from __future__ import annotations

import json
from importlib.resources import files

from tqdm.auto import tqdm

from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import open_dataset
from qvision_lab.evaluation import EvaluationReport, evaluate_dataset
from qvision_lab.scenes.captions import tell
from qvision_lab.scenes.checker import RATES

METRICS = ("bleu", "meteor", "rouge", "cider")
OVERLAPS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
OURS, SIXTH = "captioner", "a sixth caption"
CARD = (files("qvision_lab.training") / "cards/scenes.md").read_text(encoding="utf-8")

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
        OURS: _rows(evaluate_dataset(ours, dataset, ("scenes", *METRICS))),
        SIXTH: _rows(evaluate_dataset(sixth, dataset, METRICS)),
    }


def _rows(report: EvaluationReport) -> dict[str, dict[str, float]]:
    return json.loads(report.table.to_json(orient="index", double_precision=6))


def scenes_card(run: dict, scores: dict[str, Scores], parameters: int) -> str:
    """The card of one run, with the scores of each split side by side."""
    heads = [f"{split} ({told[OURS]['true']['of']:,})" for split, told in scores.items()]
    rows = [(f"{name}, of {RATES[name]}", OURS, name) for name in RATES]
    rows += [(name, OURS, name) for name in OVERLAPS]
    rows += [(f"{name}, {SIXTH}", SIXTH, name) for name in OVERLAPS]
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    for label, by, name in rows:
        lines.append([label, *(_cell(told[by][name]) for told in scores.values())])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return CARD.format(name=run["recipe"]["name"], parameters=parameters / 1e6, table=table)


def _cell(row: dict[str, float]) -> str:
    """A score with its interval, times 100; a dash where the split has nothing to count."""
    if not row["of"]:
        return "-"
    score, low, high = (100 * row[name] for name in ("score", "low", "high"))
    return f"{score:.1f} [{low:.1f}, {high:.1f}]"
