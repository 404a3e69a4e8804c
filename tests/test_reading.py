"""Pictures read ahead: the same batches by threads and by processes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.captioning.images import ImageError
from qvision_lab.captioning.reading import Read, Reader, read_with_processes, read_with_threads
from qvision_lab.model.processor import QVisionProcessor


@pytest.fixture
def reader(tiny, byte_tokenizer) -> Reader:
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    return Reader(processor, "training", torch.device("cpu"))


@pytest.fixture
def items(tmp_path) -> list[SimpleNamespace]:
    """75 picture files, some of them damaged: more than a process reads at a time."""
    items = []
    for i in range(75):
        path = tmp_path / f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        if i in (0, 31, 32, 74):
            path.write_bytes(path.read_bytes()[:100])
        items.append(SimpleNamespace(picture=path, source=str(path)))
    return items


def as_lists(batches) -> list[tuple]:
    return [
        ([item.source for item in read.items], [str(e) for e in read.errors], read.pixels.tolist())
        for read in batches
    ]


@pytest.mark.parametrize("batch_size", [7, 32, 50, 100])
def test_processes_read_what_threads_do(reader, items, batch_size):
    by_threads = as_lists(read_with_threads(iter(items), reader, batch_size))
    by_processes = as_lists(read_with_processes(iter(items), reader, batch_size, workers=2))
    assert by_processes == by_threads
    sources = [source for batch, _, _ in by_threads for source in batch]
    assert sources == [item.source for item in items]
    assert [len(batch) for batch, _, _ in by_threads[:-1]] == [batch_size] * (75 // batch_size)


def test_a_process_hands_back_what_is_wrong_with_a_picture(reader, items):
    (read,) = read_with_processes(items[:3], reader, 3, workers=1)
    assert isinstance(read.errors[0], ImageError)
    assert items[0].source in str(read.errors[0])
    assert read.errors[1:] == [None, None]
    assert read.pixels.shape == (2, 32, 32, 3)
    first, rest = read.split(2)
    assert first.pixels.equal(read.pixels[:1])
    assert Read.join([first, rest]).pixels.equal(read.pixels)
    (damaged,) = read_with_processes(items[:1], reader, 3, workers=1)
    assert damaged.pixels.shape == (0, 32, 32, 3)


def test_nothing_is_read_of_nothing(reader):
    assert list(read_with_threads([], reader, 4)) == []
    assert list(read_with_processes([], reader, 4, workers=1)) == []
