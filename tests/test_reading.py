"""Reading ahead: threads and processes give the same batches."""

import os

import pytest
import torch
from conftest import random_images

from qvision_lab.captioning.images import ImageError
from qvision_lab.captioning.reading import Batch, Item, Reader, read_batches


@pytest.fixture
def reader(byte_captioner) -> Reader:
    return Reader(byte_captioner.processor, "training", torch.device("cpu"))


@pytest.fixture
def items(tmp_path) -> list[Item]:
    """75 image files, some of them damaged: more than a process reads at a time."""
    paths = [tmp_path / f"{i}.png" for i in range(75)]
    for path, picture in zip(paths, random_images(75, 30, 20), strict=True):
        picture.save(path)
    for i in (0, 31, 32, 74):
        os.truncate(paths[i], 100)
    return [Item(path, str(path), path.name) for path in paths]


@pytest.mark.parametrize("batch_size", [7, 32, 50, 100])
def test_processes_and_threads_read_the_same(reader, items, batch_size):
    by_threads, by_processes = (
        [
            ([(item, str(error)) for item, error in batch.items], batch.pixels.tolist())
            for batch in read_batches(iter(items), reader, batch_size, workers)
        ]
        for workers in (0, 2)
    )
    assert by_processes == by_threads
    assert [item for pairs, _ in by_threads for item, _ in pairs] == items
    assert [len(pairs) for pairs, _ in by_threads[:-1]] == [batch_size] * (75 // batch_size)


def test_a_process_returns_the_error_of_an_image(reader, items):
    (batch,) = read_batches(items[:3], reader, 3, workers=1)
    (first, error), *others = batch.items
    assert isinstance(error, ImageError)
    assert first.source in str(error)
    assert others == [(item, None) for item in items[1:3]]
    assert batch.pixels.shape == (2, 32, 32, 3)
    start, rest = batch.split(2)
    assert start.pixels.equal(batch.pixels[:1])
    assert Batch.join([start, rest]).pixels.equal(batch.pixels)
    (damaged,) = read_batches(items[:1], reader, 3, workers=1)
    assert damaged.pixels.shape == (0, 32, 32, 3)
    for workers in (0, 1):
        assert list(read_batches([], reader, 4, workers)) == []
