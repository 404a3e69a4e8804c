"""The tower's stage: its records, losses and tokenizer."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from qvision_lab import scenes
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import new_model, tower


def test_records_hold_what_a_patch_shows_and_are_mirrored():
    scene = scenes.scene("crowd", 1, 3)
    records = np.zeros(1, tower.record_type(7))
    records[0] = tower.scene_record(scene, 7)
    samples = tower.TowerSamples(records, 7)
    plain, mirrored = samples[0], samples[1]
    thing = scene.objects[0]
    patch = int(thing.center[1] // 32) * 7 + int(thing.center[0] // 32)
    assert plain["center"][patch]
    assert plain["coverage"].max() <= 1
    assert torch.equal(mirrored["pixels"].flip(1), plain["pixels"])
    rows = plain["category"].reshape(7, 7)
    assert torch.equal(mirrored["category"].reshape(7, 7), rows.flip(1))
    row, column = divmod(patch, 7)
    other = row * 7 + 6 - column
    mirrored_x = 7 - plain["box"][patch][0].item()
    assert mirrored["box"][other][0].item() == pytest.approx(mirrored_x, abs=0.01)
    assert (mirrored["box"][other][1:] == plain["box"][patch][1:]).all()
    assert tower.normalise(default_collate([plain, mirrored])["pixels"]).shape == (2, 3, 224, 224)


def test_patches_are_embedded_as_by_the_convolution():
    embedding, pixels = tower.PatchEmbedding(8, side=4), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(embedding(pixels), torch.nn.Conv2d.forward(embedding, pixels))


def test_training_pixels_are_the_processors(tiny, byte_tokenizer):
    image = scenes.scene("train", 0, 0).image
    config = copy.deepcopy(tiny.config)
    config.vision_config.image_size = image.width
    processor = QVisionProcessor.from_config(config, byte_tokenizer)
    expected = processor(images=image)["pixel_values"]
    found = tower.normalise(torch.from_numpy(np.array(image))[None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, check_dtype=False)


def test_tokenizer_spells_scenes_in_words_and_anything_else_in_bytes():
    captions = (caption for scene in scenes.generate(40) for caption in scene.captions)
    tokenizer = new_model.train_tokenizer(captions, 320)
    caption = "A red car on a beach."
    assert tokenizer.decode(tokenizer(f" {caption} ")["input_ids"]).strip() == caption
    strange = "Ein grüner Zug, 列車!"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_supervision_by_images_does_not_depend_on_places():
    drawn = [tower.scene_record(scene, 7) for scene in scenes.generate(4)]
    records = np.array(drawn, tower.record_type(7))
    samples = tower.TowerSamples(records, 7)
    truth = default_collate([samples[i] for i in range(4)])
    shown = truth["coverage"] > tower.VISIBLE
    generator = torch.Generator().manual_seed(0)
    sizes = {"category": 21, "color": 8}
    logits = {n: torch.randn(4, 49, size, generator=generator) for n, size in sizes.items()}
    loss = tower.image_loss(logits, shown, truth)
    order, other = (torch.randperm(49, generator=generator) for _ in range(2))
    moved = {name: truth[name][:, order] for name in ("category", "color")}
    others = {name: x[:, other] for name, x in logits.items()}
    elsewhere = tower.image_loss(others, shown[:, order], moved)
    torch.testing.assert_close(elsewhere, loss)
    right = torch.nn.functional.one_hot(truth["category"].where(shown, 0), 21) * 20.0
    assert tower.image_loss(logits | {"category": right}, shown, truth) < loss
