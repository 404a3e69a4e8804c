"""Pictures read ahead of the model: by threads, or for a GPU by processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qvision_lab.captioning.images import ImageError, open_image
from qvision_lab.model.processor import QVisionProcessor

THREADS = 2  # that open pictures while the model works on a CPU; more stand in its way
CHUNK = 32  # pictures that a process reads at a time


@dataclass
class Read:
    """Pictures that were read, in order."""

    items: list  # what they were read for: each has a `picture` and a `source`
    errors: list[ImageError | None]
    pixels: UInt8[Tensor, "B H W 3"]  # of those without an error

    @classmethod
    def join(cls, parts: list[Read]) -> Read:
        items, errors = [], []
        for part in parts:
            items += part.items
            errors += part.errors
        return cls(items, errors, torch.cat([part.pixels for part in parts]))

    def split(self, count: int) -> tuple[Read, Read]:
        """The first `count` items, and the others."""
        good = sum(error is None for error in self.errors[:count])
        return (
            Read(self.items[:count], self.errors[:count], self.pixels[:good]),
            Read(self.items[count:], self.errors[count:], self.pixels[good:]),
        )

    def pin_memory(self) -> Read:  # the DataLoader calls it
        return Read(self.items, self.errors, self.pixels.pin_memory())


@dataclass(frozen=True)
class Reader(Dataset):
    """Opens pictures and resizes them as the model takes them."""

    processor: QVisionProcessor
    preset: str
    device: torch.device  # where the pixels go

    def __getitem__(self, item) -> tuple:
        try:
            picture = item.picture() if callable(item.picture) else item.picture
            image = open_image(picture, item.source)
        except ImageError as error:
            return item, error
        return item, self.processor.resize(image, self.preset)

    def collate(self, pairs: list[tuple]) -> Read:
        items, found = [item for item, _ in pairs], [value for _, value in pairs]
        side = self.processor.image_size
        pixels = [value for value in found if not isinstance(value, ImageError)]
        stacked = np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)
        errors = [value if isinstance(value, ImageError) else None for value in found]
        return Read(items, errors, torch.from_numpy(stacked))


def read_with_threads(items: Iterable, reader: Reader, batch_size: int) -> Iterator[Read]:
    """Batches of pictures; while one is used, the next is read."""
    with ThreadPoolExecutor(THREADS) as pool:
        reading = (pool.map(reader.__getitem__, batch) for batch in _batches(items, batch_size))
        ahead = next(reading, None)
        while ahead:
            now, ahead = ahead, next(reading, None)
            yield reader.collate(list(now))


def read_with_processes(
    items: Iterable, reader: Reader, batch_size: int, workers: int
) -> Iterator[Read]:
    """Batches of pictures, pinned for their way to a GPU, which `workers` processes read ahead."""
    chunks = iter(
        DataLoader(
            reader,
            batch_sampler=_batches(items, min(CHUNK, batch_size)),
            num_workers=workers,
            collate_fn=reader.collate,
            pin_memory=torch.cuda.is_available(),
        )
    )
    waiting: list[Read] = []
    for chunk in chunks:
        chunk.pixels = chunk.pixels.to(reader.device, non_blocking=True)
        waiting.append(chunk)
        if sum(len(part.items) for part in waiting) >= batch_size:
            now, rest = Read.join(waiting).split(batch_size)
            waiting = [rest] if rest.items else []
            yield now
    if waiting:
        yield Read.join(waiting)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])
