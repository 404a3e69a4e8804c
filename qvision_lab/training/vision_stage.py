"""Stage one: a vision tower learns to see, before there are any words.

The published model takes its eyes from CLIP, which needed 400 million captioned pictures. Ours
learns from the truth that Scenes knows about every picture: what each patch shows, in which
colour, how far the object around it reaches, and how many of its kind there are. This stands in
for CLIP's pre-training; it means that where the captioner looks did not emerge from captions
alone. Told by `pictures` instead of by `patches`, the tower learns only what is in a picture and
never where: the control for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qvision_lab import scenes
from qvision_lab.scenes.layout import BACKGROUNDS, CATEGORIES, COLORS, PICTURE, SKIES
from qvision_lab.training.trainer import run_stage

SHOWN, GLIMPSED = 0.12, 0.02  # shares of a patch from which an object counts, or leaves doubt
SKY = (None, *SKIES)
MOST = 6  # and more of one kind are one number
TOLD = ("patches", "pictures")  # what the truth is told of


def sight_type(grid: int) -> np.dtype:
    """One drawn picture and what each of its `grid` x `grid` patches shows, as it lies on disk."""
    patches = grid * grid
    return np.dtype(
        [
            ("pixels", "u1", (PICTURE, PICTURE, 3)),
            ("category", "i1", (patches,)),  # of the object that covers most of the patch, from 1
            ("color", "i1", (patches,)),
            ("coverage", "f2", (patches,)),  # share of the patch that this object covers
            ("box", "f2", (patches, 4)),  # its centre (x, y), width and height in patches
            ("center", "?", (patches,)),  # whether an object's centre lies in the patch
            ("number", "i1", (patches,)),  # of objects of this one's kind in the picture, from 0
            ("background", "i1"),
            ("sky", "i1"),
        ]
    )


def sight(scene: scenes.Scene, grid: int) -> np.void:
    """The record of one scene: see `sight_type`."""
    record = np.zeros((), sight_type(grid))
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


def filled_once(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], rows: Iterable[np.ndarray]
) -> np.ndarray:
    """An array that one process fills with what `rows` gives, once; kept in a file, held in memory.

    Raises:
        ValueError: the file holds another array.
    """
    with PartialState().main_process_first():
        if not path.exists():
            array = np.empty(shape, dtype)
            for i, row in enumerate(tqdm(rows, path.stem, total=len(array), unit="picture")):
                array[i] = row
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, array)
            partial.replace(path)
            del array  # or it would be held twice
    array = np.load(path)
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{path} holds {len(array)} pictures of another recipe; delete it or choose another "
            "output folder."
        )
    return array


def normalise(pixels: Num[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Pixels 0..255 as CLIP wants them; equal to the processor's `training` preset at 224 x 224."""
    mean = torch.tensor(OPENAI_CLIP_MEAN) * 255
    std = torch.tensor(OPENAI_CLIP_STD) * 255
    return ((torch.from_numpy(pixels) - mean) / std).permute(0, 3, 1, 2).contiguous()


class Sights(Dataset):
    """Records as training batches; the second half of the set is the first, mirrored."""

    def __init__(self, records: np.ndarray, grid: int):
        self.records = records
        self.grid = grid

    def __len__(self) -> int:
        return 2 * len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self.records[index % len(self.records)]
        sample = {name: np.array(record[name]) for name in record.dtype.names}
        if index >= len(self.records):
            sample["pixels"] = sample["pixels"][:, ::-1]
            for name in ("category", "color", "coverage", "box", "center", "number"):
                by_row = sample[name].reshape(self.grid, self.grid, -1)
                sample[name] = by_row[:, ::-1].reshape(sample[name].shape)
            sample["box"][:, 0] = self.grid - sample["box"][:, 0]
        return sample


