"""Reading images ahead of the model: by threads, or for a GPU by processes."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qvision_lab.captioning.images import ImageError, Picture, open_image
from qvision_lab.model.processor import QVisionProcessor

THREADS = 2  # that open images while the model works on a CPU; more slow it down
MANY = 512  # image files, from which on processes read them for a GPU
CHUNK = 32  # images that a process reads at a time


@dataclass(frozen=True)
class Item:
    """An image to caption: its name in records, and the key that its random draws depend on."""

    picture: Picture | Callable[[], Picture]  # a callable is called when the image is read
    source: str
    key: str
    content: str | None = None  # identifies its content: a drawing's name, a file's size and time


@dataclass
class Batch:
    """Images that were read, in order."""

    items: list[tuple[Item, ImageError | None]]
    pixels: UInt8[Tensor, "B H W 3"]  # of those without an error

    @classmethod
    def join(cls, parts: list["Batch"]) -> "Batch":
        items = [pair for part in parts for pair in part.items]
        return cls(items, torch.cat([part.pixels for part in parts]))

    def split(self, count: int) -> "tuple[Batch, Batch]":
        """The first `count` items, and the others."""
        good = sum(error is None for _, error in self.items[:count])
        first = Batch(self.items[:count], self.pixels[:good])
        return first, Batch(self.items[count:], self.pixels[good:])

    def pin_memory(self) -> "Batch":  # the DataLoader calls it
        return Batch(self.items, self.pixels.pin_memory())


@dataclass(frozen=True)
class Reader(Dataset):
    """Opens images and resizes them to the model's input size."""

    processor: QVisionProcessor
    preset: str
    device: torch.device  # where the pixels go

    def __getitem__(self, item: Item) -> tuple[Item, ImageError | np.ndarray]:
        try:
            picture = item.picture() if callable(item.picture) else item.picture
            image = open_image(picture, item.source)
        except ImageError as error:
            return item, error
        return item, self.processor.resize(image, self.preset)

    def collate(self, pairs: Iterable[tuple[Item, ImageError | np.ndarray]]) -> Batch:
        pairs, side = list(pairs), self.processor.image_size
        items = [(item, value if isinstance(value, ImageError) else None) for item, value in pairs]
        pixels = [value for _, value in pairs if not isinstance(value, ImageError)]
        stacked = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
        return Batch(items, torch.from_numpy(stacked))


def count_workers(device: torch.device, total: int | None, sharing: int) -> int:
    """Number of processes that read images: for many and a GPU, all cores but one; else 0."""
    if device.type != "cuda" or (total is not None and total < MANY):
        return 0
    return max(1, os.cpu_count() // sharing - 1)


def read_batches(
    items: Iterable[Item], reader: Reader, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """Batches of images, of which the next are read by `workers` processes, or threads (0)."""
    if not workers:
        with ThreadPoolExecutor(THREADS) as pool:
            reading = (pool.map(reader.__getitem__, batch) for batch in _chunks(items, batch_size))
            ahead = next(reading, None)
            while ahead:
                now, ahead = ahead, next(reading, None)
                yield reader.collate(now)
        return
    parts = (_chunks(batch, CHUNK) for batch in _chunks(items, batch_size))
    chunks = DataLoader(
        reader,
        batch_sampler=chain.from_iterable(parts),
        num_workers=workers,
        collate_fn=reader.collate,
        pin_memory=torch.cuda.is_available(),
    )
    moved = (Batch(x.items, x.pixels.to(reader.device, non_blocking=True)) for x in chunks)
    for several in _chunks(moved, -(-batch_size // CHUNK)):  # those of one batch
        yield Batch.join(several)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])
