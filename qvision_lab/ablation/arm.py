"""One run of a study: a captioner learned behind a frozen tower, and what it is worth and costs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from qvision_lab.captioning import Captioner, load
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.evaluation import evaluate_dataset
from qvision_lab.interpretation.faithfulness import examples_of, score_maps
from qvision_lab.interpretation.maps import composition
from qvision_lab.model.captioner import QVisionForConditionalGeneration, generation_preset
from qvision_lab.model.config import QVisionConfig
from qvision_lab.training.caption_stage import caption_seen, learn_to_tell, see_scenes
from qvision_lab.training.trainer import last_checkpoint

# What may vary of a model: nothing of the tower, which is frozen, and of the tokens.
MODEL_FIELDS = (
    *("num_query_tokens", "num_qformer_blocks", "num_attention_heads", "dropout", "text_config"),
    *("global_token", "bridge", "bridge_reads"),
)
TOKENS, ROUNDS = 20, 5  # of captions whose time is taken


@dataclass(frozen=True, eq=False)
class Run:
    """A variant with a seed, and all that its result hangs on."""

    variant: str
    seed: int  # runs of one seed are pairs
    draws: int  # what weights and the order of pictures are drawn from
    settings: dict[str, Any]  # of the model, its training and its scores
    checkpoint: str | None  # with the tower and the tokenizer; None: the embedded one
    data: str  # fingerprint

    @property
    def key(self) -> str:
        """A digest of all that the result hangs on; the names hang on nothing."""
        told = asdict(replace(self, variant="", seed=0))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def row(self, folder: str | os.PathLike) -> Path:
        """Where its results are, once it is finished; `curve.csv` and `log.txt` are beside them."""
        return Path(folder, "runs", self.key, "row.json")


def arm_config(config: QVisionConfig, settings: dict[str, Any]) -> QVisionConfig:
    """A checkpoint's configuration with what a run says of the model."""
    changes = {name: settings[name] for name in MODEL_FIELDS}
    return QVisionConfig.from_dict({**config.to_dict(), **changes})


def carry_out(run: Run, folder: Path) -> None:
    """Do a run, or what is left of it, and write its row; what it prints goes to its log.

    One at a time in a process, since torch's threads and random numbers are the process's own.
    """
    row, threads = run.row(folder), torch.get_num_threads()
    work = row.parent
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"), (work / "log.txt").open("a") as log:
        if row.exists():  # done by the worker of a study that was killed, which outlived it
            return
        torch.set_num_threads(run.settings["threads"])
        try:
            with redirect_stdout(log), redirect_stderr(log):
                measured = _measure(run, work, folder / "states")
        finally:
            torch.set_num_threads(threads)
        write_atomic(row, json.dumps(measured, indent=1))
        for checkpoint in work.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _measure(run: Run, work: Path, states: Path) -> dict[str, float | str | None]:
    """Learn, then score; a run that diverges has a reason in place of scores."""
    settings, origin = {**run.settings, "workers": 0}, load(run.checkpoint, device="cpu")
    tower, tokenizer = origin.model.vision.tower, origin.processor.tokenizer
    resumed = last_checkpoint(work) is not None
    config = arm_config(origin.model.config, settings)
    model = learn_to_tell(tower, config, tokenizer, settings, run.draws, work, states)
    broken = [name for name, weights in model.named_parameters() if not weights.isfinite().all()]
    if broken:
        return {"failed": f"diverged: {len(broken)} weights are no numbers, {broken[0]} first"}
    seen = see_scenes(tower, states, settings["scored"], "test", 0, 0)
    dataset = open_dataset("scenes:test", n=settings["scored"])
    captions = dict(zip(dataset.ids, caption_seen(model, tokenizer, seen), strict=True))
    report = evaluate_dataset(captions, dataset, ("cider", "scenes"), resamples=1)
    seconds = pd.read_csv(work / "curve.csv")["train_runtime"].max()
    some = open_dataset("scenes:test", n=settings["pointed"])
    return {
        "failed": None,
        **report.scores,
        "pointing": _pointing(Captioner(model, origin.processor), some),
        "parameters": model.num_parameters(only_trainable=True),
        "seconds": nan if resumed else seconds,  # those before an interruption are lost
        "latency": _latency(model, torch.from_numpy(seen.states[:1].astype(np.float32))),
    }


def _pointing(captioner: Captioner, dataset: CaptionDataset) -> float:
    """How often the peak of a word's map lies on what it names, in captions that all arms share.

    nan without a bridge, and where it reads a single mean: there is no map of words.
    """
    config = captioner.model.config
    if config.bridge == "prefix" or config.bridge_reads == "mean_image_token":
        return nan
    pairs = zip(examples_of(dataset), dataset, strict=True)
    examples = [replace(example, caption=image.references[0]) for example, image in pairs]
    scores = score_maps(captioner, examples, {"attention": composition})  # one pass is enough
    by_size = scores[(scores["method"] == "attention") & (scores["measure"] == "pointing")]
    return float(np.average(by_size["value"], weights=by_size["words"]))


def _latency(model: QVisionForConditionalGeneration, states: Float[Tensor, "1 P C"]) -> float:
    """Median seconds of a greedy caption of 20 tokens, behind the tower that all arms share."""
    settings = generation_preset("greedy", model.config)
    settings.update(max_new_tokens=TOKENS, min_length=TOKENS + 1)  # and <START>
    seconds = []
    for _ in range(ROUNDS):
        start = perf_counter()
        model.generate(vision_states=states.to(model.device), generation_config=settings)
        seconds.append(perf_counter() - start)
    return median(seconds)
