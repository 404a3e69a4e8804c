"""Scenes: layouts and pixels are fixed, images show their layout, folders are COCO's."""

import random
from hashlib import sha256

import numpy as np
import PIL
import pytest
from PIL import Image
from pycocotools.coco import COCO

from qvision_lab import scenes
from qvision_lab.scenes.captions import caption_scene
from qvision_lab.scenes.dataset import SceneDrawing, drawing_version
from qvision_lab.scenes.drawing import sketch
from qvision_lab.scenes.layout import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    HELD_OUT,
    MARGIN,
    PICTURE,
    PREDICATES,
    SPLITS,
    SceneObject,
    holds,
    layout,
    overlap,
)
from qvision_lab.scenes.pen import Pen

TRUTH, CAPTIONS = "fd2af287f5c18720", "d16addd004f90b99"
PIXELS = {"13.0.0": "5e164f437ab55d75"}  # by Pillow's version


def layouts(split, n=500):
    return [layout(split, 0, index) for index in range(n)]


def test_same_seed_same_truth_captions_and_pixels():
    first = {layout(split, seed, 0).objects for split in SPLITS for seed in range(5)}
    assert len(first) == 5 * len(SPLITS)  # and others in every split and for every seed
    with pytest.raises(ValueError, match=r"'dev'.*train"):
        layout("dev", 7, 0)
    drawn = [layout(split, 7, i) for split in SPLITS for i in range(10)]
    assert sha256("\n".join(map(repr, drawn)).encode()).hexdigest()[:16] == TRUTH
    captions = "\n".join(text for truth in drawn for text in caption_scene(truth, 12))
    assert sha256(captions.encode()).hexdigest()[:16] == CAPTIONS
    if PIL.__version__ not in PIXELS:
        pytest.skip(f"no hash recorded for Pillow {PIL.__version__}")
    digest = sha256()
    for scene in scenes.generate(20, split="test", seed=7):
        digest.update(scene.image.tobytes())
        digest.update(np.packbits(scene.masks).tobytes())
    assert digest.hexdigest()[:16] == PIXELS[PIL.__version__]


def test_a_drawing_is_named_by_its_pixels(monkeypatch):
    drawn = list(scenes.generate(32, split="crowd"))  # those that the version is a digest of
    assert {thing.category for scene in drawn for thing in scene.objects} == set(CATEGORIES)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {scene.sky for scene in drawn} == {"sun", "moon", None}
    drawing = SceneDrawing(layout("crowd", 0, 3))
    assert drawing.name == f"scenes/crowd/0/3/{drawing_version()}"
    assert drawing.draw().tobytes() == drawn[3].image.tobytes()
    monkeypatch.setitem(COLORS, "red", (220, 36, 40))
    assert drawing_version.__wrapped__() != drawing_version()


@pytest.mark.parametrize(("split", "allowed"), [("test", 0.05), ("crowd", 0.12)])
def test_boxes_lie_inside_and_hardly_overlap(split, allowed):
    for truth in layouts(split):
        boxes = [thing.box for thing in truth.objects]
        for i, (x, y, width, height) in enumerate(boxes):
            assert min(x, y) >= MARGIN
            assert max(x + width, y + height) <= PICTURE - MARGIN
            assert all(overlap(boxes[i], other) <= allowed for other in boxes[:i])
            assert truth.sky_box is None or overlap(boxes[i], truth.sky_box) == 0


@pytest.mark.parametrize("name", CATEGORIES)
def test_sketch_fills_its_box(name):
    aspect = CATEGORIES[name].aspect
    for side in (26, 53, 110):
        box = (0, 0, round(side * max(aspect, 1)), round(side * max(1 / aspect, 1)))
        tile = sketch(SceneObject(name, "green", "medium", box, pose=side))
        shown = np.asarray(tile.getchannel("A").reduce(2)) >= 128
        for axis in (0, 1):
            (filled,) = shown.any(axis).nonzero()
            assert filled[0] <= 1
            assert filled[-1] >= shown.shape[1 - axis] - 2


def test_masks_lie_in_their_boxes_and_apart():
    for scene in scenes.generate(20, split="crowd"):
        assert scene.masks.shape == (len(scene.objects), PICTURE, PICTURE)
        assert scene.masks.sum(0).max() == 1
        for thing, mask in zip(scene.objects, scene.masks, strict=True):
            x, y, width, height = thing.box
            inside = mask[y : y + height, x : x + width].sum()
            assert inside == mask.sum() > 0.2 * width * height


