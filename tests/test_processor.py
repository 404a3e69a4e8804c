"""Images become the original pixels, and text the original ids."""

import numpy as np
import pytest
import torch
from conftest import random_images
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoProcessor

from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import IMAGE_PRESETS, QVisionProcessor, image_preset


@pytest.fixture
def processor(byte_captioner) -> QVisionProcessor:
    return byte_captioner.processor


def test_presets_equal_the_original_pixels(shared):
    processor = QVisionProcessor.from_config(QVisionConfig())
    expected = load_file(shared / "reference" / "preprocess" / "expected.safetensors")
    assert {key.rsplit(".", 1)[1] for key in expected} == set(IMAGE_PRESETS)
    for key, pixels in expected.items():
        name, preset = key.rsplit(".", 1)
        (path,) = (shared / "coco_mini").rglob(name)
        with Image.open(path) as image:
            ours = processor(images=image, preset=preset)["pixel_values"][0]
        assert_close(ours, pixels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", IMAGE_PRESETS)
@pytest.mark.parametrize("size", [(32, 32), (41, 67), (320, 99)])
def test_pixels_are_those_of_transformers_to_the_bit(processor, preset, size):
    (noise,) = random_images(1, *size)
    theirs = processor.image_processor(noise, return_tensors="pt", **image_preset(preset, 32))
    ours = processor(images=noise, preset=preset)["pixel_values"]
    assert torch.equal(ours, theirs["pixel_values"])


def test_a_strip_is_cropped_before_it_is_resized(processor):
    (strip,) = random_images(1, 80, 8)
    whole = processor.image_processor(strip, return_tensors="pt", **image_preset("clip", 32))
    ours = processor(images=strip, preset="clip")["pixel_values"]
    assert_close(ours, whole["pixel_values"], atol=1e-4, rtol=0)
    row = np.zeros((1, 20_000), np.uint8)
    row[0, 10_000:] = 255
    pixels = processor(images=Image.fromarray(row), preset="clip")["pixel_values"][0, 0]
    assert (pixels.diff(dim=1) > 0).all()  # the edge is in the middle of the input
    assert (pixels + pixels.flip(1)).std() < 0.01


def test_captions_become_the_training_text_and_come_back(processor, byte_tokenizer):
    captions = ["a dog", "two red kites"]
    batch = processor(text=captions)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids[0, : mask[0].sum()].tolist() == byte_tokenizer("<START> a dog <END>")["input_ids"]
    assert ids[0, mask[0].sum() :].unique().tolist() == [byte_tokenizer.pad_token_id]
    assert [processor.decode(row) for row in ids] == captions


def test_long_captions_keep_their_end_and_special_tokens_are_plain_characters(processor):
    ids = processor.encode("a very long caption", max_length=8)
    assert len(ids) == 8
    assert (ids[0], ids[-1]) == (257, 258)
    assert processor.decode(ids) == "a ver"
    ids = processor.encode("the <END> is near")
    assert ids.tolist().count(258) == 1
    assert processor.decode(ids) == "the <END> is near"


def test_auto_processor_reads_what_was_saved(processor, tiny, tmp_path):
    tiny.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is QVisionProcessor
    loaded.check_fits(tiny.config)
    image = Image.effect_noise((40, 30), 50)
    ours, theirs = (p(images=image, text="a dog") for p in (processor, loaded))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_a_tokenizer_images_work_and_text_raises(tiny, tmp_path):
    QVisionProcessor.from_config(tiny.config).save_pretrained(tmp_path)
    processor = QVisionProcessor.from_pretrained(tmp_path)
    images = [Image.new(mode, (9, 9)) for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1")]
    assert processor(images=images)["pixel_values"].shape == (6, 3, 32, 32)
    for ask in (lambda: processor(text="a dog"), lambda: processor.decode([1, 2])):
        with pytest.raises(ValueError, match="no tokenizer, so the model works on token ids only"):
            ask()


def test_misfits_raise(processor):
    with pytest.raises(ValueError, match="no image preset 'best'; choose one of training"):
        processor(images=Image.new("RGB", (9, 9)), preset="best")
    with pytest.raises(TypeError, match="pass PIL images, not ndarray"):
        processor(images=[np.zeros((9, 9, 3))])
    with pytest.raises(ValueError, match="got neither"):
        processor()
