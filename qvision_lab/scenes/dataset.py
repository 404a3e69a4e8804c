"""Scenes as a data set: captioned drawings with their judge, or a folder in COCO's format."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from qvision_lab.data.atomic import atomic, write_atomic
from qvision_lab.data.coco import CaptionDataset, CaptionedImage, ImageId, check_split
from qvision_lab.evaluation.chair import Vocabulary
from qvision_lab.scenes.captions import caption_scene
from qvision_lab.scenes.checker import NOUNS, RATES, Rate, check, score
from qvision_lab.scenes.drawing import draw, generate
from qvision_lab.scenes.layout import CATEGORIES, PICTURE, Layout, layout


@dataclass(frozen=True)
class SceneDrawing:
    """A scene that is drawn when asked; see `data.coco.CaptionedImage`."""

    layout: Layout

    @property
    def name(self) -> str:
        truth = self.layout
        return f"scenes/{truth.split}/{truth.seed}/{truth.index}/{drawing_version()}"

    def draw(self) -> Image.Image:
        """RGB, 224 x 224."""
        return draw(self.layout).image


@cache
def drawing_version() -> str:
    """Digest of the pixels of 32 scenes, which together have every category, place and sky."""
    pixels = b"".join(scene.image.tobytes() for scene in generate(32, split="crowd"))
    return sha256(pixels).hexdigest()[:8]


@dataclass(frozen=True)
class SceneJudge:
    """The truth of scenes, as evaluation asks for it; see `evaluation.metrics.Judge`."""

    truths: Mapping[ImageId, Layout]
    name = "scenes"
    rates = tuple(RATES)
    vocabulary = Vocabulary(NOUNS)  # categories by their noun and plural

    def count(self, image_id: ImageId, caption: str) -> list[Rate]:
        """Hits and total of each rate, as `scenes.score` counts them."""
        return [*score([check(caption, self.truths[image_id])]).values()]


def open_scenes(source: str, split: str | None, n: int | None, seed: int) -> CaptionDataset:
    """The first `n` (at least 1) scenes of "scenes:SPLIT", for `data.coco.open_dataset`."""
    named = source.partition(":")[2]
    check_split(source, split, [named])
    if n is None or n < 1:
        raise ValueError(f"{source} has no end: ask for n of at least 1, not {n}")
    truths = {index: layout(named, seed, index) for index in range(n)}
    images = []
    for index, truth in truths.items():
        boxes = tuple((thing.category, thing.box) for thing in truth.objects)
        drawing = SceneDrawing(truth)
        images.append(CaptionedImage(index, None, caption_scene(truth), boxes, drawing))
    name = f"{source}, the first {n:,} (seed {seed})"
    return CaptionDataset(name, tuple(images), SceneJudge(truths))


def write_coco(
    folder: str | Path, n: int, *, split: str = "train", seed: int = 0, workers: int = 0
) -> Path:
    """Write n scenes as `images/*.jpg`, `captions.json` and `instances.json`; return the folder.

    Existing images are kept, so an interrupted call resumes and a larger n extends the folder.
    `open_dataset` restores drawings and judge. Ids of annotations count from 1, ten an image.
    ValueError if the folder already holds other images, such as those of another split.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for path in (folder / "images").glob("*.jpg"):
        if not path.name.startswith(f"{split}_{seed}_"):
            raise ValueError(
                f"{folder} holds {path.name}, which is not of split {split!r} with seed {seed}: "
                "choose another folder"
            )
    images, captions, instances = [], [], []
    drawn = generate(n, split=split, seed=seed, workers=workers)
    for scene in tqdm(drawn, "drawing scenes", total=n, unit="image"):
        path = folder / "images" / f"{split}_{seed}_{scene.index:06d}.jpg"
        if not path.exists():
            with atomic(path) as partial:
                scene.image.save(partial, "jpeg", quality=95, subsampling=0)
        record = {"id": scene.index, "file_name": path.name, "width": PICTURE, "height": PICTURE}
        images.append(record | {"split": split, "seed": seed, "index": scene.index})
        rows = [{"id": 10 * scene.index + i, "image_id": scene.index} for i in range(1, 11)]
        captions += [r | {"caption": c} for r, c in zip(rows, scene.captions, strict=False)]
        for row, thing, mask in zip(rows, scene.objects, scene.masks, strict=False):
            shape = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            row |= {"category_id": CATEGORIES[thing.category].coco_id, "bbox": thing.box}
            row |= {"area": int(mask.sum()), "iscrowd": 0}
            row |= {"segmentation": shape | {"counts": shape["counts"].decode("ascii")}}
            instances.append(row | {"color": thing.color, "size": thing.size})
    drawn_by = {"source": f"scenes:{split}", "seed": seed}  # what `open_dataset` restores
    info = {"description": "Scenes, a drawn world", "drawn": drawn_by}
    content = {"info": info, "licenses": [], "images": images}
    write_atomic(folder / "captions.json", json.dumps(content | {"annotations": captions}))
    kinds = CATEGORIES.values()
    categories = [{"id": c.coco_id, "name": c.name, "supercategory": c.zone} for c in kinds]
    content |= {"annotations": instances, "categories": categories}
    write_atomic(folder / "instances.json", json.dumps(content))
    return folder
