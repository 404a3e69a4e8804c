"""Vision towers other than CLIP's: every kind passes through the whole model."""

import pytest
import torch
from conftest import tiny_captioner, tiny_model, with_noise
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.testing import assert_close

import qvision_lab as ql
from qvision_lab.model import towers
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.vision import VisionEncoder
from qvision_lab.training import freezing

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "image_size": 32, "patch_size": 16}
TIMM = {"model_type": "timm_wrapper", "architecture": "tf_efficientnet_lite0"}
TIMM |= {"hidden_size": 1280, "image_size": 64, "patch_size": 32}
TOWERS = {
    "CLIPVisionModel": SMALL,
    "ViTModel": SMALL | {"model_type": "vit"},
    "Dinov2Model": SMALL | {"model_type": "dinov2"},
    "SiglipVisionModel": SMALL | {"model_type": "siglip_vision_model"},
    "TimmWrapperModel": TIMM,
}


def model_with(tower: dict) -> QVisionForConditionalGeneration:
    config = tiny_model().config.to_dict() | {"vision_config": tower}
    torch.manual_seed(5)
    return with_noise(QVisionForConditionalGeneration(QVisionConfig.from_dict(config)).eval())


@pytest.fixture(scope="module", params=TOWERS)
def kind(request) -> str:
    if request.param == "TimmWrapperModel":
        pytest.importorskip("timm")
    return request.param


@pytest.fixture(scope="module")
def captioner(kind):
    return tiny_captioner(model_with(TOWERS[kind]))


def test_each_patch_has_a_state(captioner, kind, noise):
    model = captioner.model
    assert type(model.vision.tower).__name__ == kind
    pixels = captioner.processor(images=noise).pixel_values
    states = model.vision.encode(pixels)
    assert states.shape == (3, 4, model.config.vision_config.hidden_size)
    from_states, from_pixels = model(vision_states=states), model(pixel_values=pixels)
    assert_close(from_states.logits, from_pixels.logits)
    alone = model.vision.encode(pixels[:1])
    assert_close(alone, states[:1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"4 states|5 states.* 9 patches|set its image_size"):
        VisionEncoder(model.vision.tower, 9, 32).encode(pixels)


def test_it_is_saved_and_loaded_with_its_class(captioner, kind, noise, tmp_path):
    expected = [caption.token_ids for caption in captioner.caption(noise, preset="greedy")]
    captioner.model.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    loaded = ql.load(tmp_path, device="cpu")
    assert type(loaded.model.vision.tower).__name__ == kind
    assert loaded.model.config.patch_grid == (2, 2)
    maps = ql.word_maps(ql.trace(loaded, noise[0], "a b c"))
    assert [word.values.shape for word in maps] == [(2, 2)] * 3
    assert [c.token_ids for c in loaded.caption(noise, preset="greedy")] == expected
    pixels = captioner.processor(images=noise).pixel_values
    assert torch.equal(loaded.processor(images=noise).pixel_values, pixels)
    assert torch.equal(loaded.model.vision(pixels), captioner.model.vision(pixels))
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())


def test_pixels_are_normalised_as_the_tower_expects(captioner):
    mean, deviation = towers.pixel_statistics(captioner.model.config.vision_config)
    grey = captioner.processor(images=Image.new("RGB", (8, 8), (51, 102, 153))).pixel_values
    expected = (torch.tensor([0.2, 0.4, 0.6]) - torch.tensor(mean)) / torch.tensor(deviation)
    assert_close(grey[0, :, 0, 0], expected)


def test_a_frozen_tower_keeps_its_statistics(captioner, noise):
    model = model_with(captioner.model.config.vision_config.to_dict())
    freezing.apply(model, "captioner")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pixels = captioner.processor(images=noise).pixel_values
    expected = model.vision.encode(pixels)
    assert torch.equal(model.train().vision.encode(pixels), expected)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    counts = freezing.apply(model, "everything")
    assert counts.trained["vision tower"] > 0.9 * counts.total["vision tower"]
    assert model.vision.tower.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type: 'bert' is not one of clip_vision_model, vit,"),
        ({"architecture": "hf-hub:someone/model"}, "architecture: 'hf-hub:someone/model' is not"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "model_args: 'checkpoint_path' is not one"),
        ({"patch_size": None}, "vision_config.patch_size=None: give one positive whole number"),
        ({"image_size": [64, 32]}, r"vision_config.image_size=\[64, 32\]"),
    ],
)
def test_towers_that_are_refused(changes, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        QVisionConfig(vision_config=TIMM | changes)


def test_without_timm_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(towers, "is_timm_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'qvision-lab\[photos\]'"):
        model_with(TIMM)
    with pytest.raises(ValueError, match=r"install 'qvision-lab\[photos\]'\.$"):
        ql.load("photos")
