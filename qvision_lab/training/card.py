"""The model card of a captioner that was trained on Scenes: what it is, its scores, its limits."""

from __future__ import annotations

from qvision_lab.data.scenes.checking import RATES
from qvision_lab.training.scores import OURS, SIXTH, Scores

OVERLAPS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")

CARD = """---
library_name: qvision_lab
pipeline_tag: image-to-text
license: mit
---
# QVision, small, trained on Scenes

A captioner of QVision's architecture (frozen vision tower, Q-Former, GPT-Neo with a bridge),
{parameters:.1f} million parameters, trained from random weights on Scenes, the drawn world of
`qvision_lab`, by `qvision train {name}`. It makes every notebook, test and demo run without
network. It knows nothing of photographs.

## How it was trained

1. The vision tower learned to see: for every patch the object, its colour and its box, from the
   scene's own truth. This stands in for CLIP's pre-training. It means that where this captioner
   looks did **not** emerge from captions alone.
2. The tower was frozen, and the Q-Former, the bridge and GPT-Neo learned to tell, from captions.

`run.yaml` beside this card holds every setting, seed and version.

## Scores

Greedy captions of scenes that training never saw: `test` like the training pictures, `compose`
with colours that these objects never had in training, `crowd` with five to eight objects, of which
no caption was ever trained on. All times 100; in brackets 95% intervals, from a bootstrap over
scenes.

{table}

BLEU-4 to CIDEr compare with five captions of each scene. A sixth caption by the grammar that told
them shows how far true captions can differ.

## Limits

It speaks the language of Scenes, about ninety words, and says things of any picture in them.
"""


def scenes_card(run: dict, scores: dict[str, Scores], parameters: int) -> str:
    """The card of one run, with the scores of each split side by side."""
    splits = list(scores)
    lines = [
        "| | " + " | ".join(f"{split} ({_captions(scores[split]):,})" for split in splits) + " |",
        "|---|" + "---:|" * len(splits),
    ]
    rows = [(f"{name}, of {RATES[name]}", OURS, name) for name in RATES]
    rows += [(name, OURS, name) for name in OVERLAPS]
    rows += [(f"{name}, {SIXTH}", SIXTH, name) for name in OVERLAPS]
    for label, whose, name in rows:
        cells = (_cell(scores[split][whose][name]) for split in splits)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return CARD.format(
        name=run["recipe"]["name"], parameters=parameters / 1e6, table="\n".join(lines)
    )


def _captions(scores: Scores) -> int:
    return scores[OURS]["true"]["of"]


def _cell(row: dict[str, float]) -> str:
    """A score with its interval; a dash where the split has nothing to count."""
    if not row["of"]:
        return "-"
    score, low, high = (100 * row[name] for name in ("score", "low", "high"))
    return f"{score:.1f} [{low:.1f}, {high:.1f}]"
