"""Scenes as a folder in COCO's format, which any captioning code reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from qvision_lab.data.atomic import write_atomic
from qvision_lab.scenes.drawing import DrawnObject, generate
from qvision_lab.scenes.layout import CATEGORIES, PICTURE


def write_coco(
    folder: str | Path, n: int, *, split: str = "train", seed: int = 0, workers: int = 0
) -> Path:
    """Write n scenes as `images/*.jpg`, `captions.json` and `instances.json`; return the folder.

    Pictures that are there already stay as they are, so an interrupted call goes on and a larger
    n extends the folder. An image's `split`, `seed` and `index` give back its whole truth through
    `layout`; annotations' ids count from 1, ten to a picture.

    Raises:
        ValueError: the folder already holds other pictures, such as those of another split.
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
    for scene in tqdm(drawn, "drawing scenes", total=n, unit="picture"):
        name = {"split": split, "seed": seed, "index": scene.index}
        path = folder / "images" / "{split}_{seed}_{index:06d}.jpg".format(**name)
        if not path.exists():
            partial = path.with_suffix(".partial")
            scene.image.save(partial, "jpeg", quality=95, subsampling=0)
            partial.replace(path)
        file = {"id": scene.index, "file_name": path.name, "width": PICTURE, "height": PICTURE}
        images.append(file | name)
        for i, caption in enumerate(scene.captions, start=10 * scene.index + 1):
            captions.append({"id": i, "image_id": scene.index, "caption": caption})
        for i, thing in enumerate(scene.objects, start=10 * scene.index + 1):
            instances.append({"id": i, "image_id": scene.index} | _instance(thing))
    info = {"description": "Scenes, a drawn world", "split": split, "seed": seed}
    known = {"info": info, "licenses": [], "images": images}
    categories = [
        {"id": category.coco_id, "name": category.name, "supercategory": category.zone}
        for category in CATEGORIES.values()
    ]
    told = known | {"annotations": captions}
    there = known | {"annotations": instances, "categories": categories}
    write_atomic(folder / "captions.json", json.dumps(told))
    write_atomic(folder / "instances.json", json.dumps(there))
    return folder


def _instance(thing: DrawnObject) -> dict:
    shape = rle.encode(np.asfortranarray(thing.mask, dtype=np.uint8))
    return {
        "category_id": CATEGORIES[thing.category].coco_id,
        "bbox": thing.box,
        "area": int(thing.mask.sum()),
        "segmentation": shape | {"counts": shape["counts"].decode("ascii")},
        "iscrowd": 0,
        "color": thing.color,
        "size": thing.size,
    }
