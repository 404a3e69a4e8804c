"""The cache of what the tower sees: right, shared, resumed, and refused where it is not."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.data.coco import CaptionDataset, CaptionedImage, open_dataset
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import features
from qvision_lab.training.features import FeatureCache


def draw(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pictures(tmp_path) -> CaptionDataset:
    """Seven pictures, of which two have the same content."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [draw(folder / f"{i}.png", seed=i % 6) for i in range(7)]
    return CaptionDataset("seven", tuple(CaptionedImage(f.name, f, ("a b",)) for f in files))


@pytest.fixture
def processor(tiny, byte_tokenizer) -> QVisionProcessor:
    return QVisionProcessor.from_config(tiny.config, byte_tokenizer)


def see(cache, pictures, tiny, processor, **settings):
    return cache.see(pictures, tiny, processor, **{"batch_size": 3, **settings})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_towers(tmp_path, tiny, pictures, processor, dtype):
    cache = FeatureCache(tmp_path / "cache", tiny, dtype)
    seen = see(cache, pictures, tiny, processor)
    assert seen.added == 6
    assert seen.rows["0.png"] == seen.rows["6.png"]
    assert not seen.failed
    for image in pictures:
        pixels = processor(images=Image.open(image.image))["pixel_values"]
        with torch.no_grad():
            states = tiny.vision.see(pixels)[0].to(features.DTYPES[dtype])
        torch.testing.assert_close(cache[seen.rows[image.image_id]], states, atol=1e-5, rtol=1e-2)


def test_what_was_seen_is_not_seen_again(tmp_path, tiny, pictures, processor, monkeypatch):
    folder = tmp_path / "cache"
    first = see(FeatureCache(folder, tiny, "float32"), pictures, tiny, processor)
    cache = FeatureCache(folder, tiny, "float32")
    with monkeypatch.context() as patched:  # nor read again
        patched.setattr(features, "_read", lambda image: pytest.fail("read a known file"))
        again = see(cache, pictures.subset(3), tiny, processor)
    assert again.added == 0
    assert again.rows == {key: first.rows[key] for key in again.rows}
    moved = tmp_path / "moved"
    (tmp_path / "pictures").rename(moved)
    there = CaptionDataset(
        "moved", tuple(CaptionedImage(i.image_id, moved / i.image.name, ("c",)) for i in pictures)
    )
    assert see(cache, there, tiny, processor).rows == first.rows
    draw(moved / "2.png", seed=99)
    changed = see(cache, there, tiny, processor)
    assert changed.added == 1
    assert changed.rows["2.png"] == 6
    torch.testing.assert_close(pickle.loads(pickle.dumps(cache))[6], cache[6])


def test_an_interrupted_build_goes_on(tmp_path, tiny, pictures, processor, monkeypatch):
    whole = FeatureCache(tmp_path / "whole", tiny, "float32")
    see(whole, pictures, tiny, processor)
    torn = FeatureCache(tmp_path / "torn", tiny, "float32")
    looks = iter([torch.ones(3, 4, 16)])
    with monkeypatch.context() as patched:
        patched.setattr(tiny.vision, "see", lambda pixels: next(looks))
        with pytest.raises(StopIteration):
            see(torn, pictures, tiny, processor)
    with open(tmp_path / "torn/states.bin", "ab") as data:
        data.write(b"half a row")
    with open(tmp_path / "torn/index.jsonl", "ab") as index:
        index.write(b'{"name": "half a li')
    resumed = FeatureCache(tmp_path / "torn", tiny, "float32")
    seen = see(resumed, pictures, tiny, processor, workers=1)
    assert seen.added == 3
    assert len(seen.rows) == 7
    for row in range(3, 6):
        torch.testing.assert_close(resumed[row], whole[row], atol=0, rtol=0)


def test_bad_pictures_are_reported_and_stop_nothing(tmp_path, tiny, pictures, processor):
    pictures[1].image.write_bytes(b"no picture")
    pictures[4].image.unlink()
    cache = FeatureCache(tmp_path / "cache", tiny, "bfloat16")
    for _ in ("built", "known"):
        seen = see(cache, pictures, tiny, processor)
        assert seen.failed.keys() == {"1.png", "4.png"}
        assert "1.png" in seen.failed["1.png"]
        assert len(seen.rows) == 5


def test_a_stale_cache_is_refused_with_the_reason(tmp_path, tiny, pictures, processor):
    folder = tmp_path / "cache"
    see(FeatureCache(folder, tiny, "bfloat16"), pictures, tiny, processor)
    with pytest.raises(ValueError, match="dtype bfloat16, not float32"):
        FeatureCache(folder, tiny, "float32")
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.vision.tower.embeddings.class_embedding[0] += 1e-3
    with pytest.raises(ValueError, match=r"tower \w+, not \w+"):
        FeatureCache(folder, other, "bfloat16")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        FeatureCache(tmp_path / "none", tiny, "int8")


def test_a_damaged_cache_is_refused_with_the_reason(tmp_path, tiny, pictures, processor):
    folder = tmp_path / "cache"
    cache = FeatureCache(folder, tiny, "float32")
    seen = see(cache, pictures, tiny, processor)
    states = folder / "states.bin"
    content = bytearray(states.read_bytes())
    content[cache.row_bytes + 5] ^= 1
    states.write_bytes(content)
    damaged = FeatureCache(folder, tiny, "float32")
    assert damaged[seen.rows["0.png"]].shape == (4, 16)
    with pytest.raises(ValueError, match=r"row 1 of .* is damaged"):
        damaged[1]
    states.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="torn"):
        FeatureCache(folder, tiny, "float32")
    (folder / "index.jsonl").write_text('{"name": 1}\n')
    with pytest.raises(ValueError, match=r"index\.jsonl is damaged"):
        FeatureCache(folder, tiny, "float32")


def test_no_room_is_said_before_anything_is_seen(tmp_path, tiny, pictures, processor, monkeypatch):
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: full)
    cache = FeatureCache(tmp_path / "cache", tiny, "float32")
    with pytest.raises(OSError, match=r"7 pictures need .* GB .* are free"):
        see(cache, pictures, tiny, processor)


def test_scenes_are_known_by_name_and_checked_by_drawing(tmp_path, tiny, processor):
    folder = tmp_path / "cache"
    scenes = open_dataset("scenes:val", n=3, seed=4)
    cache = FeatureCache(folder, tiny, "float32")
    seen = see(cache, scenes, tiny, processor)
    assert see(cache, scenes, tiny, processor).rows == seen.rows
    index = folder / "index.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    lines[0]["content"] = "other"
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="drawn otherwise"):
        see(FeatureCache(folder, tiny, "float32"), scenes, tiny, processor)
