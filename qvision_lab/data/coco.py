"""Pictures with reference captions, from COCO's files, Karpathy's, plain folders or Scenes."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from json import JSONDecodeError
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from qvision_lab.data.atomic import write_atomic
from qvision_lab.scenes.captions import tell
from qvision_lab.scenes.drawing import draw
from qvision_lab.scenes.layout import Layout, layout

ImageId: TypeAlias = int | str

POOL = 80_000  # images of train2017, of which a random 80% trained the published checkpoint
FILE_COLUMNS = ("file", "file_name", "image")  # what tables call the picture
NAMES = ("captions.csv", "captions.jsonl", "captions.json", "captions_*.json", "dataset_*.json")
SCENE_KEYS = ("split", "seed", "index")  # in the record of an image: a scene's name


@dataclass(frozen=True)
class CaptionedImage:
    """A picture, what people said of it, and what is in it."""

    image_id: ImageId
    image: Path | None  # where the file is, or should be; None for a scene that has none
    references: tuple[str, ...]
    objects: frozenset[str] | None = None  # names of COCO categories; None where unknown
    scene: Layout | None = None  # the whole truth, of Scenes only

    @property
    def picture(self) -> Path | Image.Image:
        """What `open_image` opens; a scene without a file is drawn anew at every call."""
        return self.image or draw(self.scene).image


@dataclass(frozen=True)
class CaptionDataset(Sequence[CaptionedImage]):
    """Captioned images in the order of their file; each id is there once, with captions.

    Raises:
        ValueError: it is empty, an id comes twice, or an image has no caption, or only blank ones.
    """

    name: str
    images: tuple[CaptionedImage, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError(f"{self.name} has no images")
        if twice := [image_id for image_id, n in Counter(self.ids).items() if n > 1]:
            said = some("image", twice)
            raise ValueError(f"{self.name} lists {said} more than once: keep one of each")
        if silent := [i.image_id for i in self.images if not "".join(i.references).strip()]:
            said = some("image", silent)
            raise ValueError(f"{self.name} has no caption of {said}: write one, or drop it")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> CaptionedImage:
        return self.images[index]

    @property
    def ids(self) -> tuple[ImageId, ...]:
        return tuple(image.image_id for image in self.images)

    @property
    def references(self) -> dict[ImageId, list[str]]:
        return {image.image_id: list(image.references) for image in self.images}

    @property
    def objects(self) -> dict[ImageId, frozenset[str] | None]:
        return {image.image_id: image.objects for image in self.images}

    def missing(self) -> list[ImageId]:
        """Ids of the images whose file is not there."""
        return [i.image_id for i in self.images if i.image and not i.image.is_file()]

    def subset(self, n: int, seed: int = 0) -> CaptionDataset:
        """`n` images drawn without replacement, in the order they have here.

        Raises:
            ValueError: `n` is not from 1 to the number of images.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"cannot draw n={n} of the {len(self):,} images of {self.name}")
        drawn = sorted(random.Random(seed).sample(range(len(self)), n))
        name = f"{self.name}, {n:,} of {len(self):,} (seed {seed})"
        return CaptionDataset(name, tuple(self.images[i] for i in drawn))

    def save(self, path: str | PathLike) -> Path:
        """Write captions in COCO's format, which `open_dataset` reopens just as they were.

        Pictures stay where they are, named by their absolute paths, and scenes by split, seed and
        index; what is in an image stands beside it as `objects`.
        """
        images = []
        for image in self.images:
            record = {"id": image.image_id}
            if image.image:
                record["file_name"] = str(image.image)
            if image.objects is not None:
                record["objects"] = sorted(image.objects)
            if image.scene:
                record |= {key: getattr(image.scene, key) for key in SCENE_KEYS}
            images.append(record)
        told = [(image.image_id, text) for image in self.images for text in image.references]
        rows = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(told, 1)]
        content = {"info": {"name": self.name}, "images": images, "annotations": rows}
        return write_atomic(Path(path), json.dumps(content))


@dataclass(frozen=True)
class Contamination:
    """How many images of a data set the published checkpoint may have been trained on."""

    images: int
    pool: int | None  # images of train2017 that training drew from; None where not known which
    suspects: tuple[ImageId, ...]  # those that are in the pool

    def __str__(self) -> str:
        if self.pool is None:
            return "contamination: unknown; captions_train2017.json would tell"
        return (
            f"contamination: {len(self.suspects):,} of {self.images:,} images possibly trained on "
            f"(by file name among the first {self.pool:,} of train2017, of which about 80% were)"
        )


