"""The model against the original code's numbers, and against itself by other ways."""

import json
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import BaseStreamer

from qvision_lab.benchmark.parameters import PUBLISHED_TOTAL, parameter_table
from qvision_lab.model.captioner import (
    IGNORED_LABEL,
    QVisionForConditionalGeneration,
    generation_preset,
)
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import load_checkpoint
from qvision_lab.model.loading.published import stored_name

TOLERANCE = {"atol": 1e-4, "rtol": 0}
ONE_BY_ONE = {"do_sample": False, "max_new_tokens": 12, "min_length": 6, "repetition_penalty": 1.0}


@pytest.fixture(scope="module", params=["published_a", "published_b"])
def reference(request, shared):
    """Model, tensors and facts of one small checkpoint of the original code."""
    folder = shared / "reference" / request.param
    facts = json.loads((folder / "expected.json").read_text())
    return load_checkpoint(folder).model, load_file(folder / "expected.safetensors"), facts


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captions() -> torch.Tensor:
    ids = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[1, 5], ids[1, 6:], ids[3, 3], ids[3, 4:] = 257, 258, 256, 258, 256
    return ids


# --- the original code's numbers -----------------------------------------------------------------


@pytest.mark.parametrize("output_attentions", [True, False], ids=["open", "fused"])
def test_forward_equals_the_original(reference, output_attentions):
    model, expected, _ = reference
    ids = expected["input_ids"]
    words = ids != model.config.pad_token_id
    output = model(
        input_ids=ids,
        pixel_values=expected["pixel_values"],
        attention_mask=words.long(),
        labels=ids,
        output_attentions=output_attentions,
        output_hidden_states=True,
    )
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


def test_bfloat16_has_the_same_loss_with_and_without_a_gradient(tiny, pixels, captions):
    """A CPU computes attention openly for the first, by its fused kernel for the second."""
    batch = {"input_ids": captions, "labels": captions, "pixel_values": pixels}
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny(**batch)
        with torch.no_grad():
            fused = tiny(**batch)
    assert output.loss.requires_grad
    assert output.qformer_cross_attentions is None
    assert_close(output.loss.detach(), fused.loss, rtol=1e-2, atol=0)


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
        torch.manual_seed(case["seed"])
        ids = model.generate(
            pixel_values=expected["pixel_values"][[case["image"]]],
            do_sample=True,
            max_new_tokens=settings.pop("max_len"),
            **settings,
        )
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
    assert (output.logits is None) == training
    trained = {name: p.grad.norm().item() for name, p in parameters.items() if p.grad is not None}
    model.requires_grad_(True)
    assert trained == pytest.approx(norms, rel=1e-4, abs=1e-6)


def test_parameter_table_equals_the_published_one_to_the_last_parameter():
    table = parameter_table(QVisionConfig())
    total, trained = {}, {}
    for row in table:
        total[row.group] = total.get(row.group, 0) + row.total
        trained[row.group] = trained.get(row.group, 0) + row.trained
    assert total == {
        "image encoder": 152_064_769,
        "GPT-Neo": 355_800_064,
        "Q-Former and bridge": 66_196_481,
    }
    assert trained == {
        "image encoder": 0,
        "GPT-Neo": 240_364_544,
        "Q-Former and bridge": 66_196_481,
    }
    assert sum(row.total for row in table) == 574_061_314
    assert sum(row.total for row in table if row.used) == PUBLISHED_TOTAL == 509_190_401
    assert {row.part: row.total for row in table if not row.used}["query_proj"] == 1_049_600


# --- one result, many ways to it -----------------------------------------------------------------


def test_any_later_point_of_the_walk_gives_the_same(tiny, pixels, captions):
    whole = tiny(input_ids=captions, pixel_values=pixels)
    for later in (
        {"vision_states": tiny.vision.see(pixels)},
        {"image_tokens": whole.image_tokens},
        {"visual_tokens": whole.visual_tokens},
    ):
        assert_close(tiny(input_ids=captions, **later).logits, whole.logits, **TOLERANCE)
        ids = tiny.generate(**later, **ONE_BY_ONE)
        assert torch.equal(ids, tiny.generate(pixel_values=pixels, **ONE_BY_ONE))
    assert tiny(input_ids=captions, visual_tokens=whole.visual_tokens).image_tokens is None


def test_batched_equals_single(tiny, pixels, captions):
    together = tiny(input_ids=captions, pixel_values=pixels).logits
    words = captions != tiny.config.pad_token_id
    generated = tiny.generate(pixel_values=pixels, **ONE_BY_ONE)
    assert len({tuple(row) for row in generated.tolist()}) > 1  # the pictures do matter
    for i in range(len(pixels)):
        alone = tiny(input_ids=captions[[i]], pixel_values=pixels[[i]]).logits[0]
        assert_close(alone[words[i]], together[i][words[i]], **TOLERANCE)
        row = tiny.generate(pixel_values=pixels[[i]], **ONE_BY_ONE)[0]
        assert torch.equal(row, generated[i, : len(row)])


