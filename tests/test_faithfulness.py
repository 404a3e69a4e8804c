"""Scores of maps: exact for maps that know the boxes, chance for those that know nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import open_dataset
from qvision_lab.evaluation.chair import scenes_vocabulary
from qvision_lab.interpretation.faithfulness import (
    Example,
    check_randomised,
    examples_of,
    removal_curves,
    score_maps,
)
from qvision_lab.interpretation.maps import composition, occlusion
from qvision_lab.interpretation.trace import trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.processor import QVisionProcessor

SIDE, PATCH = 112, 16  # a grid of 7 x 7, as in the published model


@pytest.fixture(scope="module")
def model(tiny) -> QVisionForConditionalGeneration:
    config = type(tiny.config).from_dict(tiny.config.to_dict())
    config.vision_config.image_size = SIDE
    config.text_config.max_position_embeddings = 256
    torch.manual_seed(0)
    model = QVisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def captioner(model, byte_tokenizer) -> Captioner:
    return Captioner(model, QVisionProcessor.from_config(model.config, byte_tokenizer))


@pytest.fixture
def example() -> Example:
    """Twice as wide as high: a dog in the upper left quarter, two small cars elsewhere."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (100, 200, 3), np.uint8))
    cars = [(150, 60, 20, 10), (150, 85, 20, 10)]
    boxes = {"dog": [(0, 0, 100, 50)], "car": cars}
    return Example(picture, boxes, scenes_vocabulary(), "a cat and a dog by two cars")


def knowing(grid: np.ndarray):
    """A method whose map is known beforehand."""
    return lambda trace, words: np.tile(grid.ravel(), (len(words), 1))


def cell(table, method, size, measure):
    rows = table[(table.method == method) & (table["size"] == size) & (table.measure == measure)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_maps_that_know_the_boxes_score_exactly(captioner, example):
    inside, outside = np.zeros((7, 7)), np.zeros((7, 7))
    inside[1, 2] = outside[6, 6] = 1
    table = score_maps(captioner, [example], {"in": knowing(inside), "out": knowing(outside)})
    assert set(table.method) == {"in", "out", "centre", "chance"}
    assert set(table["size"]) == {"large", "small"}
    assert cell(table, "in", "large", "pointing").value == 1
    assert cell(table, "in", "large", "mass").value == 1
    assert cell(table, "out", "large", "pointing").value == 0
    assert cell(table, "out", "large", "mass").value == 0
    for measure in ("pointing", "mass"):
        assert cell(table, "chance", "large", measure).value == pytest.approx(1 / 4)
        area = 2 * 11 * 11 / SIDE**2  # both cars, in whole pixels of what the model sees
        assert cell(table, "chance", "small", measure).value == pytest.approx(area)
    row = cell(table, "in", "small", "pointing")
    assert (row.words, row.images, row.low, row.high) == (1, 1, 0, 0)  # the cat is not there


def test_one_of_several_boxes_is_enough(captioner, example):
    for row, hit in ((4, 1), (5, 0), (6, 1)):  # centres at 64, 79 and 93 of 100
        grid = np.zeros((7, 7))
        grid[row, 5] = 1  # at 157 of 200
        table = score_maps(captioner, [example], {"map": knowing(grid)})
        assert cell(table, "map", "small", "pointing").value == hit


def test_removal_curves_end_at_the_words_probability_and_mirror_each_other(captioner, example):
    traced = trace(captioner, example.image, example.caption)
    maps = np.random.default_rng(0).random((2, len(traced.words), 49))
    curves = removal_curves(traced, traced.words, maps)
    opposite = removal_curves(traced, traced.words, -maps)
    np.testing.assert_allclose(curves.deletion, opposite.insertion, rtol=1e-4)
    assert (curves.kept[0], curves.kept[-1]) == (1 / 49, 1)
    whole = [np.exp(traced.logprobs[list(word.tokens)].sum()) for word in traced.words]
    for curve in (curves.deletion, curves.insertion):
        np.testing.assert_allclose(curve[..., -1], np.tile(whole, (2, 1)), rtol=1e-3)
    without = traced.image_tokens[[maps[1, 0].argmax()]]  # one patch alone
    one = replace(traced, image_tokens=without)
    alone = removal_curves(one, traced.words[:1], np.zeros((1, 1))).insertion[0, 0]
    assert curves.insertion[1, 0, 0] == pytest.approx(alone, rel=1e-3)


def test_randomised_weights_change_maps_of_the_model_and_no_others(captioner, example):
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    fixed = knowing(np.arange(49.0))
    table = check_randomised(captioner, [example], {"maps": composition, "fixed": fixed})
    for name, value in captioner.model.state_dict().items():
        assert torch.equal(value, before[name])
    found = {(row.method, row.shuffled): row.value for row in table.itertuples()}
    for part in ("bridge", "Q-Former", "vision"):
        assert found["fixed", part] == pytest.approx(1)
    assert abs(found["maps", "vision"]) < 0.5
    assert (table.measure == "correlation").all()


def test_scenes_bring_their_boxes(captioner):
    dataset = open_dataset("scenes:test", n=4)
    for example, image in zip(examples_of(dataset), dataset, strict=True):
        boxes = [box for found in example.boxes.values() for box in found]
        assert sorted(boxes) == sorted(thing.box for thing in image.scene.objects)
        assert set(example.boxes) == image.objects
    pairs = zip(examples_of(dataset), dataset, strict=True)
    told = [replace(example, caption=image.references[0]) for example, image in pairs]
    table = score_maps(captioner, told, {"maps": composition}, batch_size=3)
    again = score_maps(captioner, told, {"maps": composition}, batch_size=4)
    assert (table.value - again.value).abs().max() < 1e-4
    named = sum(len(i.scene.groups) for i in dataset)
    assert table[table.measure == "pointing"].groupby("method").words.sum().eq(named).all()


def test_nothing_named_is_an_error(captioner, example):
    with pytest.raises(ValueError, match="no caption names anything"):
        score_maps(captioner, [replace(example, caption="a cat")], {"maps": composition})


def test_on_coco_a_random_model_points_by_chance(captioner, shared):
    """The machinery runs on photos; a map that knows nothing stays near the share of the boxes."""
    dataset = open_dataset(shared / "coco_mini", n=15)
    instances = shared / "coco_mini" / "annotations" / "instances_train2017.json"
    told = [
        replace(example, caption=image.references[0])
        for example, image in zip(examples_of(dataset, instances), dataset, strict=True)
    ]
    table = score_maps(captioner, told, {"maps": occlusion})
    found, chance = (cell(table, name, "large", "pointing") for name in ("maps", "chance"))
    assert found.words > 15
    assert found.low - 0.1 < chance.value < found.high + 0.1
    rows = json.loads(instances.read_text(encoding="utf-8"))["annotations"]
    there = [row for row in rows if row["image_id"] in dataset.ids]
    assert sum(len(boxes) for e in told for boxes in e.boxes.values()) == len(there) > 0
