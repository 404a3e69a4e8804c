"""Measures of queries on matrices and models where they are exact, and the verdict on these."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_images, tiny_captioner
from PIL import Image
from test_variants import VARIANTS, varied
from torch import nn

import qvision_lab as ql
from qvision_lab.data.coco import CaptionDataset, CaptionedImage
from qvision_lab.figures import COLLAPSE, collapse_table
from qvision_lab.interpretation import collapse as measures
from qvision_lab.interpretation.collapse import THRESHOLDS, TOLERANCE, fit_thresholds
from qvision_lab.model.qformer import QFormerOutput

TEXTS = ("a red car", "two dogs!", "the beach", "no words")


def dataset_of(images: list[Image.Image]) -> CaptionDataset:
    drawings = [SimpleNamespace(draw=lambda image=image: image) for image in images]
    pairs = enumerate(zip(drawings, TEXTS, strict=False))
    return CaptionDataset(
        "test", tuple(CaptionedImage(i, None, (t,), None, d) for i, (d, t) in pairs)
    )


@pytest.fixture
def dataset() -> CaptionDataset:
    return dataset_of(random_images(4))


@pytest.fixture
def collapsed(tiny) -> ql.Captioner:
    """A model of which all queries are equal."""
    model = copy.deepcopy(tiny)
    model.qformer.query_tokens = nn.Parameter(model.qformer.global_token.repeat(1, 4, 1))
    return tiny_captioner(model)


class HandMade(nn.Module):
    """Visual tokens made from the mean of the image tokens, and uniform maps."""

    def __init__(self, make):
        super().__init__()
        self.make, self.blocks = make, ()

    def forward(self, image_tokens, output_attentions=False):
        visual_tokens = self.make(image_tokens.mean(1, keepdim=True))  # [B,N,D]
        shape = len(image_tokens), 8, visual_tokens.shape[1], image_tokens.shape[1]
        return QFormerOutput(visual_tokens, None, (torch.full(shape, 1 / shape[-1]),))


def measure_made(tiny, make, images) -> dict[str, float]:
    model = copy.deepcopy(tiny)
    model.qformer = HandMade(make)
    return measures.measure_queries(tiny_captioner(model), dataset_of(images))


def test_equal_queries_are_collapsed(collapsed, dataset):
    found = ql.diagnose(collapsed, dataset, muted=3)
    assert found.effective_rank == pytest.approx(1, abs=1e-3)
    assert found.query_cosine == pytest.approx(1, abs=1e-4)
    assert found.same_peak == 1
    assert found.changed == 0
    assert found.collapsed is True
    assert found.retrieval in (0, 0.25, 0.5, 0.75, 1)
    assert (found.pictures, found.tokens, found.muted, found.lacks) == (4, 5, 3, ())
    assert found.verdict == (
        "Collapsed: 3 of 3 measures are beyond their thresholds, and muting all queries but one "
        "changes none of 3 captions."
    )
    assert "0.000" in str(found)


def test_muted_captions_are_those_of_the_captioner(byte_captioner, dataset):
    """The least changed caption, one by one."""
    model, pictures = byte_captioner.model, [image.picture for image in dataset]
    whole = [caption.token_ids for caption in byte_captioner.caption(pictures, preset="greedy")]
    shares = []
    for kept in range(4):
        others = [query for query in range(4) if query != kept]
        with ql.interventions.mute(model, queries=others):
            captions = byte_captioner.caption(pictures, preset="greedy")
        pairs = zip(captions, whole, strict=True)
        shares.append(np.mean([caption.token_ids != ids for caption, ids in pairs]))
    found = ql.diagnose(byte_captioner, dataset)
    assert found.changed == pytest.approx(min(shares))
    assert found.changed > 0
    assert 1.5 < found.effective_rank <= 5
    assert found.collapsed is False
    assert found.verdict.startswith("Not collapsed: ")
    assert found.distinct == len({*whole}) / 4


def test_orthogonal_tokens_have_full_rank_and_constants_do_not_count(tiny):
    images = random_images(2)
    axes = torch.eye(32)[:5]
    constants = 100 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    made = measure_made(tiny, lambda mean: axes * mean[..., :1] + constants, images)
    assert made["effective_rank"] == pytest.approx(5, abs=1e-2)
    assert made["query_cosine"] == pytest.approx(0, abs=1e-2)
    assert made["attention_entropy"] == pytest.approx(1, abs=1e-5)
    assert made["sink"] == pytest.approx(0.25, abs=1e-6)
    same = measure_made(tiny, lambda mean: mean + axes, images)
    assert same["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert same["query_cosine"] == pytest.approx(1, abs=1e-4)
    blind = measure_made(tiny, lambda mean: 0 * mean + axes, images)
    assert blind["query_cosine"] == 0
    assert measure_made(tiny, lambda mean: (mean + axes) * torch.nan, images) == {}  # has diverged


def test_measures_of_made_up_tokens_and_maps():
    assert measures.effective_rank(torch.eye(6)[None]) == pytest.approx(6)
    assert measures.effective_rank(torch.ones(2, 6, 4)) == pytest.approx(1, abs=1e-4)
    two = torch.diag(torch.tensor([2.0, 1.0]))[None]  # shares 2/3 and 1/3
    expected = np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    assert measures.effective_rank(two) == pytest.approx(expected)
    rows = torch.tensor([[[1.0, 0], [0, 2], [3, 0]], [[1, 0], [1, 0], [-1, 0]]])
    assert measures.mean_cosine(rows) == pytest.approx((1 / 3 - 1 / 3) / 2, abs=1e-6)
    maps = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], [[0.25] * 4, [0, 0, 0, 1]]])
    assert measures.attention_entropy(maps) == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    assert measures.sink_share(maps) == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
    peaks = [torch.tensor([3, 3, 1]), torch.tensor([0, 2]), torch.tensor([], dtype=torch.long)]
    assert measures.same_peak(peaks) == 3 / 5


def test_bridge_scale_is_relative_to_the_text(tiny, dataset):
    model = copy.deepcopy(tiny)
    once = measures.measure_queries(tiny_captioner(model), dataset)["bridge_scale"]
    model.decoder.bridge.scale.data *= -3
    assert measures.measure_queries(tiny_captioner(model), dataset)["bridge_scale"] == (
        pytest.approx(3 * once)
    )


OTHERS = {"one query": {"global_token": "none", "num_query_tokens": 1}}
OTHERS |= {"one query and a global token": {"num_query_tokens": 1}}
UNDEFINED = {  # all others are defined
    "image tokens": {"attention_entropy", "sink", "changed", "distinct"},
    "mean image token": {"effective_rank", "query_cosine", "same_peak"},
    "one query": {"effective_rank", "query_cosine", "same_peak", "changed", "distinct"},
    "one query and a global token": {"changed", "distinct"},
    "prefix": {"bridge_scale", "same_peak", "changed", "distinct"},
}
UNDEFINED["mean image token"] |= UNDEFINED["image tokens"]
UNDEFINED["image tokens as prefix"] = UNDEFINED["image tokens"] | UNDEFINED["prefix"]


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_every_variant_says_what_is_undefined(tiny, dataset, name):
    captioner = tiny_captioner(varied(tiny, (VARIANTS | OTHERS)[name]))
    found = ql.diagnose(captioner, dataset, muted=2)
    undefined = {field for field, value in vars(found).items() if value is None}
    assert undefined == UNDEFINED.get(name, set())
    assert (found.collapsed is None) == ("Q-Former" in found.lacks or name == "one query")
    assert str(found).count("undefined") >= len(undefined)
    assert found.verdict in str(found)


def test_long_captions_are_cut(byte_captioner, dataset):
    images = [replace(image, references=("long " * 50,)) for image in dataset]
    assert 0 < measures.measure_queries(byte_captioner, images)["same_peak"] <= 1


def test_thresholds_divide_runs():
    runs = pd.DataFrame({name: [1.0, 2.0, 4.0, 9.0] for name in THRESHOLDS})
    low = fit_thresholds(runs.assign(collapsed=[True, True, False, False]))
    assert low["effective_rank"] == (-1, 3)
    high = fit_thresholds(runs.assign(collapsed=[False, True, True, True]))
    assert high["query_cosine"] == high["same_peak"] == (1, 1.5)


def test_thresholds_of_the_first_seeds_hold_on_the_others():
    runs = pd.read_csv(COLLAPSE / "table.csv").query("variant == 'base'")
    runs = runs.assign(collapsed=runs["changed"] <= TOLERANCE)
    fitted = fit_thresholds(runs[runs["seed"] < 5])
    assert {name: limit for name, (_, limit) in fitted.items()} == pytest.approx(
        {name: limit for name, (_, limit) in THRESHOLDS.items()}, abs=0.001
    )
    counts = collapse_table().query("variant == 'base' and seeds == 'from 5'")
    assert counts["collapsed"].sum() == 6
    assert (counts["runs"] - counts["collapsed"]).sum() == 7
    assert counts["wrong verdicts"].sum() == 0
    assert counts["collapsed, no caption changed"].sum() == 2
    assert counts["wrong verdicts, no caption changed"].sum() == 4


def test_a_picture_is_found_by_its_own_tokens_alone():
    keys = torch.eye(3)
    assert measures.retrieval(2 * keys, keys) == 1
    assert measures.retrieval(keys[[1, 0, 2]], keys) == pytest.approx(1 / 3)


def test_too_few_pictures_are_refused(byte_captioner, dataset):
    with pytest.raises(ValueError, match="1 pictures, 16 of them muted: take at least 2 and 1"):
        ql.diagnose(byte_captioner, dataset[:1])
    with pytest.raises(ValueError, match="0 of them muted"):
        ql.diagnose(byte_captioner, dataset, muted=0)
