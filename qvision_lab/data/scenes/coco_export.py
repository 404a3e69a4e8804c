"""Scenes as a folder in COCO's format, which any captioning code reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from qvision_lab.data.scenes.generating import Scene, generate
from qvision_lab.data.scenes.world import CATEGORIES


def write_coco(
    folder: str | Path, n: int, *, split: str = "train", seed: int = 0, workers: int = 0
) -> Path:
    """Write n scenes as `images/*.jpg`, `captions.json` and `instances.json`; return the folder.

    What was drawn before is kept, so an interrupted call goes on and a larger n extends the
    folder: `scenes.jsonl` has a line for every finished picture. An image's `split`, `seed` and
    `index` give back its whole truth through `layout`.

    Raises:
        ValueError: the folder already holds another split or seed.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = list(_finished(folder))
    for record in records[:1]:
        held = record["image"]["split"], record["image"]["seed"]
        if held != (split, seed):
            raise ValueError(
                f"{folder} holds split {held[0]!r} with seed {held[1]}, not {split!r} with "
                f"{seed}: choose another folder"
            )
    _replace(folder / "scenes.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    with open(folder / "scenes.jsonl", "a", encoding="utf-8") as log:
        missing = max(n - len(records), 0)
        drawn = generate(missing, split=split, seed=seed, start=len(records), workers=workers)
        for scene in tqdm(drawn, "drawing scenes", total=missing, unit="picture"):
            record = _record(scene)
            path = folder / "images" / record["image"]["file_name"]
            partial = path.with_suffix(".partial")
            scene.image.save(partial, "jpeg", quality=95, subsampling=0)
            os.replace(partial, path)
            log.write(json.dumps(record) + "\n")
            log.flush()
            records.append(record)
    images = [record["image"] for record in records[:n]]
    for name in ("captions", "instances"):
        coco = {
            "info": {"description": "Scenes, a drawn world", "split": split, "seed": seed},
            "licenses": [],
            "images": images,
            "annotations": [row for record in records[:n] for row in record[name]],
        }
        if name == "instances":
            coco["categories"] = [
                {"id": category.coco_id, "name": category.name, "supercategory": category.zone}
                for category in CATEGORIES.values()
            ]
        _replace(folder / f"{name}.json", json.dumps(coco))
    return folder


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _finished(folder: Path) -> Iterator[dict]:
    """The records of pictures that are there, up to the first that was torn or is missing."""
    log = folder / "scenes.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if not (folder / "images" / record["image"]["file_name"]).exists():
            return
        yield record


def _record(scene: Scene) -> dict:
    """What COCO says of one picture; its annotations' ids count from 1, ten to a picture."""
    split, seed, index = scene.layout.split, scene.layout.seed, scene.layout.index
    image = {
        "id": index,
        "file_name": f"{split}_{index:06d}.jpg",
        "width": scene.image.width,
        "height": scene.image.height,
        "split": split,
        "seed": seed,
        "index": index,
    }
    instances = []
    for i, thing in enumerate(scene.objects):
        shape = rle.encode(np.asfortranarray(thing.mask, dtype=np.uint8))
        shape["counts"] = shape["counts"].decode("ascii")
        instances.append(
            {
                "id": 10 * index + i + 1,
                "image_id": index,
                "category_id": CATEGORIES[thing.category].coco_id,
                "bbox": list(thing.box),
                "area": int(thing.mask.sum()),
                "segmentation": shape,
                "iscrowd": 0,
                "color": thing.color,
                "size": thing.size,
            }
        )
    captions = [
        {"id": 10 * index + i + 1, "image_id": index, "caption": caption}
        for i, caption in enumerate(scene.captions)
    ]
    return {"image": image, "instances": instances, "captions": captions}
