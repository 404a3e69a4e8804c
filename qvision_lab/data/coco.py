"""Images with reference captions, from COCO's files, Karpathy's, plain folders or plugins."""

import csv
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qvision_lab.data.atomic import find_path

__all__ = ["CaptionDataset", "CaptionedImage", "Contamination", "contamination", "open_dataset"]
__dir__ = __all__.copy  # for completion

ImageId = int | str

POOL = 80_000  # images of train2017, of which a random 80% trained the published checkpoint
FILE_COLUMNS = ("file", "file_name", "image")  # columns of a table with the image
NAMES = ("captions.csv", "captions.jsonl", "captions.json", "captions_*.json", "dataset_*.json")
PLUGINS = "qvision_lab.datasets"  # entry points, called with source, split, n and seed
DAMAGE = AttributeError, LookupError, TypeError, UnicodeError, RecursionError
DAMAGE += csv.Error, json.JSONDecodeError


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its reference captions and the objects in it."""

    image_id: ImageId
    image: Path | None  # its file, which may be missing; None for a drawing without a file
    references: tuple[str, ...]
    # COCO category and box (x, y, width, height in pixels) of each object; None where unknown
    boxes: tuple[tuple[str, Sequence[float]], ...] | None = None
    # Has `draw() -> Image.Image`, and a `name` that identifies its pixels across data sets,
    # processes and versions of what draws them, as `scenes.dataset.SceneDrawing`
    drawing: Any = None

    @property
    def objects(self) -> frozenset[str] | None:
        """Names of the categories in the image; None where unknown."""
        return None if self.boxes is None else frozenset(name for name, _ in self.boxes)

    @property
    def picture(self) -> Path | Image.Image:
        """What `open_image` opens; a drawing without a file is redrawn at every call."""
        return self.image or self.drawing.draw()


@dataclass(frozen=True)
class CaptionDataset(Sequence[CaptionedImage]):
    """Captioned images in the order of their file, with distinct ids and captions.

    ValueError if it is empty, an id is repeated, or an image has no caption but blank ones.
    """

    name: str
    images: tuple[CaptionedImage, ...] = field(repr=False)
    judge: Any = field(default=None, repr=False, compare=False)  # an `evaluation.metrics.Judge`

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError(f"{self.name} has no images")
        if repeated := some("image", find_repeated(self.ids)):
            raise ValueError(f"{self.name} lists {repeated} more than once: keep one of each")
        bare = [i.image_id for i in self if not "".join(i.references).strip()]
        if without := some("image", bare):
            raise ValueError(f"{self.name} has no caption of {without}: write one, or drop it")

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
        """Ids of the images whose file does not exist."""
        return [i.image_id for i in self.images if i.image and not os.path.isfile(i.image)]

    def subset(self, n: int, seed: int = 0) -> "CaptionDataset":
        """`n` images (1 to all) drawn without replacement, in the same order."""
        if not 1 <= n <= len(self):
            raise ValueError(f"cannot draw n={n} of the {len(self):,} images of {self.name}")
        drawn = sorted(random.Random(seed).sample(range(len(self)), n))
        name = f"{self.name}, {n:,} of {len(self):,} (seed {seed})"
        return replace(self, name=name, images=tuple(self.images[i] for i in drawn))


class Contamination(NamedTuple):
    """Images of a data set that the published checkpoint may have been trained on."""

    images: int
    pool: int | None  # images of train2017 that training drew from; None where unknown
    suspects: tuple[ImageId, ...]  # images in the pool

    def __str__(self) -> str:
        if self.pool is None:
            return "contamination: unknown; captions_train2017.json is needed"
        return (
            f"contamination: {len(self.suspects):,} of {self.images:,} images possibly trained on "
            f"(by file name among the first {self.pool:,} of train2017, of which about 80% were)"
        )


def contamination(
    dataset: CaptionDataset, captions_train2017: str | PathLike | None
) -> Contamination:
    """Find images that the published checkpoint may have been trained on.

    It was trained on about 80% of the first 80,000 images of COCO's train2017, by sorted ids as in
    torchvision's `CocoCaptions`. Twelve digits at the end of a file name identify a photo of COCO.
    """
    if captions_train2017 is None:
        return Contamination(len(dataset), None, ())
    path = find_path(captions_train2017)
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
    """Open captions in one of these formats, or a folder with one; image files may be missing:

    - COCO's `captions_*.json` (from `scenes.write_coco`, with its drawings and judge);
    - Karpathy's `dataset_*.json` (https://cs.stanford.edu/people/karpathy/deepimagesent/);
    - a `.csv` or `.jsonl` file with columns `file`, `file_name` or `image` (also the id) and
      `caption`, in one row or several per image, or, in `.jsonl`, a list of `captions`; a column
      `split` is optional;
    - "NAME:...", which an installed plugin opens, such as "scenes:test" (a split of Scenes).

    FileNotFoundError without captions; ValueError where they are damaged or make no valid data set.

    Args:
        split: one or more of Karpathy's or a table's ("train+restval"), or of a folder in COCO's
            format.
        n: draw so many images with `seed`; of Scenes, the first n of that seed.
        images: folder of the images; by default searched for around the captions.
        instances: COCO's `instances_*.json`; by default the one next to `captions_*.json`.
    """
    if isinstance(source, str) and (plugin := re.match(r"\w\w+(?=:)", source)):  # C: is a drive
        installed = entry_points(group=PLUGINS)
        if plugin[0] not in installed.names:
            raise ValueError(f"{source!r}: installed data sets are {sorted(installed.names)}")
        return installed[plugin[0]].load()(source, split, n, seed)
    path = _find_captions(find_path(source).absolute(), split)
    with _reading(path):
        name, entries, judge = _read(path, split)
    folder = find_path(images).absolute() if images else _find_folder(path, entries)
    sibling = path.with_name(path.name.replace("captions", "instances", 1))
    boxes = {}
    if instances or (path.suffix == ".json" and sibling != path and sibling.is_file()):
        boxes = _read_boxes(find_path(instances or sibling))
        if boxes.keys().isdisjoint(entry.image_id for entry in entries):
            raise ValueError(f"{instances or sibling} lists none of the images of {path}")
    found = (replace(e, image=folder / e.image, boxes=boxes.get(e.image_id)) for e in entries)
    dataset = CaptionDataset(name, tuple(found), judge)
    return dataset if n is None else dataset.subset(n, seed)


def _find_captions(source: Path, split: str | None) -> Path:
    """The captions file at a path or in a folder."""
    if source.is_file():
        return source
    found = [p for place in ("", "annotations/") for n in NAMES for p in source.glob(place + n)]
    if not found:
        raise FileNotFoundError(f"{source} is no captions file or folder with one of {NAMES}")
    found = [path for path in found if path.stem == f"captions_{split}"] or found
    if len(found) > 1:
        names = ", ".join(sorted(str(path.relative_to(source)) for path in found))
        raise ValueError(f"{source} holds {names}: name the file or the split")
    return found[0]


def _read(path: Path, split: str | None) -> tuple[str, list[CaptionedImage], Any]:
    """Name, images and judge of a captions file, with the images' paths as in the file."""
    name = path.parent.name if path.stem == "captions" else path.stem
    if path.suffix in (".csv", ".jsonl"):
        return name if split is None else f"{name} {split}", _from_table(path, split), None
    content = json.loads(path.read_bytes())
    if any(isinstance(i, dict) and "sentences" in i for i in content["images"]):
        return f"{name} {split}", _from_karpathy(path, content["images"], split), None
    check_split(path, split, [path.stem.partition("captions_")[2]])
    return name, *_from_coco(path, content)


