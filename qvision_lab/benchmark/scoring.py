"""What it costs to score 5,000 captions, beside COCO's own code, and to be sure of the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from qvision_lab.benchmark.harness import Comparison, compare
from qvision_lab.captioning import Captioner
from qvision_lab.data.scenes.telling import tell
from qvision_lab.data.scenes.world import layout
from qvision_lab.evaluation import evaluate

IMAGES, QUICK_IMAGES = 5000, 50
RESAMPLES = 1000


def run_benchmarks(captioner: Captioner | None = None, quick: bool = False) -> Iterator[Comparison]:
    """Compare `evaluate` with `COCOEvalCap`'s scorers less SPICE, and with and without a bootstrap.

    Each scene has five references, and a sixth caption of it is scored. No model takes part.
    """
    n = QUICK_IMAGES if quick else IMAGES
    told = {i: tell(layout("test", 0, i), 6) for i in range(n)}
    predictions = {i: captions[5] for i, captions in told.items()}
    references = {i: list(captions[:5]) for i, captions in told.items()}
    settings = {"images": n, "references": 5, "metrics": "BLEU METEOR ROUGE-L CIDEr"}
    yield compare(
        partial(coco_scores, predictions, references),
        lambda: evaluate(predictions, references, resamples=1).table,
        name="COCOEvalCap vs evaluate",
        rounds=3,
        quick=quick,
        settings=settings,
    )
    report = evaluate(predictions, references)
    yield compare(
        lambda: replace(report, resamples=RESAMPLES).table,
        lambda: replace(report, resamples=1).table,
        name="bootstrap vs none",
        rounds=3,
        quick=quick,
        settings={**settings, "resamples": RESAMPLES},
    )


def coco_scores(
    predictions: dict[int, str], references: dict[int, list[str]]
) -> dict[str, float | list[float]]:
    """Corpus scores by the classes that `COCOEvalCap.evaluate` runs one after the other."""
    tokenizer = PTBTokenizer()
    wanted = tokenizer.tokenize(
        {i: [{"caption": text} for text in several] for i, several in references.items()}
    )
    told = tokenizer.tokenize({i: [{"caption": text}] for i, text in predictions.items()})
    scorers = {"BLEU": Bleu(4), "METEOR": Meteor(), "ROUGE-L": Rouge(), "CIDEr": Cider()}
    with redirect_stdout(StringIO()):  # BLEU prints its counts
        return {name: scorer.compute_score(wanted, told)[0] for name, scorer in scorers.items()}
