"""Faithfulness of word maps: every method scored against boxes, next to chance and the centre."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pandas as pd

from qvision_lab.benchmark.harness import Table, identity_of
from qvision_lab.captioning import Captioner, load
from qvision_lab.data.coco import CaptionDataset, open_dataset
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
    table of its own. On `data` in COCO's format instead, with its instances, methods are compared
    with the centre.
    """
    source = Path(captioner.provenance.source)
    if data is not None:
        yield _score_boxes(captioner, quick, data)
    elif str(source) == EMBEDDED:
        yield _choose_default(captioner, quick)
    else:  # of a run
        name = (source.parent if source.name == "checkpoint" else source).name
        yield _compare_with_embedded(captioner, quick, f"maps {name}")


def _choose_default(captioner: Captioner, quick: bool) -> Table:
    how, splits = _open(SPLITS, quick)
    choice = summarise(score_words(captioner, splits["val"], CANDIDATES, removal=False))
    choice = choice.query("measure == 'pointing' and size == 'large'")
    chosen = choice[choice.method.isin(METHODS)].set_index("method")["value"].idxmax()
    scores = score_words(captioner, splits["test"], CANDIDATES)
    tested = _tested(scores, {name: chosen for name in scores.method.unique() if name != chosen})
    tables = choice.assign(split="val"), tested.assign(split="test")
    return _table("maps", captioner, quick, splits, *tables, scenes=how, chosen=chosen)


def _compare_with_embedded(captioner: Captioner, quick: bool, name: str) -> Table:
    how, splits = _open(SHARED, quick)
    shared = splits["test"], CANDIDATES, [image.references[0] for image in splits["test"]]
    ours, theirs = (score_words(c, *shared, removal=False) for c in (captioner, load()))
    against = {method: f"{method}, embedded" for method in ours.method}
    scores = pd.concat([ours, theirs.assign(method=theirs.method.map(against))])
    tested = _tested(scores, against).assign(split="test")
    return _table(name, captioner, quick, splits, tested, scenes=how, chosen=None)


def _score_boxes(captioner: Captioner, quick: bool, data: str) -> Table:
    """Maps of the model's captions of photographs; words that name an object with a box count."""
    dataset = open_dataset(data, n=6 if quick else None)
    scores = score_words(captioner, dataset, CANDIDATES)
    tested = _tested(scores, dict.fromkeys(CANDIDATES, "centre"))
    name, splits = f"maps boxes {Path(captioner.provenance.source).name}", {"test": dataset}
    return _table(name, captioner, quick, splits, tested, images=dataset.name, chosen="centre")


def _open(
    splits: dict[str, dict], quick: bool
) -> tuple[dict[str, dict], dict[str, CaptionDataset]]:
    """Settings of each split of Scenes, and the split."""
    how = {split: {**settings, "n": 4} if quick else settings for split, settings in splits.items()}
    return how, {name: open_dataset(f"scenes:{name}", **settings) for name, settings in how.items()}


def _tested(scores: pd.DataFrame, against: dict[str, str]) -> pd.DataFrame:
    """Means of each method, with its difference to another."""
    return summarise(scores).merge(compare_methods(scores, against), "left", KEYS)


def _table(
    name: str, captioner: Captioner, quick: bool, data: dict, *scores: pd.DataFrame, **settings
) -> Table:
    table, identity = pd.concat(scores).astype(object), identity_of(captioner, **data)
    rows = tuple(table.where(table.notna(), None).to_dict("records"))
    return Table(name=name, rows=rows, quick=quick, settings=settings, identity=identity)
