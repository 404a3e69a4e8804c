"""Training, ours and the original's: steps at the published sizes; CIDEr by minutes, embedded."""

import copy
import gc
import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss

from qvision_lab import scenes
from qvision_lab.benchmark.harness import Table, clock, growing_table, identity_of, interleave
from qvision_lab.benchmark.latency import timed_model
from qvision_lab.benchmark.recovery import score_scenes
from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import CaptionDataset, open_dataset
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.training import freezing, gpu
from qvision_lab.training.features import FeatureCache
from qvision_lab.training.samples import CaptionCollator, CaptionSamples
from qvision_lab.training.train import reinitialise
from qvision_lab.training.trainer import has_bfloat16

IMAGES = 8, 64  # per step; a CPU takes the first
CAPTIONS = {"original": 1, "ours": 5}  # per image
PRECISIONS = ("float32", "tf32", "bfloat16")  # the last by autocast; a CPU has no tf32
ROUNDS = 10
LENGTH = 20  # tokens to which the original pads and cuts
MINUTES, PARTS = 15, 10  # of training by each method on Scenes, scored after each part
SCENES, SCORED = 6_000, 500  # trained on, and scored
COCO_LENGTH = 14.5, 3.0  # mean and deviation of its captions' tokens, <START>, space and <END> too


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Compare training steps in the same precisions, with random weights; then learning curves.

    The original encodes pixels with CLIP at each step, one caption per image, padded to 20 tokens.
    Ours takes CLIP's states as a cache holds them, five captions per image; to fill the cache is
    timed apart. In both AdamW trains what the published run trained. On a GPU ours is captured in
    graphs, and its frozen matrices are in bfloat16 where it computes in that.

    Then each method trains the captioner on JPEG files of Scenes for 15 minutes, from a Q-Former
    and bridge with random weights, in turn, so that `--limit` shortens both. The minutes include
    filling the cache; to draw and score counts for neither.
    """
    model = timed_model(captioner, quick)
    rows = (_on_gpu if model.device.type == "cuda" else _on_cpu)(model, quick)
    settings = {"captions": CAPTIONS, "policy": "published", "coco_length": COCO_LENGTH}
    yield from growing_table("training", rows, quick=quick, settings=settings)
    number, minutes, parts = (24, 0.1, 2) if quick else (SCENES, MINUTES, PARTS)
    with TemporaryDirectory() as folder:
        data = {"train": open_dataset(scenes.write_coco(Path(folder, "scenes"), number, seed=7))}
        data["test"] = open_dataset("scenes:test", n=6 if quick else SCORED)
        ends = [60 * minutes * part / parts for part in range(1, parts + 1)]
        curves = (learn(way, captioner, data, Path(folder), ends) for way in CAPTIONS)
        about = {"quick": quick, "identity": identity_of(captioner, **data)}
        about["settings"] = {"captions": CAPTIONS, "images": IMAGES[0]}
        rows = chain.from_iterable(zip(*curves, strict=True))
        yield from growing_table("learning", rows, **about)


def learn(
    way: str, captioner: Captioner, data: dict[str, CaptionDataset], folder: Path, ends: list[float]
) -> Iterator[dict]:
    """Scores of a copy of the captioner after so many seconds of training by one method."""
    model, processor = copy.deepcopy(captioner.model), captioner.processor
    features, spent, images = None, 0.0, 0
    reinitialise(model, ("qformer", "decoder.bridge"), seed=0)
    learner, start = Learner(way, model), clock()
    if way == "ours":
        features = FeatureCache(folder, model, "bfloat16").encode(data["train"], model, processor)
        spent = clock() - start
    samples = CaptionSamples(data["train"], processor, CAPTIONS[way], LENGTH, 0, features)
    collate = CaptionCollator(model.config.pad_token_id, packed=learner.captured is not None)
    loader = DataLoader(samples, IMAGES[0], shuffle=True, collate_fn=collate)
    batches = (batch for samples.epoch in count() for batch in loader)  # without end
    for end in ends:
        model.train()
        while spent < end:
            start = clock()
            batch = {name: values.to(model.device) for name, values in next(batches).items()}
            learner.step(batch, "float32")
            spent, images = spent + clock() - start, images + IMAGES[0]
        scores = score_scenes(Captioner(model, processor), data["test"])
        row = {"way": way, "minutes": spent / 60, "images": images, **scores}
        yield row | {"captions": images * CAPTIONS[way]}


def _on_cpu(model: QVisionForConditionalGeneration, quick: bool) -> Iterator[dict]:
    learners = {way: Learner(way, copy.deepcopy(model)) for way in CAPTIONS}
    steps = {"fill": partial(learners["ours"].fill, random_batch("original", model.config))}
    precisions = ("float32", "bfloat16") if has_bfloat16() else ("float32",)
    for precision, way in product(precisions, CAPTIONS):
        steps[way, precision] = lambda by=learners[way], precision=precision: by.step(
            random_batch(by.way, model.config), precision
        )
    seconds = interleave(steps, ROUNDS, quick)
    fill = seconds.pop("fill")
    yield from (_row(*key, IMAGES[0], samples, fill) for key, samples in seconds.items())


def _on_gpu(model: QVisionForConditionalGeneration, quick: bool) -> Iterator[dict]:
    for way in CAPTIONS:
        learner = Learner(way, copy.deepcopy(model))
        for images, precision in product(IMAGES, PRECISIONS):
            yield _time_steps(learner, images, precision, quick)
        if way == "ours":
            with gpu.compiled_blocks(learner.model):
                learner.captured = gpu.CapturedLoss(learner.model)
                yield _time_steps(learner, IMAGES[-1], "bfloat16", quick, compiled=True)
        del learner
        gc.collect()


def _row(
    way: str, precision: str, images: int, seconds: list[float], fill: list[float], **more: float
) -> dict:
    rate = images * len(seconds) / sum(seconds)
    row = {"way": way, "precision": precision, "images": images, "images_per_second": rate}
    row["captions_per_second"] = rate * CAPTIONS[way.partition(",")[0]]
    row["seconds"] = seconds  # per step of so many images
    row["fill_seconds"] = None if way == "original" else fill  # to encode as many for the cache
    return row | more


def _time_steps(
    learner: "Learner", images: int, precision: str, quick: bool, compiled: bool = False
) -> dict:
    """Measure steps of one kind on a GPU."""
    model, way = learner.model, learner.way
    batch = random_batch(way, model.config, images, packed=learner.captured is not None)
    batch = {name: values.to(model.device) for name, values in batch.items()}
    holds = (way, precision) == ("ours", "bfloat16")
    frozen = gpu.frozen_matrices(model) if holds else []
    with gpu.holding(frozen, [weight.data.bfloat16() for weight in frozen]):
        step, start = partial(learner.step, batch, precision), clock()
        step()
        first = clock() - start
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = interleave({"step": step}, ROUNDS, quick)["step"]
    more = {"peak_gigabytes": torch.cuda.max_memory_reserved() / 1e9}  # graphs keep what it frees
    more |= {"compile_seconds": first} if compiled else {}
    fill = partial(learner.fill, random_batch("original", model.config, images))
    fills = interleave({"fill": fill}, ROUNDS, quick)["fill"]
    return _row(f"{way}, compiled" if compiled else way, precision, images, seconds, fills, **more)


class Learner:
    """A captioner that one method trains as the published run was trained."""

    def __init__(self, way: str, model: QVisionForConditionalGeneration):
        self.way, self.model = way, model.train()
        freezing.apply(model, "published")
        if way == "original":
            for block in model.decoder.language_model.h:
                block.mlp.act = NewGELUActivation()  # ours is the same in one kernel
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, fused=True)
        captures = way == "ours" and model.device.type == "cuda"
        self.captured = gpu.CapturedLoss(model) if captures else None

    def step(self, batch: dict[str, Tensor], precision: str) -> None:
        model, bf16 = self.model, precision == "bfloat16"
        self.optimizer.zero_grad()
        with nullcontext() if precision == "float32" else gpu.tf32_products():
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                if self.way == "original":  # the loss of the logits of all positions, padding too
                    logits = model(**batch | {"labels": None}).logits
                    loss = ForCausalLMLoss(logits, batch["labels"], model.config.vocab_size)
                else:
                    loss = self.captured(**batch) if self.captured else model(**batch).loss
            loss.backward()
        clip_grad_norm_(self.trained, 5.0)
        self.optimizer.step()

    @torch.no_grad()
    def fill(self, batch: dict[str, Tensor]) -> Tensor:
        """Encode images as for the cache, which computes in float32 and holds bfloat16."""
        pixels = batch["pixel_values"].to(self.model.device)
        return self.model.vision.encode(pixels).bfloat16().cpu()


def random_batch(
    way: str, config: QVisionConfig, images: int = IMAGES[0], packed: bool = False
) -> dict[str, Tensor]:
    """Random images with random captions as long as COCO's, in the form that a method takes."""
    lengths = torch.normal(*COCO_LENGTH, (images, CAPTIONS[way])).round().clamp(9, 40).int()
    words = partial(torch.randint, 3, config.vocab_size - 3)  # without special tokens
    vision = config.vision_config
    if way == "ours":
        patches = math.prod(config.patch_grid)
        states = torch.randn(images, patches, vision.hidden_size).bfloat16()  # [B,P,C]
        pairs = zip(states, lengths.tolist(), strict=True)
        samples = [{"vision_states": s, "captions": [words((n,)) for n in few]} for s, few in pairs]
        return CaptionCollator(config.pad_token_id, packed)(samples)
    ids = words((images, LENGTH)).where(torch.arange(LENGTH) < lengths, config.pad_token_id)
    return {
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size),
        "input_ids": ids,
        "attention_mask": (ids != config.pad_token_id).long(),
        "labels": ids.masked_fill(ids == config.pad_token_id, IGNORED_LABEL),
    }