def test_colors_are_distinct():
    """With every variation of hue and light, a body is nearest to its own colour."""
    palette, tile = np.array(list(COLORS.values())), Image.new("RGB", (8, 8))
    for color in COLORS:
        bodies = np.array([Pen(tile, random.Random(pose), color).body for pose in range(200)])
        for light in (0.9, 1.1):
            nearest = np.abs(palette - (bodies * light).clip(0, 255)[:, None]).sum(2).argmin(1)
            assert {list(COLORS)[i] for i in nearest} == {color}


def test_held_out_pairs_are_only_in_compose():
    assert {name for name, _ in HELD_OUT} == set(CATEGORIES)
    assert {color for _, color in HELD_OUT} == set(COLORS)
    for split in SPLITS:
        for truth in layouts(split):
            pairs = {(thing.category, thing.color) for thing in truth.objects}
            assert bool(pairs & HELD_OUT) == (split == "compose")


def test_distribution_is_no_easier_than_the_prototype():
    table = scenes.describe("test", n=2000)
    assert table["objects per picture"] == pytest.approx(2.1, abs=0.1)
    assert table["shorter side, median px"] <= 53
    assert table["shorter side under 34 px"] >= 0.05
    assert set(table["category"]) == set(CATEGORIES)
    assert sum(table["background"].values()) == pytest.approx(1)
    assert set(scenes.describe("crowd", n=500)["number of objects"]) == set("5678")


def test_groups_come_in_reading_order():
    for truth in layouts("test"):
        groups = truth.groups
        assert len({group.category for group in groups}) == len(groups)
        members = sorted(i for group in groups for i in group.members)
        assert members == list(range(len(truth.objects)))
        centers = [[truth.objects[i].center for i in group.members] for group in groups]
        xs, ys = np.transpose([np.mean(several, axis=0) for several in centers]).tolist()
        upright = len(groups) == 2 and abs(ys[1] - ys[0]) > abs(xs[1] - xs[0])
        assert (ys if upright else xs) == sorted(ys if upright else xs)


def test_relations():
    assert [p for p in PREDICATES if holds(p, (50, 50), (100, 55))] == ["left of"]
    assert [p for p in PREDICATES if holds(p, (50, 50), (10, 10))] == ["right of", "below"]
    assert not any(holds(p, (50, 50), (60, 62)) for p in PREDICATES)
    for truth in layouts("test", 50):
        mirrored = {"left of": "right of", "above": "below"}
        for a, predicate, b in truth.relations:
            assert predicate not in mirrored or (b, mirrored[predicate], a) in truth.relations


def test_workers_change_nothing():
    one, two = (list(scenes.generate(40, start=5, workers=workers)) for workers in (0, 2))
    assert one == two  # in what is true of them
    assert [scene.captions for scene in one] == [scene.captions for scene in two]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(one, two, strict=True))
    assert all(np.array_equal(a.masks, b.masks) for a, b in zip(one, two, strict=True))
    assert one[0].index == 5


def test_coco_folder_is_read_and_resumed(tmp_path):
    scenes.write_coco(tmp_path, 3, split="val")
    first = tmp_path / "images" / "val_0_000000.jpg"
    written = first.stat().st_mtime_ns
    (tmp_path / "images" / "val_0_000004.jpg.partial").write_text("killed while writing")
    scenes.write_coco(tmp_path, 6, split="val")
    assert first.stat().st_mtime_ns == written
    captions, instances = COCO(tmp_path / "captions.json"), COCO(tmp_path / "instances.json")
    assert len(captions.imgs) == 6
    assert {category["name"] for category in instances.cats.values()} == set(CATEGORIES)
    for image_id, scene in enumerate(scenes.generate(6, split="val")):
        rows = captions.loadAnns(captions.getAnnIds(image_id))
        assert [row["caption"] for row in rows] == list(scene.captions)
        rows = instances.loadAnns(instances.getAnnIds(image_id))
        assert [tuple(row["bbox"]) for row in rows] == [thing.box for thing in scene.objects]
        masks = np.stack([instances.annToMask(row) for row in rows])
        assert np.array_equal(masks, scene.masks)
    assert not list(tmp_path.rglob("*.partial"))
    for other in ({"split": "test"}, {"split": "val", "seed": 1}):
        with pytest.raises(ValueError, match="another folder"):
            scenes.write_coco(tmp_path, 1, **other)
