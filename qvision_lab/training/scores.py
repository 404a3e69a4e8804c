"""What a captioner is worth on Scenes, where the truth of every picture is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from tqdm.auto import tqdm

from qvision_lab.captioning import Captioner
from qvision_lab.data import scenes
from qvision_lab.data.scenes.telling import tell

CHUNK = 250  # pictures held in memory at a time


def score_on_scenes(
    captioner: Captioner, split: str, n: int, seed: int = 0, workers: int = 0
) -> dict[str, dict[str, float]]:
    """Caption the first `n` scenes of a split with the model's own settings, and judge them.

    Returns:
        `truth`: every rate of `scenes.score` as `value` (0 to 1), `hits` and `total`.
        `overlap`: BLEU-4 and CIDEr (both times 100) against the five captions of each scene, and
        those of a sixth caption by the same grammar, which show how far true captions can differ.
    """
    checks, captions, references, sixth = [], [], [], []
    drawn = scenes.generate(n, split=split, seed=seed, workers=workers)
    with tqdm(desc=f"captioning {split}", total=n, unit="picture") as progress:
        while chunk := list(islice(drawn, CHUNK)):
            told = captioner.caption([scene.image for scene in chunk], batch_size=50)
            captions += [caption.text for caption in told]
            references += [scene.captions for scene in chunk]
            sixth += [tell(scene, 6)[5] for scene in chunk]
            checks += [
                scenes.check(caption.text, scene)
                for caption, scene in zip(told, chunk, strict=True)
            ]
            progress.update(len(chunk))
    truth = {
        name: {"value": rate.value, "hits": rate.hits, "total": rate.total}
        for name, rate in scenes.score(checks).items()
    }
    overlap = {
        f"{name}{suffix}": value
        for texts, suffix in ((captions, ""), (sixth, ", a sixth caption"))
        for name, value in overlap_scores(texts, references).items()
    }
    return {"truth": truth, "overlap": overlap}


def overlap_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BLEU-4 (Papineni et al. 2002) and CIDEr-D (Vedantam et al. 2015) of a corpus, times 100.

    Words are lower-cased and stripped of punctuation, which for Scenes is what COCO's own
    tokeniser does.
    """
    told = {i: [_words(caption)] for i, caption in enumerate(captions)}
    wanted = {i: [_words(text) for text in texts] for i, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, told, verbose=0)
    cider, _ = Cider().compute_score(wanted, told)
    return {"BLEU-4": 100 * bleu[3], "CIDEr": 100 * float(cider)}


def _words(caption: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", caption.lower()))
