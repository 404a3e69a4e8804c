"""Cache of vision states: the tower is frozen, so each image is encoded once and kept on disk."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm

from qvision_lab.captioning.images import ImageError, file_identity, open_image
from qvision_lab.data.atomic import atomic, write_atomic
from qvision_lab.data.coco import CaptionDataset, CaptionedImage, ImageId
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.parameters import fingerprint_weights
from qvision_lab.model.processor import QVisionProcessor, image_preset

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
VIEWS = ("", "-flip", "-crop")  # of an image: as it is, mirrored, a part of it; ends of their names


@dataclass(frozen=True)
class CachedFeatures:
    """Memory-mapped vision states by image and view, and why images could not be read."""

    places: dict[ImageId, list[tuple[Path, str]]]  # of each view its file, and its name there
    failed: dict[ImageId, str]  # reasons

    def view(self, image_id: ImageId, number: int = 0) -> Float[Tensor, "P C"]:
        path, name = self.places[image_id][number]
        return _open(path).get_tensor(name)

    def means(self, image_ids: Iterable[ImageId]) -> Float[Tensor, "N C"]:
        """Mean state of each image, as it is."""
        return torch.stack([self.view(image_id).float().mean(0) for image_id in image_ids])


@lru_cache(maxsize=4096)  # COCO's train2017 has 2,000 files
def _open(path: Path) -> safe_open:
    return safe_open(path, "pt")


class FeatureCache:
    """A folder of vision states [P,C], one safetensors file per batch, which only grows.

    Images are identified by content, so data sets that share images share states, and a changed
    image is encoded again. A file of known path, size and time is not read again, and a drawing of
    known name is not drawn again. Writes are atomic: an interrupted build resumes with its batch.

    ValueError if the folder holds a damaged file, or states of another tower, preprocessing or
    dtype: "bfloat16" (75 kB per image with ViT-B/32, 8.9 GB for COCO train2017) or "float32".
    """

    def __init__(
        self, folder: str | os.PathLike, model: QVisionForConditionalGeneration, dtype: str
    ):
        if dtype not in DTYPES:
            raise ValueError(f"features are not kept in {dtype!r}: use {' or '.join(DTYPES)}.")
        self.folder, self.dtype = Path(folder), DTYPES[dtype]
        preset = image_preset("training", model.config.vision_config.image_size)
        self.origin = {
            "tower": fingerprint_weights(model.vision.tower),
            "preprocessing": f"sRGB, {preset}",
            "dtype": dtype,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, Path] = {}  # by the content of the images in them
        index = self.folder / "contents.json"  # contents by `_name`
        self.contents: dict[str, str] = json.loads(index.read_text()) if index.exists() else {}
        for path in self.folder.glob("*.safetensors"):
            self._add(path)

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as states:
                self.files |= dict.fromkeys(states.keys(), path)
                origin = states.metadata()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it.") from error
        different = [f"{k} {origin[k]}, not {v}" for k, v in self.origin.items() if origin[k] != v]
        if different:
            raise ValueError(
                f"{self.folder} holds other features ({'; '.join(different)}): choose another "
                "folder, or delete that one."
            )

    @torch.no_grad()
    def encode(
        self,
        images: CaptionDataset,
        model: QVisionForConditionalGeneration,
        processor: QVisionProcessor,
        *,
        views: int = 1,
        batch_size: int = 64,
        workers: int | None = 0,
    ) -> CachedFeatures:
        """Encode the images that are new and return the states of all; OSError if the disk is full.

        `model` is the one that the cache was opened with, and is left in evaluation mode. `views`
        is the number of `VIEWS` of each image. Images are read by `workers`; None: up to 8, or none
        on fewer than 4 cores, which the tower needs.
        """
        ends = VIEWS[:views]
        failed = dict.fromkeys(images.missing(), "there is no such file")
        names = {image.image_id: _name(image) for image in images if image.image_id not in failed}
        known = {n for n, x in self.contents.items() if {x + e for e in ends} <= self.files.keys()}
        new_ids = {key for key, name in names.items() if name not in known}
        unread = [i for i, key in enumerate(images.ids) if key in new_ids]
        values = math.prod(model.config.patch_grid) * model.config.vision_config.hidden_size
        needed = len(unread) * views * values * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"the features of {len(unread):,} images need {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free: make room, or choose bfloat16."
            )
        # Cut by the index in the data set, so that batches are the same after an interruption.
        batches = [list(batch) for _, batch in groupby(unread, lambda i: i // batch_size)]
        if workers is None:
            cores = os.cpu_count() or 1
            workers = min(cores, 8) if cores >= 4 else 0
        reader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=workers if unread else 0,
            collate_fn=partial(_read, processor=processor, ends=ends, known=frozenset(self.files)),
            pin_memory=model.device.type == "cuda",
        )
        bar = tqdm(reader, f"features (at most {needed / 1e9:.2f} GB)", unit="batch")
        for number, (read, pixels, unreadable) in enumerate(bar, start=1):
            failed |= unreadable
            new = {name: x for name, x in pixels.items() if name not in self.files}
            if new:
                copies = [x.to(model.device, non_blocking=True) for x in new.values()]
                states = []
                for part in torch.stack(copies).split(batch_size):  # [B,3,H,W] -> [B,P,C]
                    encoded = model.eval().vision.encode(part)
                    states.extend(encoded.to(self.dtype).cpu())  # cast first: fewer bytes to copy
                path = self.folder / f"{next(iter(new))}.safetensors"
                own = path.with_suffix(f".{os.getpid()}")  # other runs may use this cache
                try:
                    with atomic(own) as unfinished:
                        save_file(dict(zip(new, states, strict=True)), unfinished, self.origin)
                except SafetensorError as error:  # its own kind, for a full disk too
                    raise OSError(f"{path} could not be written ({error}).") from error
                self._add(own.replace(path))
            self.contents |= {names[key]: content for key, content in read.items()}
            if number % 64 == 0 or number == len(batches):
                write_atomic(self.folder / "contents.json", json.dumps(self.contents))
        places = {}
        for key, name in names.items():
            if key not in failed:
                stored = (self.contents[name] + end for end in ends)
                places[key] = [(self.files[view], view) for view in stored]
        return CachedFeatures(places, failed)


def _read(
    images: list[CaptionedImage],
    processor: QVisionProcessor,
    ends: Sequence[str],
    known: frozenset[str],
) -> tuple[dict[ImageId, str], dict[str, Float[Tensor, "3 H W"]], dict[ImageId, str]]:
    """Digests of the images' contents; pixels of the views that are not known; and problems."""
    contents, pixels, failed = {}, {}, {}
    for image in images:
        try:
            source = image.image.read_bytes() if image.image else image.picture
            data = source if isinstance(source, bytes) else source.tobytes()
            content = hashlib.blake2b(data, digest_size=16).hexdigest()
            names = (content + end for end in ends)
            new = [name for name in names if name not in known and name not in pixels]
            picture = open_image(source, str(image.image)) if new else None
            for name in new:
                shown = draw_view(picture, name, processor.image_size)
                pixels[name] = processor(images=shown).pixel_values[0]
            contents[image.image_id] = content
        except (ImageError, OSError) as error:
            failed[image.image_id] = str(error)
    return contents, pixels, failed


def draw_view(picture: Image.Image, name: str, side: int) -> Image.Image:
    """One of an image's `VIEWS`, by the end of its name; the whole name draws the crop."""
    if name.endswith("-flip"):
        return v2.functional.horizontal_flip(picture)
    if not name.endswith("-crop"):
        return picture
    crop = v2.RandomResizedCrop(side, scale=(0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(name[:15], 16))
        return v2.RandomHorizontalFlip()(crop(picture))


def _name(image: CaptionedImage) -> str:
    """Identifies an image without reading or drawing it."""
    if image.image is None:
        return image.drawing.name
    return f"{image.image} {file_identity(image.image)}"
