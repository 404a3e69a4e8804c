"""Fine-tuning from few images: the score that a Q-Former with random weights recovers."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import pandas as pd

from qvision_lab.benchmark.harness import Table, growing_table, identity_of
from qvision_lab.captioning import Captioner, load
from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.evaluation import evaluate_dataset
from qvision_lab.training import load_recipe, train_captioner

EPOCHS = {6000: 6, 3000: 10, 1000: 25, 300: 45, 100: 60}  # by images; 1 to 5 minutes on two cores
SCENES = 1000


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Fine-tune by the recipe `finetune_scenes`, with fewer and fewer images."""
    tests = open_dataset("scenes:test", n=6 if quick else SCENES)
    about = {"quick": quick, "identity": identity_of(captioner, test=tests)}
    return growing_table("recovery", _rows(captioner, tests, quick), **about)


def _rows(captioner: Captioner, tests: CaptionDataset, quick: bool) -> Iterator[dict]:
    """The checkpoint as it was, then with Q-Former and bridge retrained from random weights."""
    whole = score_scenes(captioner, tests)
    yield {"pictures": None, "epochs": None, "seconds": None, "curve": {}, **whole}
    for images, count in ({48: 1} if quick else EPOCHS).items():
        changes = {"data.train.n": images, "training.phases.0.epochs": count}
        with TemporaryDirectory() as folder:
            start = perf_counter()
            checkpoint = train_captioner(load_recipe("finetune_scenes", changes), folder)
            seconds = perf_counter() - start
            scores = score_scenes(load(checkpoint, device=captioner.model.device), tests)
            curve = pd.read_csv(Path(folder, "phase-1", "curve.csv")).dropna(subset="eval_cider")
        curve = (curve.set_index("step")["eval_cider"] / 100).to_dict()  # 0 to 10
        row = {"pictures": images, "epochs": count, "seconds": seconds}  # of the whole run
        yield row | {**scores, "curve": curve}


def score_scenes(captioner: Captioner, tests: CaptionDataset) -> dict[str, float]:
    """CIDEr of greedy captions with its 95% interval, the share true in every word, and n."""
    captions = captioner.caption((image.picture for image in tests), preset="greedy")
    texts = {i: caption.text for i, caption in zip(tests.ids, captions, strict=True)}
    table = evaluate_dataset(texts, tests, ("cider", "scenes")).table
    true = {"true": table.loc["true", "score"], "scenes": len(tests)}
    return {**table.loc["CIDEr", ["score", "low", "high"]], **true}
