"""The stage before the captioner's: a vision tower learns from the truth of Scenes, without words.

This stands in for CLIP's pre-training on 400 million captioned images, and means that where the
captioner attends did not emerge from captions alone. The control for that is the granularity of
supervision `images` instead of `patches`: what is in an image, not where.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qvision_lab import scenes
from qvision_lab.data.atomic import atomic
from qvision_lab.scenes.captions import caption_scene
from qvision_lab.scenes.layout import BACKGROUNDS, CATEGORIES, COLORS, PICTURE, SKIES
from qvision_lab.training.new_model import new_config, save_new_model
from qvision_lab.training.recipe import Tower, TowerData
from qvision_lab.training.trainer import train_stage

VISIBLE, UNCERTAIN = 0.12, 0.02  # covered shares of a patch: an object counts, or is ignored
SKY = (None, *SKIES)
MOST = 6  # larger numbers of one kind are one class
# Objects as points (Zhou et al. 2019, arXiv:1904.07850): each patch predicts its object's category,
# color, centre and size, whether the centre is here, and how many of its kind there are. Attention
# averages, and the Q-Former has no positions of its own: what captions need of numbers, left and
# right has to be in the states.
PATCH_HEADS = {
    "category": 1 + len(CATEGORIES),  # logits of each head
    "color": len(COLORS),
    "box": 4,
    "center": 1,
    "number": MOST,
}
SCENE_HEADS = {"background": len(BACKGROUNDS), "sky": len(SKY)}


def train_tower(settings: Tower, seed: int, folder: Path) -> Path:
    """Train or resume a tower; returns a checkpoint's folder, with random weights elsewhere."""
    dest = folder / "checkpoint"
    if (dest / "config.json").exists():
        return dest
    folder.mkdir(parents=True, exist_ok=True)
    layouts = (scenes.layout("train", 0, i) for i in range(settings.vocab_scenes))
    captions = (caption for layout in layouts for caption in caption_scene(layout))
    config, tokenizer = new_config(settings, captions)
    grid = config.patch_grid[0]
    *train, held_out = (
        TowerSamples(draw_records(part, grid, folder, settings.drawing_workers), grid)
        for part in (*settings.data, TowerData(split="val", n=settings.held_out))
    )
    set_seed(seed)
    learner = TowerLearner(config.vision_config, settings.supervision)
    best = train_stage(
        learner,
        settings,
        folder,
        seed,
        settings.steps,
        train_dataset=ConcatDataset(train),
        eval_dataset=Subset(held_out, [0]),  # the measure is of all of them
        data_collator=default_collate,
        measure=partial(measure_tower, learner, held_out),
    )
    if PartialState().is_main_process:
        learner.load_state_dict(load_file(best / "model.safetensors"))
        save_new_model(config, tokenizer, learner.tower.state_dict(), seed, dest)
    PartialState().wait_for_everyone()
    return dest


def record_type(grid: int) -> np.dtype:
    """A drawn image and what each of its `grid` x `grid` patches shows, as stored on disk."""
    patches = grid * grid
    return np.dtype(
        [
            ("pixels", "u1", (PICTURE, PICTURE, 3)),
            ("category", "i1", (patches,)),  # of the object that covers most of the patch, from 1
            ("color", "i1", (patches,)),
            ("coverage", "f2", (patches,)),  # share of the patch that this object covers
            ("box", "f2", (patches, 4)),  # its centre (x, y), width and height in patches
            ("center", "?", (patches,)),  # whether an object's centre is in the patch
            ("number", "i1", (patches,)),  # of objects of this one's kind in the image, from 0
            ("background", "i1"),
            ("sky", "i1"),
        ]
    )


def scene_record(scene: scenes.Scene, grid: int) -> np.void:
    """The record of one scene, of `record_type`."""
    record = np.zeros((), record_type(grid))
    side = PICTURE // grid
    masks = scene.masks.reshape(-1, grid, side, grid, side)
    covered = masks.mean((2, 4)).reshape(len(scene.masks), -1)  # [objects, patches]
    nearest = covered.argmax(0)
    boxes = np.array([(*thing.center, *thing.box[2:]) for thing in scene.objects]) / side
    categories = [1 + list(CATEGORIES).index(thing.category) for thing in scene.objects]
    colors = [list(COLORS).index(thing.color) for thing in scene.objects]
    columns, rows = boxes[:, :2].astype(int).T
    record["pixels"] = np.asarray(scene.image)
    record["category"] = np.array(categories)[nearest]
    record["color"] = np.array(colors)[nearest]
    record["coverage"] = covered.max(0)
    record["box"] = boxes[nearest]
    number = [min(categories.count(category), MOST) - 1 for category in categories]
    record["number"] = np.array(number)[nearest]
    record["center"][rows * grid + columns] = True
    record["background"] = BACKGROUNDS.index(scene.background)
    record["sky"] = SKY.index(scene.sky)
    return record[()]


