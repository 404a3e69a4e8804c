"""Faithfulness of word maps: every method scored against boxes, next to chance and the centre."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from qvision_lab.benchmark.harness import Table
from qvision_lab.captioning import Captioner, load
from qvision_lab.data.coco import open_dataset
from qvision_lab.data.identity import fingerprint, identify
from qvision_lab.interpretation.faithfulness import (
    compare_methods,
    examples_of,
    score_words,
    summarise,
)
from qvision_lab.interpretation.maps import METHODS, composition
from qvision_lab.model.loading.checkpoint import EMBEDDED
from qvision_lab.model.parameters import fingerprint_weights

SPLITS = {"val": {"n": 300, "seed": 1}, "test": {"n": 500, "seed": 1}}  # chosen on, tested on
CANDIDATES = {"composition, first block": partial(composition, block=0), **METHODS}
KEYS = ["method", "size"]


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Score the maps of greedy captions; the default is chosen on `val`, all are tested on `test`.

    Differences to the chosen method are paired. Another checkpoint than the embedded one is
    compared with it method by method, both on the scenes' first references, in a table of its own.
    """
    how = {split: {**settings, "n": 6} if quick else settings for split, settings in SPLITS.items()}
    data = {split: open_dataset(f"scenes:{split}", **settings) for split, settings in how.items()}
    examples = {split: [*examples_of(dataset)] for split, dataset in data.items()}
    settings, source = {"scenes": how}, Path(captioner.provenance.source)
    if str(source) == EMBEDDED:
        name, val = "maps", score_words(captioner, examples["val"], CANDIDATES)
        choice = summarise(val[val["size"] == "large"], KEYS).query("measure == 'pointing'")
        chosen = choice[choice.method.isin(METHODS)].set_index("method")["value"].idxmax()
        settings |= {"chosen": chosen}
        rows = choice.assign(split="val").to_dict("records")
        scores = score_words(captioner, examples["test"], CANDIDATES)
        against = {name: chosen for name in scores.method.unique() if name != chosen}
    else:
        run = source.parent if source.name == "checkpoint" else source  # as recipes write it
        name, rows = f"maps {run.name}", []
        pairs = zip(examples["test"], data["test"], strict=True)
        shared = [replace(example, caption=image.references[0]) for example, image in pairs]
        ours, theirs = (score_words(c, shared, CANDIDATES) for c in (captioner, load()))
        scores = pd.concat([ours, theirs.assign(method=theirs.method + ", embedded")])
        against = {method: f"{method}, embedded" for method in ours.method.unique()}
    differences = compare_methods(scores, against)
    tested = summarise(scores, KEYS).merge(differences, "left", [*KEYS, "measure"])
    tested = tested.assign(split="test").astype(object).where(tested.notna(), None)
    digests = {split: fingerprint(dataset) for split, dataset in data.items()}
    identity = identify(fingerprint_weights(captioner.model), digests)
    rows = (*rows, *tested.to_dict("records"))
    yield Table(name=name, rows=rows, quick=quick, settings=settings, identity=identity)
