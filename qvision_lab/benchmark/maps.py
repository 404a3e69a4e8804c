"""Faithfulness of word maps: every method scored against boxes, next to chance and the centre."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qvision_lab.benchmark.harness import Table
from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import open_dataset
from qvision_lab.interpretation.faithfulness import examples_of, score_maps
from qvision_lab.interpretation.maps import METHODS, composition
from qvision_lab.model.loading.checkpoint import EMBEDDED

SCENES, QUICK_SCENES = 500, 6


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Score the maps of greedy captions of 500 test scenes; ten minutes on two cores.

    Results of another checkpoint than the embedded one are named after its run.
    """
    scenes = QUICK_SCENES if quick else SCENES
    examples = examples_of(open_dataset("scenes:test", n=scenes))
    methods = {"composition, first block": partial(composition, block=0), **METHODS}
    table = score_maps(captioner, examples, methods)
    source = Path(captioner.provenance.source)
    run = source.parent if source.name == "checkpoint" else source  # as recipes write it
    name = "maps" if str(source) == EMBEDDED else f"maps {run.name}"
    rows = tuple(table.to_dict("records"))
    yield Table(name=name, rows=rows, quick=quick, settings={"scenes": scenes})