def draw_records(part: TowerData, grid: int, folder: Path, workers: int) -> np.ndarray:
    """Records of scenes, drawn once by one process, kept in a file and read into memory."""
    path = folder / f"{part.split}-{part.seed}-{part.n}.npy"
    with PartialState().main_process_first():
        if not path.exists():
            records = np.empty(part.n, record_type(grid))
            drawn = scenes.generate(part.n, split=part.split, seed=part.seed, workers=workers)
            for i, scene in enumerate(tqdm(drawn, path.stem, total=part.n, unit="scene")):
                records[i] = scene_record(scene, grid)
            with atomic(path) as partial, partial.open("wb") as file:
                np.save(file, records)
            del records  # or they would be held twice
    return np.load(path)


@dataclass(frozen=True)
class TowerSamples(Dataset):
    """Records as training samples; the second half of the set is the first, mirrored."""

    records: np.ndarray
    grid: int

    def __len__(self) -> int:
        return 2 * len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index % len(self.records)]
        sample = {name: np.array(record[name]) for name in record.dtype.names}
        if index >= len(self.records):
            sample["pixels"] = sample["pixels"][:, ::-1]
            for name in ("coverage", *PATCH_HEADS):
                by_row = sample[name].reshape(self.grid, self.grid, -1)
                sample[name] = by_row[:, ::-1].reshape(sample[name].shape)
            sample["box"][:, 0] = self.grid - sample["box"][:, 0]
        kinds = {"u": "u1", "f": "f4"}  # pixels, shares; classes become int64
        values = {name: x.astype(kinds.get(x.dtype.kind, "i8")) for name, x in sample.items()}
        return {name: torch.from_numpy(value) for name, value in values.items()}


def normalise(pixels: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Pixels as CLIP takes them; equal to the processor's `training` preset at 224 x 224."""
    mean = pixels.new_tensor(OPENAI_CLIP_MEAN, dtype=torch.float) * 255
    std = pixels.new_tensor(OPENAI_CLIP_STD, dtype=torch.float) * 255
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()


class PatchEmbedding(nn.Conv2d):
    """CLIP's convolution as the matrix product that it is: its gradient took 41% of a step."""

    def __init__(self, width: int, side: int):
        super().__init__(3, width, kernel_size=side, stride=side, bias=False)

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C rows columns"]:
        side = self.kernel_size[0]
        patches = pixel_values.unfold(2, side, side).unfold(3, side, side)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # [B,rows,columns,3*side*side]
        return F.linear(patches, self.weight.flatten(1)).permute(0, 3, 1, 2)


class TowerLearner(nn.Module):
    """A vision tower with heads for what each patch shows; only the tower is kept."""

    def __init__(self, config: CLIPVisionConfig, supervision: str = "patches"):
        super().__init__()
        self.supervision = supervision
        self.tower = CLIPVisionModel(config)
        if not torch.cuda.is_available():  # the CPU's fused kernel: see `MultiHeadAttention`
            self.tower.set_attn_implementation("eager")
        self.tower.post_layernorm.requires_grad_(False)  # after the states that QVision reads
        width, grid = config.hidden_size, config.image_size // config.patch_size
        with torch.no_grad():
            embeddings = self.tower.embeddings
            embeddings.patch_embedding = PatchEmbedding(width, config.patch_size)
            embeddings.patch_embedding.weight.copy_(low_frequencies(width, config.patch_size))
            embeddings.position_embedding.weight[1:].copy_(0.5 * sine_cosine(grid, width))
        self.patch_heads, self.scene_heads = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(heads.values())))
            for heads in (PATCH_HEADS, SCENE_HEADS)
        )

    def predict(self, pixels: UInt8[Tensor, "B H W 3"]) -> dict[str, Tensor]:
        """Logits of each head: [B,P,K] by patch, [B,K] of background and sky."""
        states = self.tower(normalise(pixels)).last_hidden_state[:, 1:]  # [B,P,C]
        patches = self.patch_heads(states).float().split([*PATCH_HEADS.values()], -1)
        scene = self.scene_heads(states.mean(1)).float().split([*SCENE_HEADS.values()], -1)
        return dict(zip((*PATCH_HEADS, *SCENE_HEADS), (*patches, *scene), strict=True))

    def forward(self, pixels: UInt8[Tensor, "B H W 3"], **truth: Tensor) -> dict[str, Tensor]:
        """The weighted sum of all losses."""
        logits = self.predict(pixels)
        covered = truth["coverage"]
        shown = (covered > VISIBLE) | ((truth["center"] > 0) & (covered > UNCERTAIN))
        measure = patch_loss if self.supervision == "patches" else image_loss
        loss = measure(logits, shown, truth)
        for name in SCENE_HEADS:
            loss = loss + 0.1 * F.cross_entropy(logits[name], truth[name])
        return {"loss": loss}


