"""The model against the original code's numbers, and one result against itself."""

import copy
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.testing import assert_close
from transformers import MaxLengthCriteria, StoppingCriteriaList, SuppressTokensLogitsProcessor
from transformers.generation import BaseStreamer

from qvision_lab.model.captioner import IGNORED_LABEL, generation_preset
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.published import stored_name
from qvision_lab.model.parameters import PUBLISHED_TOTAL, parameter_table

TOLERANCE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_length": 6, "repetition_penalty": 1.0}


@pytest.mark.parametrize("output_attentions", [True, False], ids=["eager", "fused"])
def test_forward_equals_the_original(reference, output_attentions):
    model, expected, _ = reference
    ids = expected["input_ids"]
    words = ids != model.config.pad_token_id
    batch = {"input_ids": ids, "labels": ids, "pixel_values": expected["pixel_values"]}
    extras = {"output_attentions": output_attentions, "output_hidden_states": True}
    output = model(**batch, attention_mask=words.long(), **extras)
    assert_close(output.image_tokens, expected["image_features"], **TOLERANCE)
    assert_close(output.visual_tokens, expected["visual_tokens"], **TOLERANCE)
    text_states = expected["text_hidden_states"]
    assert_close(output.hidden_states[-1][words], text_states[words], **TOLERANCE)
    assert_close(output.logits[words], expected["logits"][words], **TOLERANCE)
    assert_close(output.loss, expected["loss"].squeeze(), **TOLERANCE)
    if output_attentions:
        for block, attention in enumerate(output.qformer_cross_attentions):
            assert_close(attention, expected[f"qformer_cross_attentions.{block}"], **TOLERANCE)
        by_word = output.decoder_cross_attentions.transpose(1, 2)[words]
        expected_by_word = expected["decoder_cross_attentions"].transpose(1, 2)[words]
        assert_close(by_word, expected_by_word, **TOLERANCE)
    else:
        assert output.qformer_cross_attentions is output.decoder_cross_attentions is None


def test_text_without_an_image_equals_the_original(reference):
    model, expected, _ = reference
    words = expected["input_ids"] != model.config.pad_token_id
    nothing = torch.zeros_like(expected["image_features"])
    logits = model(input_ids=expected["input_ids"], image_tokens=nothing).logits
    assert_close(logits[words], expected["logits_without_image"][words], **TOLERANCE)


def test_every_generation_equals_the_original_token_for_token(reference):
    model, expected, facts = reference
    assert len(facts["generate"]) == 24
    for case in facts["generate"]:
        settings = dict(case["settings"])
        settings["max_new_tokens"] = settings.pop("max_len")
        image = expected["pixel_values"][[case["image"]]]
        torch.manual_seed(case["seed"])
        ids = model.generate(pixel_values=image, do_sample=True, **settings)
        assert ids[0].tolist() == case["ids"], case["name"]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_the_original_with_frozen_blocks(reference, training):
    model, expected, facts = reference
    model.training = training  # but not its parts: no dropout
    norms = facts["gradient_norms_freeze_0.4"]
    parameters = {stored_name(name): p for name, p in model.named_parameters()}
    assert norms.keys() <= parameters.keys() | {"query_proj.weight", "query_proj.bias"}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in facts["trainable"]["0.4"])
        parameter.grad = None
    ids = expected["input_ids"]
    output = model(input_ids=ids, pixel_values=expected["pixel_values"], labels=ids)
    output.loss.backward()
    model.training = False
    assert output.logits.ndim == (2 if training else 3)  # [K,V] of the targets, or [R,T,V]
    trained = {name: p.grad.norm().item() for name, p in parameters.items() if p.grad is not None}
    model.requires_grad_(True)
    # The gradient of a bias of keys is rounding alone.
    assert trained == pytest.approx(norms, rel=1e-4, abs=1e-6)


def test_parameter_table_equals_the_published_one_to_the_last_parameter(tiny):
    table = pd.DataFrame(parameter_table(QVisionConfig()))
    groups, rest = table.groupby("group"), {"Q-Former and bridge": 66_196_481}
    total = {"image encoder": 152_064_769, "GPT-Neo": 355_800_064, **rest}
    assert groups.total.sum().to_dict() == total
    trained = {"image encoder": 0, "GPT-Neo": 240_364_544, **rest}
    assert groups.trained.sum().to_dict() == trained
    assert table.total.sum() == 574_061_314
    assert table.total[table.used].sum() == PUBLISHED_TOTAL == 509_190_401
    assert table.set_index("part").total["query_proj"] == 1_049_600
    assert sum(row.total for row in parameter_table(tiny.config)) == tiny.num_parameters()


