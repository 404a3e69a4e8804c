"""The cache of vision states: correct, shared, resumed, and refused where it does not fit."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.data.coco import CaptionDataset, CaptionedImage, open_dataset
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.scenes.dataset import SceneDrawing
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


def encode(cache, pictures, tiny, processor, **settings):
    return cache.encode(pictures, tiny, processor, **{"batch_size": 3, **settings})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_towers(tmp_path, tiny, pictures, processor, dtype):
    cached = encode(FeatureCache(tmp_path / "cache", tiny, dtype), pictures, tiny, processor)
    assert len(set(cached.places.values())) == 6
    assert cached.places["0.png"] == cached.places["6.png"]
    assert not cached.failed
    for image in pictures:
        pixels = processor(images=Image.open(image.image))["pixel_values"]
        with torch.no_grad():
            states = tiny.vision.encode(pixels)[0].to(features.DTYPES[dtype])
        torch.testing.assert_close(cached[image.image_id], states, atol=1e-5, rtol=1e-2)


def test_known_images_are_not_encoded_again(tmp_path, tiny, pictures, processor, monkeypatch):
    folder = tmp_path / "cache"
    first = encode(FeatureCache(folder, tiny, "float32"), pictures, tiny, processor)
    cache = FeatureCache(folder, tiny, "float32")
    with monkeypatch.context() as patched:
        patched.setattr(tiny.vision, "encode", lambda pixels: pytest.fail("encoded a known image"))
        with patched.context() as unread:
            unread.setattr(Path, "read_bytes", lambda path: pytest.fail("read a known file"))
            again = encode(cache, pictures.subset(3), tiny, processor)
        assert again.places == {key: first.places[key] for key in again.places}
        moved = tmp_path / "moved"
        (tmp_path / "pictures").rename(moved)
        images = (replace(image, image=moved / image.image.name) for image in pictures)
        there = CaptionDataset("moved", tuple(images))
        assert encode(cache, there, tiny, processor).places == first.places
    draw(moved / "2.png", seed=99)
    changed = encode(cache, there, tiny, processor)
    assert {key for key in first.places if changed.places[key] != first.places[key]} == {"2.png"}


def test_an_interrupted_build_resumes(tmp_path, tiny, pictures, processor, monkeypatch):
    whole = encode(FeatureCache(tmp_path / "whole", tiny, "float32"), pictures, tiny, processor)
    torn = FeatureCache(tmp_path / "torn", tiny, "float32")
    states = iter([torch.ones(3, 4, 16)])
    with monkeypatch.context() as patched:
        patched.setattr(tiny.vision, "encode", lambda pixels: next(states))
        with pytest.raises(StopIteration):
            encode(torn, pictures, tiny, processor)
    (tmp_path / "torn/half.123").write_bytes(b"half a file")
    resumed = FeatureCache(tmp_path / "torn", tiny, "float32")
    cached = encode(resumed, pictures, tiny, processor, workers=1)
    assert (cached["2.png"] == 1).all()
    for name in ("3.png", "4.png", "5.png"):
        torch.testing.assert_close(cached[name], whole[name], atol=0, rtol=0)


def test_bad_pictures_are_reported_and_stop_nothing(tmp_path, tiny, pictures, processor):
    pictures[1].image.write_bytes(b"no picture")
    pictures[4].image.unlink()
    cache = FeatureCache(tmp_path / "cache", tiny, "bfloat16")
    for _ in ("built", "known"):
        cached = encode(cache, pictures, tiny, processor)
        assert cached.failed.keys() == {"1.png", "4.png"}
        assert "1.png" in cached.failed["1.png"]
        assert len(cached.places) == 5


def test_a_stale_cache_is_refused_with_the_reason(tmp_path, tiny, pictures, processor):
    folder = tmp_path / "cache"
    encode(FeatureCache(folder, tiny, "bfloat16"), pictures, tiny, processor)
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
    encode(FeatureCache(folder, tiny, "float32"), pictures, tiny, processor)
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    for torn in (content[:-1], content[:20], b""):
        file.write_bytes(torn)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*: delete it"):
            FeatureCache(folder, tiny, "float32")


def test_a_full_disk_is_an_error_before_anything_is_encoded(
    tmp_path, tiny, pictures, processor, monkeypatch
):
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: full)
    cache = FeatureCache(tmp_path / "cache", tiny, "float32")
    with pytest.raises(OSError, match=r"7 images need .* GB .* are free"):
        encode(cache, pictures, tiny, processor)


def test_drawings_of_known_names_are_not_drawn_again(tmp_path, tiny, processor, monkeypatch):
    scenes = open_dataset("scenes:val", n=3, seed=4)
    cache = FeatureCache(tmp_path / "cache", tiny, "float32")
    cached = encode(cache, scenes, tiny, processor)
    monkeypatch.setattr(SceneDrawing, "draw", lambda drawing: pytest.fail("drew a known scene"))
    cache = FeatureCache(tmp_path / "cache", tiny, "float32")
    assert encode(cache, scenes, tiny, processor) == cached