def patch_loss(
    logits: dict[str, Tensor], shown: Bool[Tensor, "B P"], truth: dict[str, Tensor]
) -> Float[Tensor, ""]:
    """Of the patches that show an object; the others are background, or ignored in doubt."""
    uncertain = (truth["coverage"] > UNCERTAIN) & ~shown
    weight = torch.where(shown, 1.0, torch.where(uncertain, 0.0, 0.3))
    categories = logits["category"].transpose(1, 2), truth["category"].where(shown, 0)
    category = F.cross_entropy(*categories, reduction="none")
    (center, extent), middle = truth["box"].split(2, -1), shown.shape[1] ** 0.5 / 2
    box = torch.cat([center - middle, (extent / 1.5).log()], -1)
    is_center = F.binary_cross_entropy_with_logits(
        logits["center"].squeeze(-1), truth["center"].float(), pos_weight=box.new_tensor(3.0)
    )
    return (
        (category * weight).sum() / weight.sum()
        + 0.7 * F.cross_entropy(logits["color"][shown], truth["color"][shown])
        + 0.5 * F.cross_entropy(logits["number"][shown], truth["number"][shown])
        + 0.5 * F.smooth_l1_loss(logits["box"][shown], box[shown], beta=0.2)
        + 0.5 * is_center
    )


def image_loss(
    logits: dict[str, Tensor], shown: Bool[Tensor, "B P"], truth: dict[str, Tensor]
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the colored objects of each image, whatever their places.

    An object is in an image if any patch shows it: noisy-or (Fang et al. 2015, arXiv:1411.4952).
    """
    category, color = logits["category"], logits["color"]
    things = category.softmax(-1)[..., 1:, None] * color.softmax(-1)[..., None, :]  # [B,P,K,C]
    absent = torch.log1p(-things.clamp(max=1 - 1e-5)).sum(1)  # log-probability: in no patch
    named = F.one_hot(truth["category"], category.shape[-1])[..., 1:, None]
    named = named * F.one_hot(truth["color"], color.shape[-1])[..., None, :]  # [B,P,K,C]
    present = (named * shown[..., None, None]).amax(1) > 0
    loss = -torch.where(present, torch.log(-torch.expm1(absent.clamp(max=-1e-6))), absent)
    return loss.sum((1, 2)).mean()


def low_frequencies(width: int, patch: int) -> Float[Tensor, "width 3 patch patch"]:
    """Initial patch filters: the slowest cosines, brightness before color, whitened.

    Images have less power at higher frequencies (about 1 / frequency), which is divided out.
    """
    steps = torch.arange(patch)
    cosines = torch.stack([torch.cos(math.pi * (steps + 0.5) * k / patch) for k in range(patch)])
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    opponents = torch.tensor([[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]])
    opponents = opponents / opponents.norm(dim=1, keepdim=True)
    order = sorted(
        (math.hypot(u + 0.5, v + 0.5) * (1 if channel == 0 else 2), channel, u, v)
        for channel, u, v in product(range(3), range(patch), range(patch))
    )
    filters = (
        torch.einsum("c,y,x->cyx", opponents[channel], cosines[u], cosines[v])
        * (math.hypot(u + 1, v + 1) / patch)
        for _, channel, u, v in order[:width]
    )
    return torch.stack(list(filters))


def sine_cosine(grid: int, width: int) -> Float[Tensor, "patches width"]:
    """Initial positions: sines and cosines of column and row (Vaswani et al. 2017)."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 50.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def measure_tower(model: TowerLearner, samples: TowerSamples) -> dict[str, float]:
    """Accuracies on unmirrored images, 0 to 1.

    `category`, `color`, `number`: of patches that show an object. `background`, `sky`: of images.
    `image`: of images in which all those patches have the right category and color.
    """
    hits = defaultdict(list)
    unmirrored = Subset(samples, range(len(samples.records)))
    for batch in DataLoader(unmirrored, batch_size=100):
        logits = model.predict(batch["pixels"].to(model.tower.device))
        shown = batch["coverage"] > VISIBLE
        names = "category", "color", "number", *SCENE_HEADS
        right = {name: logits[name].argmax(-1).cpu() == batch[name] for name in names}
        right["image"] = (~shown | (right["category"] & right["color"])).all(1)
        for name, hit in right.items():
            hits[name].append(hit[shown] if hit.ndim == 2 else hit)
    return {name: torch.cat(parts).float().mean().item() for name, parts in hits.items()}
