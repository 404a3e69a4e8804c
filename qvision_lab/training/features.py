"""Features once: the tower is frozen, so what it sees in a picture is computed once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from qvision_lab.data.coco import CaptionDataset, CaptionedImage, ImageId
from qvision_lab.data.whole_files import write_whole
from qvision_lab.images import ImageError, open_image
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.processor import QVisionProcessor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMAT = 1  # to be raised when the `training` preprocessing or the files of a cache change


@dataclass(frozen=True)
class SeenPictures:
    """Where the states of pictures lie in a cache, and which pictures could not be read."""

    rows: dict[ImageId, int]
    failed: dict[ImageId, str]  # what is wrong with each
    added: int  # pictures that were not in the cache before


class FeatureCache:
    """A folder of vision states [P,C], one row a picture, which only ever grows.

    A row is found by the content of its picture, so data sets that share pictures share rows, and a
    picture that was changed is seen anew. A file whose path, size and time are known is not read
    again. An interrupted build goes on with the batch at which it stopped, and a checksum is
    verified whenever a row is used. `features.json` says of what these are the states,
    `index.jsonl` has a line for every picture, `states.bin` is memory-mapped.

    Args:
        folder: of the cache; begun where there is none.
        model: whose tower sees.
        dtype: "bfloat16" (75 kB a picture with ViT-B/32, 8.9 GB for COCO train2017) or "float32".

    Raises:
        ValueError: the folder holds states of another tower, size or dtype, or is damaged.
    """

    def __init__(
        self, folder: str | os.PathLike, model: QVisionForConditionalGeneration, dtype: str
    ):
        if dtype not in DTYPES:
            raise ValueError(f"features are not kept in {dtype!r}: use {' or '.join(DTYPES)}.")
        vision = model.config.vision_config
        rows, columns = model.config.patch_grid
        self.folder, self.dtype = Path(folder), DTYPES[dtype]
        self.shape = (rows * columns, vision.hidden_size)  # P, C
        self.row_bytes = rows * columns * vision.hidden_size * self.dtype.itemsize
        described = {
            "format": FORMAT,
            "tower": _fingerprint(model.vision.tower),
            "image size": vision.image_size,
            "shape": list(self.shape),
            "dtype": dtype,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        description = self.folder / "features.json"
        if not description.exists():
            write_whole(description, json.dumps(described, indent=1))
        found = json.loads(description.read_text(encoding="utf-8"))
        stale = [
            f"{name} {found.get(name)}, not {value}"
            for name, value in described.items()
            if found.get(name) != value
        ]
        if stale:
            raise ValueError(
                f"{self.folder} holds other features ({'; '.join(stale)}): choose another folder, "
                "or delete that one."
            )
        self._read_index()

    def see(
        self,
        images: CaptionDataset,
        model: QVisionForConditionalGeneration,
        processor: QVisionProcessor,
        *,
        batch_size: int = 64,
        workers: int = 0,
    ) -> SeenPictures:
        """Find the rows of pictures, after the tower has seen those that are new.

        Args:
            model: the one that the cache was opened with; left in evaluation mode.
            workers: processes that read pictures while the tower works.

        Raises:
            OSError: there is no room for what is to be added.
            ValueError: scenes are drawn otherwise than when they were seen.
        """
        failed = dict.fromkeys(images.missing(), "there is no such file")
        names = {i.image_id: _name(i) for i in images if i.image_id not in failed}
        with FileLock(self.folder / "lock"):  # another run may add to the same cache
            self._read_index()
            self._check_drawing(images)
            before = len(self.checksums)
            new = [i for i, k in enumerate(images.ids) if k in names and names[k] not in self.rows]
            failed |= self._add(images, new, model.eval(), processor, batch_size, workers)
        rows = {key: self.rows[name] for key, name in names.items() if name in self.rows}
        return SeenPictures(rows, failed, len(self.checksums) - before)

    @torch.no_grad()
    def _add(
        self,
        images: CaptionDataset,
        new: list[int],
        model: QVisionForConditionalGeneration,
        processor: QVisionProcessor,
        batch_size: int,
        workers: int,
    ) -> dict[ImageId, str]:
        """See the new ones, batch by batch: first the states are written, then their names."""
        needed, free = len(new) * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"the features of {len(new):,} pictures need {needed / 1e9:.1f} GB in "
                f"{self.folder}, where {free / 1e9:.1f} GB are free: make room, or choose bfloat16."
            )
        # Cut by the place in the data set, so that batches are the same after an interruption.
        batches = [list(batch) for _, batch in groupby(new, lambda i: i // batch_size)]
        reader = DataLoader(
            _Pictures(images, processor),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
        )
        failed = {}
        with (
            open(self.folder / "states.bin", "ab") as data,
            open(self.folder / "index.jsonl", "ab") as index,
            tqdm(desc=f"features ({needed / 1e9:.2f} GB)", total=len(new), unit="picture") as bar,
        ):
            data.truncate(len(self.checksums) * self.row_bytes)  # what an interruption left
            index.truncate(self.index_bytes)
            for batch in reader if new else ():
                failed |= {images[i].image_id: p for i, _, p in batch if isinstance(p, str)}
                read = [sample for sample in batch if isinstance(sample[2], Tensor)]
                unseen = {content: p for _, content, p in read if content not in self.contents}
                if unseen:
                    pixel_values = torch.stack(list(unseen.values())).to(model.device)  # [B,3,H,W]
                    states = model.vision.see(pixel_values).to("cpu", self.dtype)  # [B,P,C]
                    for content, row in zip(unseen, states, strict=True):
                        self.contents[content] = len(self.checksums)
                        self.checksums.append(_checksum(row))
                        data.write(_bytes(row))
                    data.flush()
                for i, content, _ in read:
                    row = self.contents[content]
                    entry = {"name": _name(images[i]), "content": content, "row": row}
                    line = json.dumps(entry | {"checksum": self.checksums[row]}) + "\n"
                    index.write(line.encode())
                index.flush()
                bar.update(len(batch))
        self._read_index()
        return failed

    def _read_index(self) -> None:
        """Rows by name and by content; a last line that was torn by an interruption is left out."""
        path, states = self.folder / "index.jsonl", self.folder / "states.bin"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]
        try:
            entries = [json.loads(line) for line in lines]
            self.rows = {entry["name"]: entry["row"] for entry in entries}
            self.contents = {entry["content"]: entry["row"] for entry in entries}
            checksums = {entry["row"]: entry["checksum"] for entry in entries}
            self.checksums = [checksums[row] for row in range(len(checksums))]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete {self.folder}.") from error
        self.index_bytes = sum(map(len, lines))
        size, needed = states.stat().st_size if states.exists() else 0, len(checksums)
        if size < needed * self.row_bytes:
            raise ValueError(
                f"{states} is torn: it has {size:,} bytes, but {needed:,} pictures need "
                f"{needed * self.row_bytes:,}. Delete {self.folder}."
            )
        vars(self).pop("_states", None)

    def _check_drawing(self, images: CaptionDataset) -> None:
        """Scenes have no file that tells of a change, so the first that was seen is drawn again."""
        known = (i for i in images if i.image is None and i.scene and _name(i) in self.rows)
        for image in islice(known, 1):
            if self.contents.get(_read(image)[1]) != self.rows[_name(image)]:
                raise ValueError(
                    f"{self.folder} holds scenes that were drawn otherwise: delete the folder."
                )

    @cached_property
    def _states(self) -> Float[Tensor, "N P C"]:
        count, path = len(self.checksums), self.folder / "states.bin"
        size = count * self.row_bytes // self.dtype.itemsize
        return torch.from_file(str(path), shared=False, size=size, dtype=self.dtype).view(
            count, *self.shape
        )

    def __getitem__(self, row: int) -> Float[Tensor, "P C"]:
        """The states of one picture.

        Raises:
            ValueError: the file was damaged since they were written.
        """
        states = self._states[row]
        if _checksum(states) != self.checksums[row]:
            raise ValueError(f"row {row} of {self.folder} is damaged: delete the folder.")
        return states

    def __getstate__(self) -> dict:
        """Without the mapping, which every worker process makes anew."""
        return {name: value for name, value in vars(self).items() if name != "_states"}


@dataclass(frozen=True)
class _Pictures(Dataset):
    """Pictures as the tower takes them: place, digest of the content, pixels or what is wrong."""

    images: CaptionDataset
    processor: QVisionProcessor

    def __getitem__(self, index: int) -> tuple[int, str, Float[Tensor, "3 H W"] | str]:
        image = self.images[index]
        try:
            source, content = _read(image)
            picture = open_image(source, str(image.image))
        except (ImageError, OSError) as error:
            return index, "", str(error)
        return index, content, self.processor(images=picture)["pixel_values"][0]


def _read(image: CaptionedImage) -> tuple[bytes | Image.Image, str]:
    """A picture's file, or the drawn scene, and the digest of its content."""
    source = image.image.read_bytes() if image.image else image.picture
    content = source if isinstance(source, bytes) else source.tobytes()
    return source, hashlib.blake2b(content, digest_size=16).hexdigest()


def _name(image: CaptionedImage) -> str:
    """What tells a picture without reading it."""
    if image.image is None:
        return f"scene {image.scene.split} {image.scene.seed} {image.scene.index}"
    status = image.image.stat()
    return f"{image.image} {status.st_size} {status.st_mtime_ns}"


def _fingerprint(module: nn.Module) -> str:
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, weight in module.named_parameters():
        digest.update(name.encode())
        digest.update(_bytes(weight.detach().cpu()))
    return digest.hexdigest()[:16]


def _checksum(states: Float[Tensor, "P C"]) -> int:
    return zlib.crc32(_bytes(states))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
