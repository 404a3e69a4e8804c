"""Faithfulness of word maps: every method scored against boxes, next to chance and the centre."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from qvision_lab.benchmark.harness import Table, identity_of
from qvision_lab.captioning import Captioner, load
from qvision_lab.data.coco import open_dataset
from qvision_lab.interpretation.faithfulness import compare_methods, score_words, summarise
from qvision_lab.interpretation.maps import METHODS, composition, shared_methods
from qvision_lab.model.loading.checkpoint import EMBEDDED

SPLITS = {"val": {"n": 300, "seed": 1}, "test": {"n": 500, "seed": 1}}  # chosen on, tested on
SHARED = {"test": {"n": 200, "seed": 1}}  # two captioners are compared on
CANDIDATES = {"composition, first block": partial(composition, block=0), **shared_methods()}
KEYS = ["method", "size", "measure"]


def run_benchmarks(
    captioner: Captioner, quick: bool = False, data: str | None = None
) -> Iterator[Table]:
    """Score the maps of greedy captions; the default is chosen on `val`, all are tested on `test`.

    Differences to the chosen method are paired. Another checkpoint than the embedded one is
    compared with it method by method, by pointing alone, both on the scenes' first references, in a
    table of its own.
    On `data` in COCO's format instead, with its instances, methods are compared with the centre.
    """
    if data is not None:
        yield _score_boxes(captioner, quick, data)
        return
    name, chosen, source, tables = "maps", None, Path(captioner.provenance.source), []
    how = SPLITS if (embedded := str(source) == EMBEDDED) else SHARED
    how = {split: {**settings, "n": 4} if quick else settings for split, settings in how.items()}
    splits = {split: open_dataset(f"scenes:{split}", **settings) for split, settings in how.items()}
    if embedded:
        choice = summarise(score_words(captioner, splits["val"], CANDIDATES))
        choice = choice.query("measure == 'pointing' and size == 'large'")
        tables.append(choice.assign(split="val"))
        chosen = choice[choice.method.isin(METHODS)].set_index("method")["value"].idxmax()
        scores = score_words(captioner, splits["test"], CANDIDATES)
        against = {method: chosen for method in scores.method.unique() if method != chosen}
    else:
        name += f" {(source.parent if source.name == 'checkpoint' else source).name}"  # of a run
        shared = splits["test"], CANDIDATES, [image.references[0] for image in splits["test"]]
        ours, theirs = (score_words(c, *shared, removal=False) for c in (captioner, load()))
        against = {method: f"{method}, embedded" for method in ours.method}
        scores = pd.concat([ours, theirs.assign(method=theirs.method.map(against))])
    differences = compare_methods(scores, against)
    tested = summarise(scores).merge(differences, "left", KEYS)
    table = pd.concat([*tables, tested.assign(split="test")]).astype(object)
    rows = tuple(table.where(table.notna(), None).to_dict("records"))
    settings, identity = {"scenes": how, "chosen": chosen}, identity_of(captioner, **splits)
    yield Table(name=name, rows=rows, quick=quick, settings=settings, identity=identity)


def _score_boxes(captioner: Captioner, quick: bool, data: str) -> Table:
    """Maps of the model's captions of photographs; words that name an object with a box count."""
    dataset = open_dataset(data, n=6 if quick else None)
    scores = score_words(captioner, dataset, CANDIDATES)
    differences = compare_methods(scores, dict.fromkeys(CANDIDATES, "centre"))
    tested = summarise(scores).merge(differences, "left", KEYS)
    return Table(
        name=f"maps boxes {Path(captioner.provenance.source).name}",
        rows=tuple(tested.astype(object).where(tested.notna(), None).to_dict("records")),
        quick=quick,
        settings={"images": dataset.name, "chosen": "centre"},
        identity=identity_of(captioner, test=dataset),
    )