def contamination(
    dataset: CaptionDataset, captions_train2017: str | PathLike | None
) -> Contamination:
    """Look for images that the published checkpoint may have been trained on.

    It saw about 80% of the first 80,000 images of COCO's train2017, in the order of torchvision's
    `CocoCaptions`: sorted ids. COCO's photos are told by the twelve digits that end their names.
    Without COCO's `captions_train2017.json` nothing is known.
    """
    if captions_train2017 is None:
        return Contamination(len(dataset), None, ())
    path = Path(captions_train2017).expanduser()
    with _reading(path):
        pool = set(sorted(image["id"] for image in json.loads(path.read_bytes())["images"])[:POOL])
    digits = {i.image_id: re.search(r"(?<!\d)\d{12}$", i.image.stem) for i in dataset if i.image}
    suspects = (image_id for image_id, coco in digits.items() if coco and int(coco[0]) in pool)
    return Contamination(len(dataset), len(pool), tuple(suspects))


def open_dataset(
    source: str | PathLike,
    *,
    split: str | None = None,
    n: int | None = None,
    seed: int = 0,
    images: str | PathLike | None = None,
    instances: str | PathLike | None = None,
) -> CaptionDataset:
    """Open captions of one of these kinds, or a folder that holds one of them:

    - COCO's `captions_*.json`, as `save` and `scenes.write_coco` write it too;
    - Karpathy's `dataset_*.json` (https://cs.stanford.edu/people/karpathy/deepimagesent/);
    - a `.csv` or `.jsonl` file with a column `file`, `file_name` or `image` (the id, too) and
      `caption`, in one row or several an image, or, of `.jsonl`, `captions` with a list;
    - "scenes:test", or another split of the drawn world.

    Pictures need not be there: see `CaptionDataset.missing`.

    Args:
        split: of Karpathy's, one or more ("train+restval"); of a folder of COCO's, "val2017".
        n: draw so many images with `seed`; of Scenes, take the first n of that seed.
        images: folder of the pictures; by default looked for around the captions.
        instances: COCO's `instances_*.json`; by default the one beside `captions_*.json`.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no captions.
        ValueError: the file is damaged or no captions file, has no such split, has captions of
            images that it does not list, or what it has makes no `CaptionDataset`.
    """
    if str(source).startswith("scenes:"):
        return _open_scenes(str(source), split, n, seed)
    path = _find_captions(Path(source).expanduser().absolute(), split)
    with _reading(path):
        name, entries = _read(path, split)
    folder = Path(images).expanduser().absolute() if images else _find_pictures(path, entries)
    beside = path.with_name(path.name.replace("captions", "instances", 1))
    objects = {}
    if instances or (path.suffix == ".json" and beside != path and beside.is_file()):
        objects = _read_objects(Path(instances or beside).expanduser())
        if objects.keys().isdisjoint(entry.image_id for entry in entries):
            raise ValueError(f"{instances or beside} knows none of the images of {path}")
    found = []
    for entry in entries:
        known = objects.get(entry.image_id, entry.objects)
        found.append(replace(entry, image=entry.image and folder / entry.image, objects=known))
    dataset = CaptionDataset(name, tuple(found))
    return dataset if n is None else dataset.subset(n, seed)


def _open_scenes(source: str, split: str | None, n: int | None, seed: int) -> CaptionDataset:
    named = source.removeprefix("scenes:")
    _check_split(source, split, [named])
    if n is None or n < 1:
        raise ValueError(f"{source} has no end: ask for n of at least 1, not {n}")
    images = []
    for index in range(n):
        truth = layout(named, seed, index)
        objects = frozenset(thing.category for thing in truth.objects)
        images.append(CaptionedImage(index, None, tell(truth), objects, truth))
    return CaptionDataset(f"{source}, the first {n:,} (seed {seed})", tuple(images))


def _find_captions(source: Path, split: str | None) -> Path:
    """The captions file that is meant, be it a file or in a folder."""
    if source.is_file():
        return source
    patterns = (*NAMES, *(f"annotations/{name}" for name in NAMES))
    found = [path for pattern in patterns for path in sorted(source.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"{source} is no captions file, nor a folder with {NAMES}")
    found = [path for path in found if path.stem == f"captions_{split}"] or found
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(source)) for path in found)
        raise ValueError(f"{source} holds {names}: name the file, or the split that is meant")
    return found[0]


