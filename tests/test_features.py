"""The cache of vision states: correct, shared, resumed, and refused where it does not fit."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_images
from PIL import Image, ImageOps

from qvision_lab.data.coco import CaptionDataset, CaptionedImage, open_dataset
from qvision_lab.scenes.dataset import SceneDrawing
from qvision_lab.training import features
from qvision_lab.training.features import FeatureCache


@pytest.fixture
def pictures(tmp_path) -> CaptionDataset:
    """Seven pictures, of which two have the same content."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    drawn = random_images(6)
    for i, picture in enumerate([*drawn, drawn[0]]):
        picture.save(folder / f"{i}.png")
    files = sorted(folder.iterdir())
    return CaptionDataset("seven", tuple(CaptionedImage(f.name, f, ("a b",)) for f in files))


@pytest.fixture
def encode(tmp_path, byte_captioner):
    """Encode images into a cache in a folder, three at a time."""
    model, processor = byte_captioner.model, byte_captioner.processor

    def encode(images, folder="cache", dtype="float32", **settings):
        cache = FeatureCache(tmp_path / folder, model, dtype)
        return cache.encode(images, model, processor, batch_size=3, **settings)

    return encode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_the_towers(encode, byte_captioner, pictures, dtype):
    cached = encode(pictures, dtype=dtype)
    assert len({place for views in cached.places.values() for place in views}) == 6
    assert cached.places["0.png"] == cached.places["6.png"]
    assert not cached.failed
    for image in pictures:
        pixels = byte_captioner.processor(images=Image.open(image.image))["pixel_values"]
        with torch.no_grad():
            states = byte_captioner.model.vision.encode(pixels)[0].to(features.DTYPES[dtype])
        torch.testing.assert_close(cached.view(image.image_id), states, atol=1e-5, rtol=1e-2)


def test_known_images_are_not_encoded_again(tmp_path, tiny, encode, pictures, monkeypatch):
    first = encode(pictures)
    with monkeypatch.context() as patched:
        patched.setattr(tiny.vision, "encode", lambda pixels: pytest.fail("encoded a known image"))
        with patched.context() as unread:
            unread.setattr(Path, "read_bytes", lambda path: pytest.fail("read a known file"))
            again = encode(pictures.subset(3))
        assert again.places == {key: first.places[key] for key in again.places}
        moved = (tmp_path / "pictures").rename(tmp_path / "moved")
        images = (replace(image, image=moved / image.image.name) for image in pictures)
        there = CaptionDataset("moved", tuple(images))
        assert encode(there).places == first.places
    Image.new("RGB", (9, 9)).save(moved / "2.png")
    changed = encode(there).places
    assert {key for key in first.places if changed[key] != first.places[key]} == {"2.png"}


def test_views_are_the_image_mirrored_and_cut(encode, byte_captioner, pictures):
    plain, cached = encode(pictures), encode(pictures, views=3)
    for image in pictures:
        views = [cached.view(image.image_id, number) for number in range(3)]
        assert torch.equal(views[0], plain.view(image.image_id))
        mirrored = byte_captioner.processor(images=ImageOps.mirror(Image.open(image.image)))
        with torch.no_grad():
            states = byte_captioner.model.vision.encode(mirrored.pixel_values)[0]
        torch.testing.assert_close(views[1], states, atol=1e-5, rtol=1e-2)
    side, noise = 32, np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image, names = Image.fromarray(noise), (f"{n}" * 32 + "-crop" for n in (1, 1, 2))
    crops = [features.draw_view(image, name, side) for name in names]
    assert crops[0] == crops[1] != crops[2]
    again = encode(pictures, "afresh", views=3)
    assert again.places.keys() == cached.places.keys()
    assert torch.equal(again.view("2.png", 2), cached.view("2.png", 2))


def test_an_interrupted_build_resumes(tmp_path, tiny, encode, pictures, monkeypatch):
    whole = encode(pictures, "whole")
    states = iter([torch.ones(3, 4, 16)])
    with monkeypatch.context() as patched:
        patched.setattr(tiny.vision, "encode", lambda pixels: next(states))
        with pytest.raises(StopIteration):
            encode(pictures, "torn")
    (tmp_path / "torn/half.123").write_bytes(b"half a file")
    cached = encode(pictures, "torn", workers=1)
    assert (cached.view("2.png") == 1).all()
    for name in ("3.png", "4.png", "5.png"):
        torch.testing.assert_close(cached.view(name), whole.view(name), atol=0, rtol=0)


def test_bad_pictures_are_reported_and_stop_nothing(encode, pictures):
    pictures[1].image.write_bytes(b"no picture")
    pictures[4].image.unlink()
    for _ in ("built", "known"):
        cached = encode(pictures, dtype="bfloat16")
        assert cached.failed.keys() == {"1.png", "4.png"}
        assert "1.png" in cached.failed["1.png"]
        assert len(cached.places) == 5


def test_a_stale_or_damaged_cache_is_refused_with_the_reason(tmp_path, tiny, encode, pictures):
    encode(pictures)
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="dtype float32, not bfloat16"):
        FeatureCache(folder, tiny, "bfloat16")
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.vision.tower.embeddings.class_embedding[0] += 1e-3
    with pytest.raises(ValueError, match=r"tower \w+, not \w+"):
        FeatureCache(folder, other, "float32")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        FeatureCache(tmp_path / "none", tiny, "int8")
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    for torn in (content[:-1], content[:20], b""):
        file.write_bytes(torn)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .*: delete it"):
            FeatureCache(folder, tiny, "float32")


def test_a_full_disk_is_an_error_before_anything_is_encoded(encode, pictures, monkeypatch):
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match=r"7 images need .* GB .* are free"):
        encode(pictures)


def test_drawings_of_known_names_are_not_drawn_again(encode, monkeypatch):
    scenes = open_dataset("scenes:val", n=3, seed=4)
    cached = encode(scenes)
    monkeypatch.setattr(SceneDrawing, "draw", lambda drawing: pytest.fail("drew a known scene"))
    assert encode(scenes) == cached
