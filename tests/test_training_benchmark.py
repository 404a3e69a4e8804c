"""Both ways of training, with batches as each has them, in processes of their own."""

import json

import pytest
import torch

from qvision_lab.benchmark.training import IMAGES, random_batch, run_benchmarks
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import IGNORED_LABEL


def test_each_way_has_its_own_batches(tiny):
    torch.manual_seed(0)
    original, ours = (random_batch(way, tiny.config) for way in ("original", "ours"))
    assert original["input_ids"].shape == (IMAGES, 20)
    assert original["pixel_values"].shape == (IMAGES, 3, 32, 32)
    words = original["input_ids"] != tiny.config.pad_token_id
    assert torch.equal(words, original["labels"] != IGNORED_LABEL)
    assert ours["vision_states"].shape == (IMAGES, 4, 16)
    rows, longest = ours["input_ids"].shape
    assert rows == 5 * IMAGES
    assert (ours["labels"][:, longest - 1] != IGNORED_LABEL).any()


def test_rates_count_captions_and_images(tiny, tmp_path):
    (rate,) = run_benchmarks(Captioner(tiny, processor=None), quick=True)
    saved = json.loads(rate.save(tmp_path).read_text())
    taken = zip(rate.seconds["original"], rate.seconds["ours"], strict=True)
    ratios = [5 * baseline / candidate for baseline, candidate in taken]
    assert saved["ratio"] == pytest.approx(sum(ratios) / 2)
    assert saved["bf16_ratio"] > 0
    assert saved["peak_gigabytes"].keys() == {"original", "ours"}
    assert min(saved["peak_gigabytes"].values()) > 0.1
    for way, captions in (("original", 1), ("ours", 5), ("ours_bf16", 5)):
        per_image = saved["captions_per_second"][way] / saved["images_per_second"][way]
        assert per_image == pytest.approx(captions)
        assert way in str(rate)