def generate_with_and_without_cache(model, pixels):
    """Ids and logits of a cached search, which equal those without a cache; as beams do."""
    settings = {**ONE_BY_ONE, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(pixel_values=pixels, **settings)
    uncached = model.generate(pixel_values=pixels, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **TOLERANCE)
    beams = {**ONE_BY_ONE, "num_beams": 3}
    again = model.generate(pixel_values=pixels, use_cache=False, **beams)
    assert torch.equal(model.generate(pixel_values=pixels, **beams), again)
    return cached


def test_cached_equals_uncached(tiny, pixels):
    generate_with_and_without_cache(tiny, pixels)


def test_generated_logits_equal_one_teacher_forced_pass(tiny, pixels):
    settings = {**ONE_BY_ONE, "return_dict_in_generate": True, "output_logits": True}
    generated = tiny.generate(pixel_values=pixels, **settings)
    logits = tiny(input_ids=generated.sequences, pixel_values=pixels).logits[:, :-1]
    words = generated.sequences[:, :-1] != tiny.config.pad_token_id
    assert_close(torch.stack(generated.logits, dim=1)[words], logits[words], **TOLERANCE)


def test_several_captions_of_an_image_equal_repeated_images(tiny, pixels, captions):
    grouped = tiny(input_ids=captions, pixel_values=pixels[:2])
    repeated = tiny(input_ids=captions, pixel_values=pixels[[0, 0, 1, 1]])
    assert_close(grouped.logits, repeated.logits, **TOLERANCE)
    assert len(grouped.visual_tokens) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["beams", "samples"],
)
def test_generate_looks_at_each_image_once(tiny, pixels, settings):
    calls = []
    hooks = [
        stage.register_forward_hook(lambda stage, inputs, output: calls.append(len(inputs[0])))
        for stage in (tiny.vision.tower, tiny.qformer)
    ]
    ids = tiny.generate(pixel_values=pixels, max_new_tokens=6, **settings)
    for hook in hooks:
        hook.remove()
    assert calls == [4, 4]
    assert len(ids) == 4 * settings["num_return_sequences"]
    assert (ids[:, 0] == tiny.config.start_token_id).all()


def test_attention_maps_are_open_distributions_and_change_nothing(tiny, pixels, captions):
    fused = tiny(input_ids=captions, pixel_values=pixels)
    shown = tiny(input_ids=captions, pixel_values=pixels, output_attentions=True)
    assert_close(shown.logits, fused.logits, **TOLERANCE)
    assert [tuple(m.shape) for m in shown.qformer_cross_attentions] == [(4, 8, 5, 4)] * 2
    assert [tuple(m.shape) for m in shown.qformer_self_attentions] == [(4, 8, 5, 5)] * 2
    assert shown.decoder_cross_attentions.shape == (4, 8, 9, 5)
    assert [tuple(m.shape) for m in shown.attentions] == [(4, 4, 9, 9)] * 2
    for attention in (*shown.qformer_cross_attentions, shown.decoder_cross_attentions):
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_accumulation_changes_neither_loss_nor_gradients(tiny, pixels, captions):
    pixels, captions = pixels.repeat(2, 1, 1, 1), captions.repeat(2, 1)
    targets = int((captions[:, 1:] != tiny.config.pad_token_id).sum())

    def run(parts: int) -> tuple[float, torch.Tensor]:
        tiny.zero_grad()
        total = 0.0
        for ids, images in zip(captions.chunk(parts), pixels.chunk(parts), strict=True):
            output = tiny(
                input_ids=ids, pixel_values=images, labels=ids, num_items_in_batch=targets
            )
            output.loss.backward()
            total += output.loss.item()
        return total, torch.cat([p.grad.flatten() for p in tiny.parameters() if p.grad is not None])

    (loss, gradient), (loss_in_parts, gradient_in_parts) = run(1), run(4)
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    assert_close(gradient_in_parts, gradient, atol=1e-5, rtol=1e-4)
    mean = tiny(input_ids=captions, pixel_values=pixels, labels=captions).loss
    assert mean.item() == pytest.approx(loss, rel=1e-5)


def test_labels_may_mark_pads_either_way(tiny, pixels, captions):
    ignored = captions.masked_fill(captions == tiny.config.pad_token_id, IGNORED_LABEL)
    losses = [
        tiny(input_ids=captions, pixel_values=pixels, labels=labels).loss
        for labels in (captions, ignored)
    ]
    assert torch.equal(*losses)


# --- a transformers model ------------------------------------------------------------------------


def test_saved_weights_come_back_through_transformers(tiny, pixels, captions, tmp_path):
    tiny.save_pretrained(tmp_path)
    logits = tiny(input_ids=captions, pixel_values=pixels).logits
    for auto in (QVisionForConditionalGeneration, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is QVisionForConditionalGeneration
        assert torch.equal(loaded(input_ids=captions, pixel_values=pixels).logits, logits)
        assert loaded.generation_config.repetition_penalty == 1.8
    assert loaded.decoder.lm_head.weight is loaded.decoder.language_model.wte.weight


def test_processors_criteria_and_streamers_work(tiny, pixels):
    plain = tiny.generate(pixel_values=pixels[:1], **ONE_BY_ONE)[0].tolist()
    streamer = Mock(spec=BaseStreamer)
    tiny.generate(pixel_values=pixels[:1], streamer=streamer, **ONE_BY_ONE)
    streamed = torch.cat([call.args[0].flatten() for call in streamer.put.call_args_list])
    assert streamed.tolist() == plain
    streamer.end.assert_called_once()
    ban = SuppressTokensLogitsProcessor([plain[1]])
    assert plain[1] not in tiny.generate(pixel_values=pixels, logits_processor=[ban], **ONE_BY_ONE)
    short = StoppingCriteriaList([MaxLengthCriteria(max_length=4)])
    assert tiny.generate(pixel_values=pixels, stopping_criteria=short, **ONE_BY_ONE).shape[1] == 4


def test_bfloat16_stays_close(tiny, pixels, captions, tmp_path):
    tiny.save_pretrained(tmp_path)
    half = QVisionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = half(input_ids=captions, pixel_values=pixels).logits
    assert logits.dtype == torch.bfloat16
    expected = tiny(input_ids=captions, pixel_values=pixels).logits
    assert torch.corrcoef(torch.stack([logits.float().flatten(), expected.flatten()]))[0, 1] > 0.99


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
