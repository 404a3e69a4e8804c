"""Features once: the tower is frozen, so what it sees in a picture is computed once and kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from qvision_lab.captioning.images import ImageError, open_image
from qvision_lab.data.atomic import write_atomic
from qvision_lab.data.coco import CaptionDataset, CaptionedImage, ImageId
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.processor import QVisionProcessor, image_preset

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class SeenPictures:
    """The states of pictures, memory-mapped, and which pictures could not be read."""

    places: dict[ImageId, tuple[Path, str]]  # the file, and the picture's name in it
    failed: dict[ImageId, str]  # what is wrong with each

    def __getitem__(self, image_id: ImageId) -> Float[Tensor, "P C"]:
        path, name = self.places[image_id]
        return _opened(path).get_tensor(name)


@lru_cache(maxsize=4096)  # 2,000 files are COCO's train2017
def _opened(path: Path) -> safe_open:
    return safe_open(path, "pt")


class FeatureCache:
    """A folder of vision states [P,C], in a safetensors file a batch, which only ever grows.

    Pictures are told by their content, so data sets that share pictures share states, and one that
    was changed is seen anew. A file whose path, size and time are known is not read again. Batches
    are written whole, so an interrupted build goes on with the batch at which it stopped.

    Args:
        folder: of the cache; begun where there is none.
        model: whose tower sees.
        dtype: "bfloat16" (75 kB a picture with ViT-B/32, 8.9 GB for COCO train2017) or "float32".

    Raises:
        ValueError: the folder holds states of another tower, preprocessing or dtype, or a torn
            file.
    """

    def __init__(
        self, folder: str | os.PathLike, model: QVisionForConditionalGeneration, dtype: str
    ):
        if dtype not in DTYPES:
            raise ValueError(f"features are not kept in {dtype!r}: use {' or '.join(DTYPES)}.")
        self.folder, self.dtype = Path(folder), DTYPES[dtype]
        self.made_by = {
            "tower": fingerprint_weights(model.vision.tower),
            "preprocessing": str(image_preset("training", model.config.vision_config.image_size)),
            "dtype": dtype,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, Path] = {}  # by the content of the pictures in them
        memo = self.folder / "contents.json"  # of files, by their `_name`
        self.contents: dict[str, str] = json.loads(memo.read_text()) if memo.exists() else {}
        for path in self.folder.glob("*.safetensors"):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as states:
                self.files |= dict.fromkeys(states.keys(), path)
                found = states.metadata()
        except SafetensorError as error:
            raise ValueError(f"{path} is torn ({error}): delete it.") from error
        stale = [
            f"{key} {found[key]}, not {value}"
            for key, value in self.made_by.items()
            if found[key] != value
        ]
        if stale:
            raise ValueError(
                f"{self.folder} holds other features ({'; '.join(stale)}): choose another folder, "
                "or delete that one."
            )

    @torch.no_grad()
    def see(
        self,
        images: CaptionDataset,
        model: QVisionForConditionalGeneration,
        processor: QVisionProcessor,
        *,
        batch_size: int = 64,
        workers: int | None = 0,
    ) -> SeenPictures:
        """Find the states of pictures, after the tower has seen those that are new.

        Args:
            model: the one that the cache was opened with; left in evaluation mode.
            workers: processes that read pictures while the tower works; None for 8 at most, and
                none where there are but few cores, in which they would stand in its way.

        Raises:
            OSError: there is no room for what is to be added.
        """
        failed = dict.fromkeys(images.missing(), "there is no such file")
        names = {image.image_id: _name(image) for image in images if image.image_id not in failed}
        contents = {key: self.contents.get(name) for key, name in names.items()}
        contents = {key: content for key, content in contents.items() if content in self.files}
        unread = [i for i, key in enumerate(images.ids) if key in names and key not in contents]
        values = math.prod(model.config.patch_grid) * model.config.vision_config.hidden_size
        needed = len(unread) * values * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"the features of {len(unread):,} pictures need {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free: make room, or choose bfloat16."
            )
        # Cut by the place in the data set, so that batches are the same after an interruption.
        batches = [list(batch) for _, batch in groupby(unread, lambda i: i // batch_size)]
        pictures = _Pictures(images, processor, frozenset(self.files))
        if workers is None:
            cores = os.cpu_count() or 1
            workers = min(cores, 8) if cores >= 4 else 0
        reader = DataLoader(
            pictures,
            batch_sampler=batches,
            num_workers=workers if unread else 0,
            collate_fn=list,
            pin_memory=model.device.type == "cuda",
        )
        for batch in tqdm(reader, f"features (at most {needed / 1e9:.2f} GB)", unit="batch"):
            failed |= {seen.image_id: seen.problem for seen in batch if seen.problem}
            contents |= {seen.image_id: seen.content for seen in batch if not seen.problem}
            new = {seen.content: seen.pixels for seen in batch if seen.pixels is not None}
            new = {content: pixels for content, pixels in new.items() if content not in self.files}
            if new:
                copies = [pixels.to(model.device, non_blocking=True) for pixels in new.values()]
                states = model.eval().vision.see(torch.stack(copies))  # [B,3,H,W] -> [B,P,C]
                states = states.to(self.dtype).cpu()  # half of the bytes to be copied
                path = self.folder / f"{next(iter(new))}.safetensors"
                partial = path.with_suffix(f".{os.getpid()}")  # another run may add to this cache
                save_file(dict(zip(new, states, strict=True)), partial, self.made_by)
                self._open(partial.replace(path))
        known = {names[key]: content for key, content in contents.items() if names[key]}
        if not known.items() <= self.contents.items():
            self.contents |= known
            write_atomic(self.folder / "contents.json", json.dumps(self.contents))
        return SeenPictures({k: (self.files[name], name) for k, name in contents.items()}, failed)


@dataclass(frozen=True)
class _Read:
    """A picture with the digest of its content; without pixels where that is known, or bad."""

    image_id: ImageId
    content: str = ""
    pixels: Float[Tensor, "3 H W"] | None = None
    problem: str | None = None

    def pin_memory(self) -> _Read:
        return self if self.pixels is None else replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class _Pictures(Dataset):
    """Pictures as the tower takes them."""

    images: CaptionDataset
    processor: QVisionProcessor
    known: frozenset[str]

    def __getitem__(self, index: int) -> _Read:
        image = self.images[index]
        try:
            source = image.image.read_bytes() if image.image else image.picture
            data = source if isinstance(source, bytes) else source.tobytes()
            content = hashlib.blake2b(data, digest_size=16).hexdigest()
            if content in self.known:
                return _Read(image.image_id, content)
            picture = open_image(source, str(image.image))
        except (ImageError, OSError) as error:
            return _Read(image.image_id, problem=str(error))
        pixels = self.processor(images=picture)["pixel_values"][0]
        return _Read(image.image_id, content, pixels)


def _name(image: CaptionedImage) -> str:
    """What tells a file without reading it; scenes have none, and are drawn again to be told."""
    if image.image is None:
        return ""
    status = image.image.stat()
    return f"{image.image} {status.st_size} {status.st_mtime_ns}"


def fingerprint_weights(module: nn.Module) -> str:
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, weight in module.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
