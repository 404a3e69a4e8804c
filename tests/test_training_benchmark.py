"""Both ways of training, with batches as each has them, in processes of their own."""

import json

import numpy as np
import pytest
import torch

from qvision_lab.benchmark import tables
from qvision_lab.benchmark.training import CAPTIONS, IMAGES, random_batch, run_benchmarks
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import IGNORED_LABEL


def test_each_way_has_its_own_batches(tiny):
    torch.manual_seed(0)
    original, ours = (random_batch(way, tiny.config) for way in ("original", "ours"))
    images = IMAGES[0]
    assert original["input_ids"].shape == (images, 20)
    assert original["pixel_values"].shape == (images, 3, 32, 32)
    words = original["input_ids"] != tiny.config.pad_token_id
    assert torch.equal(words, original["labels"] != IGNORED_LABEL)
    assert ours["vision_states"].shape == (images, 4, 16)
    rows, longest = ours["input_ids"].shape
    assert rows == 5 * images
    assert (ours["labels"][:, longest - 1] != IGNORED_LABEL).any()
    assert random_batch("ours", tiny.config, 3, multiple=8)["input_ids"].shape[1] % 8 == 0


def test_rates_count_captions_and_images(tiny, tmp_path):
    *_, table = run_benchmarks(Captioner(tiny, processor=None), quick=True)
    saved = json.loads(table.save(tmp_path).read_text())
    rows = {(row["way"], row["precision"]): row for row in saved["rows"]}
    precisions = ("float32", "bfloat16")
    assert {*rows} == {(way, kind) for kind in precisions for way in ("original", "ours")}
    for (way, precision), row in rows.items():
        per_image = row["captions_per_second"] / row["images_per_second"]
        assert per_image == pytest.approx({"original": 1, "ours": 5}[way])
        assert row["images_per_second"] == pytest.approx(8 * 2 / sum(row["seconds"]))
        assert (row["peak_gigabytes"] or 0) > 0.1 or precision == "bfloat16"
    drawn = tables.training(tmp_path).set_index("way")
    baseline, candidate = (np.median(rows[way, "bfloat16"]["seconds"]) for way in CAPTIONS)
    ours = drawn.loc["ours, bfloat16"]
    captions = float(ours["times the original's captions"])
    assert captions == pytest.approx(5 * baseline / candidate, abs=0.01)
    assert float(ours["times its images"]) == pytest.approx(captions / 5, abs=0.01)
    assert drawn.loc["original, float32", "times its images"] == "1.00"