def _from_coco(path: Path, content: dict) -> tuple[list[CaptionedImage], Any]:
    captions = defaultdict(list)
    for number, row in enumerate(content["annotations"], start=1):
        key, text = take(row, f"annotation {number} of {path}", image_id=int | str, caption=str)
        captions[key].append(text)
    images = enumerate(content["images"], start=1)
    listed = {take(image, f"image {n} of {path}", id=int | str)[0] for n, image in images}
    if unlisted := some("image", [image_id for image_id in captions if image_id not in listed]):
        raise ValueError(f"{path} has captions of {unlisted} that it does not list: add them")
    drawings, judge = {}, None
    if drawn := (content.get("info") or {}).get("drawn"):
        world = open_dataset(**drawn, n=1 + max(listed, default=0))
        drawings, judge = {image.image_id: image.drawing for image in world}, world.judge
    entries = []
    for image in content["images"]:
        key, name = image["id"], image.get("file_name", f"{image['id']:0>12}.jpg")  # COCO's name
        references = tuple(captions[key])
        entries.append(CaptionedImage(key, Path(name), references, drawing=drawings.get(key)))
    return entries, judge


def _from_karpathy(path: Path, images: list[dict], split: str | None) -> list[CaptionedImage]:
    entries = []
    for number, image in enumerate(images, start=1):
        place = f"image {number} of {path}"
        sentences, part, name = take(image, place, sentences=list, split=str, filename=str)
        texts = [take(sentence, f"a sentence of {place}", raw=str)[0] for sentence in sentences]
        key = image["cocoid"] if "cocoid" in image else image["imgid"]
        file = Path(image.get("filepath", ""), name)
        entries.append((part, CaptionedImage(key, file, tuple(texts))))
    check_split(path, split or "", list(dict.fromkeys(part for part, _ in entries)))
    return [entry for part, entry in entries if part in split.split("+")]


