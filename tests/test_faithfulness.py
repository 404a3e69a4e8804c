"""Scores of maps: exact for maps that know the boxes, chance for those that know nothing."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_images, tiny_captioner, with_noise
from pandas.testing import assert_frame_equal

import qvision_lab as ql
from qvision_lab.data.coco import CaptionDataset, CaptionedImage
from qvision_lab.evaluation.chair import Vocabulary
from qvision_lab.interpretation.faithfulness import (
    check_randomised,
    compare_methods,
    removal_curves,
    score_words,
    summarise,
)
from qvision_lab.interpretation.maps import composition
from qvision_lab.interpretation.trace import trace

SIDE = 112  # a grid of 7 x 7 patches, as in the published model
WORDS = Vocabulary({"dog": "dog", "cat": "cat", "cars": "car"})
CAPTION = "a cat and a dog by two cars"


@pytest.fixture(scope="module")
def captioner(tiny) -> ql.Captioner:
    config = type(tiny.config).from_dict(tiny.config.to_dict())
    config.vision_config.image_size = SIDE
    config.text_config.max_position_embeddings = 256
    torch.manual_seed(0)
    return tiny_captioner(with_noise(ql.QVisionForConditionalGeneration(config).eval()))


@pytest.fixture
def dataset() -> CaptionDataset:
    """Twice as wide as high: a dog in the upper left quarter, two small cars elsewhere."""
    boxes = [("dog", (0, 0, 100, 50)), ("car", (150, 60, 20, 10)), ("car", (150, 85, 20, 10))]
    (image,) = random_images(1, 200, 100)
    drawing = SimpleNamespace(draw=lambda: image)
    images = (CaptionedImage(1, None, (CAPTION,), tuple(boxes), drawing),)
    return CaptionDataset("a dog and two cars", images, SimpleNamespace(vocabulary=WORDS))


def constant(grid: np.ndarray):
    """A method that gives every word the same map."""
    return lambda trace, words: np.tile(grid.ravel(), (len(words), 1))


def one_hot(row: int, column: int) -> np.ndarray:
    grid = np.zeros((7, 7))
    grid[row, column] = 1
    return grid


def cell(table, method, size, measure="pointing"):
    rows = table[(table.method == method) & (table["size"] == size) & (table.measure == measure)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_pointing_is_exact_for_known_maps(captioner, dataset):
    methods = {"in": constant(one_hot(1, 2)), "out": constant(one_hot(6, 6))}
    table = summarise(score_words(captioner, dataset, methods, [CAPTION]))
    assert set(table.method) == {"in", "out", "centre", "chance"}
    assert set(table["size"]) == {"large", "small"}
    assert set(table.measure) == {"pointing", "deletion", "insertion"}
    pointing = summarise(score_words(captioner, dataset, methods, [CAPTION], removal=False))
    assert_frame_equal(pointing, table[table.measure == "pointing"].reset_index(drop=True))
    assert cell(table, "in", "large").value == 1
    assert cell(table, "out", "large").value == 0
    assert cell(table, "chance", "large").value == pytest.approx(1 / 4)
    area = 2 * 11 * 11 / SIDE**2  # both cars, in whole pixels of the preprocessed image
    assert cell(table, "chance", "small").value == pytest.approx(area)
    row = cell(table, "in", "small")
    assert (row.words, row.images, row.low) == (1, 1, 0)  # the cat has no box
    assert row.high == pytest.approx(0.7935, abs=1e-4)  # Wilson's
    with pytest.raises(ValueError, match="no caption names an object"):
        summarise(score_words(captioner, dataset, methods, ["a cat"]))


def test_methods_are_compared_on_the_same_words():
    hits = {"best": [1] * 40, "worse": [1] * 30 + [0] * 10, "same": [1] * 40}
    words = [{"image": i // 2, "size": "large"} for i in range(40)]
    scores = pd.DataFrame(
        word | {"method": name, "pointing": float(hit), "deletion": 0.2 + 0.1 * hit}
        for name, row in hits.items()
        for word, hit in zip(words, row, strict=True)
    )
    both = compare_methods(scores, {"worse": "best", "same": "best"}).set_index("method")
    for measure, difference in (("pointing", -0.25), ("deletion", -0.025)):
        worse, same = both[both.measure == measure].loc[["worse", "same"]].to_dict("records")
        assert worse["difference"] == pytest.approx(difference)
        assert worse["least"] < difference < worse["most"] < 0
        assert worse["p"] < 0.2
        assert (same["difference"], same["p"]) == (pytest.approx(0), pytest.approx(1))
        (alone,) = compare_methods(scores, {"worse": "best"}).query("measure == @measure").p
        assert worse["p"] == pytest.approx(2 * alone)  # Holm's, of two


@pytest.mark.parametrize(("row", "hit"), [(4, 1), (5, 0), (6, 1)])
def test_one_of_several_boxes_is_enough(captioner, dataset, row, hit):
    grid = one_hot(row, 5)  # centres at 64, 79 and 93 of 100, and at 157 of 200
    table = summarise(score_words(captioner, dataset, {"map": constant(grid)}, [CAPTION]))
    assert cell(table, "map", "small").value == hit


def test_removal_curves_end_at_the_words_probability_and_mirror_each_other(captioner, dataset):
    traced = trace(captioner, dataset[0].picture, CAPTION)
    maps = np.random.default_rng(0).random((2, len(traced.words), 49))
    curves = removal_curves(traced, traced.words, maps)
    opposite = removal_curves(traced, traced.words, -maps)
    np.testing.assert_allclose(curves.deletion, opposite.insertion, rtol=1e-4)
    assert (curves.kept[0], curves.kept[-1]) == (1 / 49, 1)
    for curve in (curves.deletion, curves.insertion):
        np.testing.assert_allclose(curve[..., -1], np.tile(traced.probabilities, (2, 1)), rtol=1e-3)
    one = replace(traced, image_tokens=traced.image_tokens[[maps[1, 0].argmax()]])
    alone = removal_curves(one, traced.words[:1], np.zeros((1, 1))).insertion[0, 0]
    assert curves.insertion[1, 0, 0] == pytest.approx(alone, rel=1e-3)


def test_randomised_weights_change_maps_of_the_model_and_no_others(captioner, dataset):
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    fixed = constant(np.arange(49.0))
    table = check_randomised(captioner, dataset, {"maps": composition, "fixed": fixed}, [CAPTION])
    for name, value in captioner.model.state_dict().items():
        assert torch.equal(value, before[name])
    found = {(row.method, row.shuffled): row.value for row in table.itertuples()}
    for part in ("bridge", "Q-Former", "vision"):
        assert found["fixed", part] == pytest.approx(1)
    assert abs(found["maps", "vision"]) < 0.5
    assert (table.measure == "correlation").all()


def test_scenes_bring_their_boxes(captioner):
    dataset = ql.coco.open_dataset("scenes:test", n=4)
    for image in dataset:
        boxes = [box for _, box in image.boxes]
        assert sorted(boxes) == sorted(thing.box for thing in image.drawing.layout.objects)
    captions = [image.references[0] for image in dataset]
    table = summarise(score_words(captioner, dataset, {"maps": composition}, captions))
    named = sum(len(i.drawing.layout.groups) for i in dataset)
    assert table[table.measure == "pointing"].groupby("method").words.sum().eq(named).all()