def collate(samples: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack samples; pixels become normalised `pixel_values`, everything else tensors."""
    batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    pixel_values = normalise(batch.pop("pixels"))
    kinds = {name: "f4" if value.dtype.kind == "f" else "i8" for name, value in batch.items()}
    truth = {name: torch.from_numpy(batch[name].astype(kind)) for name, kind in kinds.items()}
    return {"pixel_values": pixel_values, **truth}


class PatchEmbedding(nn.Conv2d):
    """CLIP's convolution as the matrix product that it is: its gradient took 41% of a step."""

    def __init__(self, width: int, side: int):
        super().__init__(3, width, kernel_size=side, stride=side, bias=False)

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C rows columns"]:
        side = self.kernel_size[0]
        patches = pixel_values.unfold(2, side, side).unfold(3, side, side)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # [B,rows,columns,3*side*side]
        return F.linear(patches, self.weight.flatten(1)).permute(0, 3, 1, 2)


class SeeingModel(nn.Module):
    """A vision tower with heads that name what each patch shows; only the tower is kept."""

    def __init__(self, config: CLIPVisionConfig, told: str = "patches"):
        if told not in TOLD:
            raise ValueError(f"a tower is told by one of {', '.join(TOLD)}, not by {told!r}.")
        super().__init__()
        self.told = told
        self.tower = CLIPVisionModel(config)
        if not torch.cuda.is_available():  # the CPU's fused kernel: see `MultiHeadAttention`
            self.tower.set_attn_implementation("eager")
        self.tower.post_layernorm.requires_grad_(False)  # behind the states that QVision reads
        width = config.hidden_size
        grid = config.image_size // config.patch_size
        with torch.no_grad():
            embeddings = self.tower.embeddings
            embeddings.patch_embedding = PatchEmbedding(width, config.patch_size)
            embeddings.patch_embedding.weight.copy_(low_frequencies(width, config.patch_size))
            embeddings.position_embedding.weight[1:].copy_(0.5 * sine_cosine(grid, width))
        # Objects as points (Zhou et al. 2019, arXiv:1904.07850): each patch says what its object
        # is, where in the picture it is centred, how large it is, whether its centre is here, and
        # how many of its kind there are. Attention takes means, and the Q-Former has no positions
        # of its own: what the captions need of numbers, left and right has to be in the states.
        self.sizes = (len(CATEGORIES) + 1, len(COLORS), 4, 1, MOST)
        self.patch_heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))
        self.scene_heads = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, len(BACKGROUNDS) + len(SKY))
        )
        self.middle = grid / 2

    def predict(self, pixel_values: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """Scores of category, colour, box, centre and number by patch; of background and sky."""
        states = self.tower(pixel_values).last_hidden_state[:, 1:]  # [B,P,C]
        patches = self.patch_heads(states).float().split(self.sizes, -1)
        scene = self.scene_heads(states.mean(1)).float()
        return *patches, *scene.split((len(BACKGROUNDS), len(SKY)), -1)

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"], **truth: Tensor) -> dict[str, Tensor]:
        """The weighted sum of all losses."""
        category, color, box, center, number, background, sky = self.predict(pixel_values)
        shown = (truth["coverage"] > SHOWN) | (
            (truth["center"] > 0) & (truth["coverage"] > GLIMPSED)
        )
        if self.told == "patches":
            loss = self._patch_loss(category, color, box, center, number, shown, truth)
        else:
            loss = picture_loss(category, color, shown, truth)
        loss = loss + 0.1 * F.cross_entropy(background, truth["background"])
        return {"loss": loss + 0.1 * F.cross_entropy(sky, truth["sky"])}

    def _patch_loss(
        self,
        category: Float[Tensor, "B P categories"],
        color: Float[Tensor, "B P colors"],
        box: Float[Tensor, "B P 4"],
        center: Float[Tensor, "B P 1"],
        number: Float[Tensor, "B P numbers"],
        shown: Bool[Tensor, "B P"],
        truth: dict[str, Tensor],
    ) -> Float[Tensor, ""]:
        in_doubt = (truth["coverage"] > GLIMPSED) & ~shown
        weight = torch.where(shown, 1.0, torch.where(in_doubt, 0.0, 0.3))
        target = truth["category"].where(shown, 0)
        category_loss = F.cross_entropy(category.transpose(1, 2), target, reduction="none")
        center_xy, extent = truth["box"].split(2, -1)
        target_box = torch.cat([center_xy - self.middle, (extent / 1.5).log()], -1)
        return (
            (category_loss * weight).sum() / weight.sum()
            + 0.7 * F.cross_entropy(color[shown], truth["color"][shown])
            + 0.5 * F.cross_entropy(number[shown], truth["number"][shown])
            + 0.5 * F.smooth_l1_loss(box[shown], target_box[shown], beta=0.2)
            + 0.5
            * F.binary_cross_entropy_with_logits(
                center.squeeze(-1), truth["center"].float(), pos_weight=center.new_tensor(3.0)
            )
        )


def picture_loss(
    category: Float[Tensor, "B P categories"],
    color: Float[Tensor, "B P colors"],
    shown: Bool[Tensor, "B P"],
    truth: dict[str, Tensor],
) -> Float[Tensor, ""]:
    """How surprising the coloured things of each picture are, told without their places.

    A thing is in a picture if any patch shows it (noisy-or, as Fang et al. 2015, arXiv:1411.4952,
    learned words from captions), so that every order of the same patches has the same loss.
    """
    things = category.softmax(-1)[..., 1:, None] * color.softmax(-1)[..., None, :]  # [B,P,K,C]
    absent = torch.log1p(-things.clamp(max=1 - 1e-5)).sum(1)  # log-probability: in no patch
    named = F.one_hot(truth["category"], category.shape[-1])[..., 1:, None]
    named = named * F.one_hot(truth["color"], color.shape[-1])[..., None, :]  # [B,P,K,C]
    present = (named * shown[..., None, None]).amax(1) > 0
    surprise = -torch.where(present, torch.log(-torch.expm1(absent.clamp(max=-1e-6))), absent)
    return surprise.sum((1, 2)).mean()


def low_frequencies(width: int, patch: int) -> Float[Tensor, "width 3 patch patch"]:
    """Patch filters to start from: the slowest cosines, brightness before colour, whitened.

    Natural and drawn pictures alike hold less the finer one looks (about 1 / frequency); dividing
    by that makes all filters equally loud.
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
    return torch.stack(
        [
            torch.einsum("c,y,x->cyx", opponents[channel], cosines[u], cosines[v])
            * (math.hypot(u + 1, v + 1) / patch)
            for _, channel, u, v in order[:width]
        ]
    )


def sine_cosine(grid: int, width: int) -> Float[Tensor, "patches width"]:
    """Positions to start from: sines and cosines of column and row (Vaswani et al. 2017)."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 50.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def measure_sight(model: SeeingModel, sights: Sights, batch_size: int = 100) -> dict[str, float]:
    """Shares of what is right on unmirrored pictures, 0 to 1.

    `category`, `color`, `number`: of patches that show an object. `background`, `sky`: of pictures.
    `picture`: of pictures in which all those patches are right in category and colour.
    """
    hits = {name: [] for name in ("category", "color", "number", "background", "sky", "picture")}
    for start in range(0, len(sights.records), batch_size):
        stop = min(start + batch_size, len(sights.records))
        batch = collate([sights[i] for i in range(start, stop)])
        category, color, _, _, number, background, sky = model.predict(batch["pixel_values"])
        shown = batch["coverage"] > SHOWN
        category_right = category.argmax(-1) == batch["category"]
        color_right = color.argmax(-1) == batch["color"]
        hits["category"].append(category_right[shown])
        hits["color"].append(color_right[shown])
        hits["number"].append((number.argmax(-1) == batch["number"])[shown])
        hits["background"].append(background.argmax(-1) == batch["background"])
        hits["sky"].append(sky.argmax(-1) == batch["sky"])
        hits["picture"].append((~shown | (category_right & color_right)).all(1))
    return {name: torch.cat(parts).float().mean().item() for name, parts in hits.items()}


def learn_to_see(config: CLIPVisionConfig, stage: dict, seed: int, folder: Path) -> CLIPVisionModel:
    """Run the stage, or take it up where it stopped; returns the trained tower."""
    grid = config.image_size // config.patch_size
    folder.mkdir(parents=True, exist_ok=True)

    def drawn(split: str, n: int, seed: int) -> Sights:
        pictures = scenes.generate(n, split=split, seed=seed, workers=stage["workers"])
        sights = (sight(scene, grid) for scene in pictures)
        path = folder / f"{split}-{seed}-{n}.npy"
        return Sights(filled_once(path, sight_type(grid), (n,), sights), grid)

    pictures = [drawn(part["split"], part["n"], part["seed"]) for part in stage["pictures"]]
    held_out = drawn("val", stage["held_out"], 0)
    torch.manual_seed(seed)
    model = SeeingModel(config, stage["told"])
    run_stage(
        model,
        stage,
        seed,
        folder,
        measure=lambda model: measure_sight(model, held_out),
        data_collator=collate,
        dataset=ConcatDataset(pictures),
    )
    return model.tower.eval()