def _from_table(path: Path, split: str | None) -> list[CaptionedImage]:
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = _csv_rows(path, file)
        else:  # read as one list, so that an error names the line
            rows = json.loads(f"[{','.join(filter(str.strip, file))}]")
        for number, row in enumerate(rows, start=1):
            row = row if isinstance(row, dict) else {None: row}
            name = next((row[column] for column in FILE_COLUMNS if column in row), None)
            texts = row.get("captions", row.get("caption"))
            texts = texts if isinstance(texts, list) else [texts]
            if None in row or not all(isinstance(text, str) for text in (name, *texts)):
                raise ValueError(
                    f"row {number} of {path} is {row}: it needs caption and one of {FILE_COLUMNS}, "
                    "and quotes around captions with commas"
                )
            captions.setdefault(name, []).extend(texts)
            part = row.get("split")
            if splits.setdefault(name, part) != part:
                raise ValueError(f"{path} has {name!r} in the splits {splits[name]!r} and {part!r}")
    check_split(path, split, list(dict.fromkeys(part for part in splits.values() if part)))
    return [
        CaptionedImage(name, Path(name), tuple(texts))
        for name, texts in captions.items()
        if split is None or splits[name] in split.split("+")
    ]


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[dict]:
    """Rows of a CSV; ValueError with the line where a damaged one begins."""
    reader, line = csv.DictReader(file, restval="", strict=True), 1
    try:
        line += bool(reader.fieldnames)  # which reads the first line
        for row in reader:
            line = reader.line_num + 1
            yield row
    except csv.Error as error:
        raise ValueError(
            f"line {line} of {path} begins a row that cannot be read ({error}): close its quotes, "
            'and double those inside a caption ("")'
        ) from error


def _find_folder(path: Path, entries: list[CaptionedImage]) -> Path:
    """A folder around the captions that has some of the images, or else the captions' own."""
    here, above, split = path.parent, path.parent.parent, path.stem.partition("captions_")[2]
    folders = (above / split, here / split, here / "images", here, above / "images", above)
    names = [entry.image for entry in entries[:: len(entries) // 1000 + 1]]
    return next((f for f in folders if any(map(os.path.isfile, map(f.joinpath, names)))), here)


def _read_boxes(path: Path) -> dict[ImageId, tuple[tuple[str, Sequence[float]], ...]]:
    """Category and box of each object in each image, from COCO's instances."""
    with _reading(path):
        content = json.loads(path.read_bytes())
        names = {category["id"]: category["name"] for category in content["categories"]}
        boxes = {image["id"]: [] for image in content["images"]}
        for number, row in enumerate(content["annotations"], start=1):
            fields = {"image_id": int | str, "category_id": int | str, "bbox": list}
            key, category, box = take(row, f"annotation {number} of {path}", **fields)
            boxes[key].append((names[category], box))
    return {image_id: tuple(found) for image_id, found in boxes.items()}


def check_split(source: str | Path, split: str | None, there: list[str]) -> None:
    """Refuse splits ("a+b") other than those that are there."""
    if split is not None and (unknown := [s for s in split.split("+") if s not in there]):
        choices = ", ".join(filter(None, there)) or "none"
        raise ValueError(f"no split {'+'.join(unknown)!r} in {source}: there is {choices}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors from a damaged file into one that names it."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(
            f"{path} is cut off, or neither COCO's captions or instances, Karpathy's, nor a table "
            f"of captions ({error!r}): check it, or download it again"
        ) from error


def take(row: object, place: str, **kinds: type) -> list:
    """Fields of a row of JSON; ValueError names its place where one has another type."""
    if not isinstance(row, dict) or not all(isinstance(row.get(n), kinds[n]) for n in kinds):
        raise ValueError(f"{place} is {row!r:.200}: it needs {[*kinds]} of the usual types")
    return [row[name] for name in kinds]


def find_repeated(ids: Sequence[ImageId]) -> list[ImageId]:
    """Ids that occur more than once, also as a number and as its text."""
    counts = Counter(map(str, ids))
    return [image_id for image_id in dict.fromkeys(ids) if counts[str(image_id)] > 1]


def some(thing: str, ids: Sequence[ImageId]) -> str:
    """ "3 images (7, 12, 15)", with the first five ids; "" for none."""
    first = ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")
    return f"{len(ids):,} {thing}{'s' * (len(ids) > 1)} ({first})" if ids else ""