def _read(path: Path, split: str | None) -> tuple[str, list[CaptionedImage]]:
    """Name and images of a captions file, with the pictures' paths as they stand there."""
    name = path.parent.name if path.stem == "captions" else path.stem
    if path.suffix in (".csv", ".jsonl"):
        _check_split(path, split, [])
        return name, _from_table(path)
    content = json.loads(path.read_bytes())
    if any("sentences" in image for image in content["images"]):
        return f"{name} {split}", _from_karpathy(path, content["images"], split)
    _check_split(path, split, [path.stem.partition("captions_")[2]])
    return (content.get("info") or {}).get("name", name), _from_coco(path, content)


def _from_coco(path: Path, content: dict) -> list[CaptionedImage]:
    captions = defaultdict(list)
    for row in content["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    listed = {image["id"] for image in content["images"]}
    if strays := [image_id for image_id in captions if image_id not in listed]:
        said = some("image", strays)
        raise ValueError(f"{path} has captions of {said} that it does not list: add them")
    entries = []
    for image in content["images"]:
        scene = layout(*map(image.get, SCENE_KEYS)) if {*SCENE_KEYS} <= image.keys() else None
        file = image.get("file_name", None if scene else f"{image['id']:0>12}.jpg")  # COCO's name
        objects = frozenset(image["objects"]) if "objects" in image else None
        said = tuple(captions[image["id"]])
        entries.append(CaptionedImage(image["id"], file and Path(file), said, objects, scene))
    return entries


def _from_karpathy(path: Path, images: list[dict], split: str | None) -> list[CaptionedImage]:
    _check_split(path, split or "", list(dict.fromkeys(image["split"] for image in images)))
    return [
        CaptionedImage(
            image["cocoid"] if "cocoid" in image else image["imgid"],
            Path(image.get("filepath", ""), image["filename"]),
            tuple(sentence["raw"] for sentence in image["sentences"]),
        )
        for image in images
        if image["split"] in split.split("+")
    ]


def _from_table(path: Path) -> list[CaptionedImage]:
    captions: dict[str, list[str]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = csv.DictReader(file, restval="")
        else:  # read as one list, so that an error names the line
            rows = json.loads(f"[{','.join(filter(str.strip, file))}]")
        for number, row in enumerate(rows, start=1):
            name = next((row[column] for column in FILE_COLUMNS if column in row), None)
            said = row.get("captions", row.get("caption"))
            if name is None or said is None or None in row:
                raise ValueError(
                    f"row {number} of {path} is {row}: it needs caption and one of {FILE_COLUMNS}, "
                    "and quotes around captions with commas"
                )
            captions.setdefault(name, []).extend([said] if isinstance(said, str) else said)
    return [CaptionedImage(name, Path(name), tuple(said)) for name, said in captions.items()]


def _find_pictures(path: Path, entries: list[CaptionedImage]) -> Path:
    """The folder around the captions in which some of the pictures are; else the captions'."""
    here, split = path.parent, path.stem.partition("captions_")[2]
    above = here.parent
    folders = (above / split, here / split, here / "images", here, above / "images", above)
    names = [entry.image for entry in entries[:: len(entries) // 1000 + 1] if entry.image]
    return next((f for f in folders if any((f / name).is_file() for name in names)), here)


def _read_objects(path: Path) -> dict[ImageId, frozenset[str]]:
    """Names of the categories in each image that COCO's instances list."""
    with _reading(path):
        content = json.loads(path.read_bytes())
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects = {image["id"]: set() for image in content["images"]}
        for row in content["annotations"]:
            objects[row["image_id"]].add(names[row["category_id"]])
    return {image_id: frozenset(found) for image_id, found in objects.items()}


def _check_split(source: str | Path, split: str | None, there: list[str]) -> None:
    if split is not None and (unknown := [s for s in split.split("+") if s not in there]):
        choices = ", ".join(filter(None, there)) or "none"
        raise ValueError(f"no split {'+'.join(unknown)!r} in {source}: there is {choices}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in whatever goes wrong where it is not what it should be."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, UnicodeError, csv.Error, JSONDecodeError) as error:
        raise ValueError(
            f"{path} is cut off, or neither COCO's captions or instances, Karpathy's, nor a table "
            f"of captions ({error!r}): check it, or get it again"
        ) from error


def some(thing: str, ids: Sequence[ImageId]) -> str:
    """ "3 images (7, 12, 15)", with the first five ids."""
    first = ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return f"{len(ids):,} {thing}{'s' * (len(ids) > 1)} ({first})"