def test_the_output_of_any_stage_as_input_gives_the_same(tiny, pixels, captions):
    whole = tiny(input_ids=captions, pixel_values=pixels)
    generated = tiny.generate(pixel_values=pixels, **GREEDY)
    assert len({tuple(row) for row in generated.tolist()}) > 1  # the images do matter
    for later in (
        {"vision_states": tiny.vision.encode(pixels)},
        {"image_tokens": whole.image_tokens},
        {"visual_tokens": whole.visual_tokens},
    ):
        assert_close(tiny(input_ids=captions, **later).logits, whole.logits, **TOLERANCE)
        assert torch.equal(tiny.generate(**later, **GREEDY), generated)
    assert tiny(input_ids=captions, visual_tokens=whole.visual_tokens).image_tokens is None


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_each_image_is_encoded_once(byte_captioner, pixels, settings, monkeypatch):
    model, encoded = byte_captioner.model, []
    for stage in (model.vision.tower, model.qformer):

        def run(inputs, *args, forward=stage.forward):
            encoded.append(len(inputs))
            return forward(inputs, *args)

        monkeypatch.setattr(stage, "forward", run)
    ids = model.generate(pixel_values=pixels, max_new_tokens=6, **settings)
    assert len(ids) == 4 * settings.get("num_return_sequences", 1)
    assert (ids[:, 0] == model.config.start_token_id).all()
    byte_captioner.caption([Image.effect_noise((9, 9), 50)] * 3, max_new_tokens=6, **settings)
    assert encoded == [4, 4, 3, 3]


def test_loss_is_the_mean_over_all_words(tiny, pixels, captions):
    pad, batch = tiny.config.pad_token_id, {"input_ids": captions, "pixel_values": pixels}
    mean = tiny(**batch, labels=captions).loss
    ignored = captions.masked_fill(captions == pad, IGNORED_LABEL)
    assert torch.equal(tiny(**batch, labels=ignored).loss, mean)
    words = int((captions[:, 1:] != pad).sum())
    halves = (
        tiny(input_ids=ids, pixel_values=images, labels=ids, num_items_in_batch=words).loss
        for ids, images in zip(captions.chunk(2), pixels.chunk(2), strict=True)
    )
    assert_close(sum(halves), mean)


def test_bfloat16_is_near_with_and_without_a_gradient(tiny, pixels, captions):
    """On a CPU the first takes the eager attention, the second the fused kernel."""
    batch = {"input_ids": captions, "labels": captions, "pixel_values": pixels}
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny(**batch)
        with torch.no_grad():
            fused = tiny(**batch)
    assert output.loss.requires_grad
    assert output.qformer_cross_attentions is None
    assert_close(output.loss.detach(), fused.loss, rtol=1e-2, atol=0)
    half, exact = copy.deepcopy(tiny).bfloat16()(**batch).logits, tiny(**batch).logits
    assert half.dtype == torch.bfloat16
    assert torch.corrcoef(torch.stack([half.float().flatten(), exact.flatten()]))[0, 1] > 0.99


def test_processors_criteria_streamers_and_maps_work(tiny, pixels):
    plain = tiny.generate(pixel_values=pixels[:1], **GREEDY)[0].tolist()
    streamer = Mock(spec=BaseStreamer)
    tiny.generate(pixel_values=pixels[:1], streamer=streamer, **GREEDY)
    streamed = torch.cat([call.args[0].flatten() for call in streamer.put.call_args_list])
    assert streamed.tolist() == plain
    streamer.end.assert_called_once()
    ban = SuppressTokensLogitsProcessor([plain[1]])
    assert plain[1] not in tiny.generate(pixel_values=pixels, logits_processor=[ban], **GREEDY)
    short = StoppingCriteriaList([MaxLengthCriteria(max_length=4)])
    assert tiny.generate(pixel_values=pixels, stopping_criteria=short, **GREEDY).shape[1] == 4
    maps = {"output_attentions": True, "return_dict_in_generate": True}
    found = tiny.generate(pixel_values=pixels[:1], **maps, **GREEDY)
    assert len(found.attentions) == len(plain) - 1


def test_unclear_inputs_raise(tiny, pixels, captions):
    with pytest.raises(ValueError, match="got none"):
        tiny(input_ids=captions)
    with pytest.raises(ValueError, match="got pixel_values, image_tokens"):
        tiny(input_ids=captions, pixel_values=pixels, image_tokens=torch.zeros(4, 4, 32))
    with pytest.raises(ValueError, match="4 rows of input_ids for 3 images"):
        tiny(input_ids=captions, pixel_values=pixels[:3])
    with pytest.raises(ValueError, match="no preset 'best'; choose one of published"):
        generation_preset("best", tiny.config)
    with pytest.raises(StrictDataclassError, match="num_attention_heads=7 does not divide"):
        QVisionConfig(num_attention_heads=7)
    with pytest.raises(StrictDataclassError, match="pad_token_id=60000 is outside the vocabulary"):
        QVisionConfig(pad_token_id=60000)
