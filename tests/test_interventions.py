"""Interventions against models that were really changed, and against themselves by other ways."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import ImageError
from qvision_lab.interpretation.interventions import (
    blank_image,
    effect,
    effects,
    mute,
    patch,
    stack,
    sweep,
)
from qvision_lab.interpretation.trace import trace
from qvision_lab.model.loading.checkpoint import load_checkpoint
from qvision_lab.model.processor import QVisionProcessor

CLOSE = {"atol": 1e-5, "rtol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 10, "min_length": 6, "repetition_penalty": 1.0}
EVERYTHING = {
    "queries": [1, 2],
    "global_token": True,
    "heads": [(0, 3)],
    "self_heads": [(1, 7)],
    "bridge_heads": [2],
    "blocks": [0],
    "bridge": True,
}


@pytest.fixture
def captioner(tiny, byte_tokenizer) -> Captioner:
    return Captioner(tiny, QVisionProcessor.from_config(tiny.config, byte_tokenizer))


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.fixture
def inputs(captioner, pictures) -> dict[str, torch.Tensor]:
    """Two images, and two captions of equal length for each."""
    ids = captioner.processor(text=["a red car", "two dogs!", "the beach", "no words?"])
    images = captioner.processor(images=[Image.fromarray(picture) for picture in pictures])
    return {"input_ids": ids["input_ids"], "pixel_values": images["pixel_values"]}


def without_query(model, query):
    """The model as if it had been made with one query fewer."""
    model = copy.deepcopy(model)
    kept = [i for i in range(model.config.num_query_tokens) if i != query]
    model.qformer.query_tokens = torch.nn.Parameter(model.qformer.query_tokens[:, kept])
    return model


def without_head(model, attention_of, head):
    """The model as if what a head reads counted nothing."""
    model = copy.deepcopy(model)
    attention = attention_of(model)
    size = attention.in_proj_weight.shape[1] // attention.num_heads
    with torch.no_grad():
        attention.out_proj.weight[:, head * size : (head + 1) * size] = 0
    return model


# --- what they do --------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [0, 3])
def test_a_muted_query_is_as_never_learned(tiny, inputs, query):
    removed = without_query(tiny, query)
    with mute(tiny, queries=[query]):
        muted = tiny(**inputs)
        ids = tiny.generate(pixel_values=inputs["pixel_values"], **GREEDY)
    assert_close(muted.logits, removed(**inputs).logits, **CLOSE)
    assert not torch.allclose(muted.logits, tiny(**inputs).logits, atol=1e-3)
    others = [i for i in range(5) if i != 1 + query]
    assert_close(muted.visual_tokens[:, others], removed(**inputs).visual_tokens, **CLOSE)
    assert torch.equal(ids, removed.generate(pixel_values=inputs["pixel_values"], **GREEDY))


def test_nobody_reads_a_muted_token(tiny, inputs):
    with mute(tiny, queries=[2], global_token=True):
        seen = tiny(**inputs, output_attentions=True)
        fused = tiny(**inputs)
    assert_close(seen.logits, fused.logits, **CLOSE)
    for attention in (*seen.qformer_self_attentions, seen.decoder_cross_attentions):
        assert (attention[..., [0, 3]] == 0).all()
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize(
    ("part", "attention_of"),
    [
        ({"heads": [(1, 3)]}, lambda model: model.qformer.blocks[1].cross_attention),
        ({"self_heads": [(0, 3)]}, lambda model: model.qformer.blocks[0].self_attention),
        ({"bridge_heads": [3]}, lambda model: model.decoder.bridge.attention),
    ],
    ids=["heads", "self_heads", "bridge_heads"],
)
def test_a_muted_head_adds_nothing(tiny, inputs, part, attention_of):
    with mute(tiny, **part):
        logits = tiny(**inputs).logits
    assert_close(logits, without_head(tiny, attention_of, 3)(**inputs).logits, **CLOSE)
    assert not torch.allclose(logits, tiny(**inputs).logits, atol=1e-3)


def test_queries_pass_a_muted_block(tiny, inputs):
    removed = copy.deepcopy(tiny)
    del removed.qformer.blocks[0]
    with mute(tiny, blocks=[0]):
        assert_close(tiny(**inputs).logits, removed(**inputs).logits, **CLOSE)


def test_a_muted_bridge_leaves_the_text_alone(tiny, inputs):
    with mute(tiny, bridge=True):
        logits = tiny(**inputs).logits
    text = tiny.decoder.language_model(inputs["input_ids"]).last_hidden_state
    bridge = tiny.decoder.bridge
    alone = tiny.decoder.lm_head(text + bridge.ffn(bridge.ffn_norm(text)))
    assert_close(logits, alone, **CLOSE)


def test_a_blank_image_is_image_tokens_of_zero(tiny, inputs):
    with blank_image(tiny):
        logits = tiny(**inputs).logits
    assert torch.equal(
        logits, tiny(input_ids=inputs["input_ids"], image_tokens=torch.zeros(2, 4, 32)).logits
    )


@pytest.mark.parametrize("name", ["published_a", "published_b"])
def test_a_blank_image_equals_the_original(shared, name):
    folder = shared / "reference" / name
    model, expected = load_checkpoint(folder).model, load_file(folder / "expected.safetensors")
    words = expected["input_ids"] != model.config.pad_token_id
    with blank_image(model):
        logits = model(expected["input_ids"], expected["pixel_values"]).logits
    assert_close(logits[words], expected["logits_without_image"][words], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", ["image_tokens", "visual_tokens"])
def test_a_patched_image_is_the_other_one(tiny, captioner, pictures, inputs, stage):
    ids, image, other = inputs["input_ids"][:2], *inputs["pixel_values"].split(1)
    with patch(captioner, pictures[1], stage):
        logits = tiny(ids, image).logits
        generated = tiny.generate(pixel_values=image, **GREEDY)
    assert_close(logits, tiny(ids, other).logits, **CLOSE)
    assert torch.equal(generated, tiny.generate(pixel_values=other, **GREEDY))


def test_a_patch_keeps_to_its_block_and_positions(tiny, captioner, pictures, inputs):
    ids, image, other = inputs["input_ids"][:1], *inputs["pixel_values"].split(1)
    visual_tokens = tiny.encode(image)[1].visual_tokens
    visual_tokens[:, [0, 2]] = tiny.encode(other)[1].visual_tokens[:, [0, 2]]
    with patch(captioner, pictures[1], "block 1", positions=[0, 2]):
        patched = tiny(ids, image).logits
    assert_close(patched, tiny(ids, visual_tokens=visual_tokens).logits, **CLOSE)
    image_tokens = tiny.vision(image)
    image_tokens[:, 3] = tiny.vision(other)[:, 3]
    with patch(captioner, pictures[1], "image_tokens", positions=[3]):
        patched = tiny(ids, image).logits
    assert_close(patched, tiny(ids, image_tokens=image_tokens).logits, **CLOSE)


# --- where they hold -----------------------------------------------------------------------------


def change_and_fail(model, inputs, before, intervention):
    with intervention, intervention:
        assert not torch.equal(model(**inputs).logits, before)
        raise KeyError


def test_muting_nothing_changes_nothing(tiny, inputs):
    expected = tiny(**inputs).logits
    with mute(tiny):
        assert torch.equal(tiny(**inputs).logits, expected)


def test_blocks_restore_the_model_also_after_an_exception(tiny, captioner, pictures, inputs):
    before = tiny(**inputs).logits
    everything = mute(tiny, **EVERYTHING)
    for each in (
        everything,
        blank_image(tiny),
        patch(captioner, pictures[0], "block 0"),
        everything,
    ):
        with pytest.raises(KeyError):
            change_and_fail(tiny, inputs, before, each)
        assert torch.equal(tiny(**inputs).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_nested_blocks_both_apply(tiny, captioner, pictures, inputs):
    with mute(tiny, queries=[0, 2], heads=[(0, 1)]):
        together = tiny(**inputs).logits
    with mute(tiny, queries=[0]), mute(tiny, heads=[(0, 1)]), mute(tiny, queries=[2]):
        assert_close(tiny(**inputs).logits, together, **CLOSE)
    with mute(tiny, queries=[0]), patch(captioner, pictures[1], "image_tokens"):
        nested = tiny(inputs["input_ids"][:2], inputs["pixel_values"][:1]).logits
    with mute(tiny, queries=[0]):
        expected = tiny(inputs["input_ids"][:2], inputs["pixel_values"][1:]).logits
    assert_close(nested, expected, **CLOSE)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_every_image_of_a_batch_can_have_its_own(tiny, captioner, pictures, inputs, settings):
    pixels = inputs["pixel_values"]
    several = [
        mute(tiny, queries=[0], bridge_heads=[1]),
        patch(captioner, pictures[0], "block 0", positions=[1, 4]),
        mute(tiny),
        mute(tiny, blocks=[1]),
    ]
    batch = pixels[[0, 1, 0, 1]]
    ids = inputs["input_ids"].repeat_interleave(2, dim=0)  # [8,T]: two captions an image
    with stack(several):
        logits = tiny(ids, batch).logits
        generated = tiny.generate(pixel_values=batch, **{**GREEDY, **settings})
    for i, intervention in enumerate(several):
        with intervention:
            rows = slice(2 * i, 2 * i + 2)
            assert_close(logits[rows], tiny(ids[rows], batch[[i]]).logits, **CLOSE)
            alone = tiny.generate(pixel_values=batch[[i]], **{**GREEDY, **settings})
        k = len(alone)
        together = generated[k * i : k * i + k, : alone.shape[1]]
        assert torch.equal(together, alone)


def test_captioner_mutes_too(captioner, pictures):
    with mute(captioner.model, queries=[0, 1], bridge_heads=[0, 3]):
        muted = captioner.caption(pictures, preset="greedy")
        one_by_one = captioner.caption(pictures, preset="greedy", batch_size=1)
    assert [c.token_ids for c in muted] == [c.token_ids for c in one_by_one]
    assert muted != captioner.caption(pictures, preset="greedy")


# --- what they cost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "last", "count", "labels"),
    [
        ("queries", 3, 5, ("global token", "query 3")),
        ("heads", (1, 7), 16, ("block 0, head 0", "block 1, head 7")),
        ("self_heads", (1, 7), 16, ("block 0, self head 0", "block 1, self head 7")),
        ("bridge_heads", 7, 8, ("bridge, head 0", "bridge, head 7")),
        ("blocks", 1, 2, ("block 0", "block 1")),
    ],
)
def test_a_sweep_equals_muting_one_by_one(captioner, pictures, over, last, count, labels):
    swept = sweep(captioner, pictures[0], "a red car", over)
    assert len(swept) == count
    assert (swept[0].label, swept[-1].label) == labels
    assert [word.text for word in swept[0].words] == ["a", "red", "car"]
    assert len({tuple(one.after.round(4)) for one in swept}) == count
    plain = trace(captioner, pictures[0], "a red car")
    with mute(captioner.model, **{over: [last]}):
        muted = trace(captioner, pictures[0], "a red car")
    for seen, told in ((plain, swept[-1].before), (muted, swept[-1].after)):
        expected = [seen.logprobs[list(word.tokens)].sum() for word in seen.words]
        np.testing.assert_allclose(told, expected, atol=1e-5)


def test_effects_of_mutes_and_patches_in_one_batch(captioner, pictures):
    model, other = captioner.model, pictures[1]
    several = [mute(model), patch(captioner, other, "image_tokens"), blank_image(model)]
    nothing, swapped, blank = effects(captioner, pictures[0], "two dogs", several)
    np.testing.assert_allclose(nothing.change, 0, atol=1e-6)
    there = effect(captioner, other, "two dogs", blank_image(model))
    np.testing.assert_allclose(swapped.after, there.before, atol=1e-5)
    np.testing.assert_allclose(blank.after, there.after, atol=1e-5)
    assert np.abs(swapped.change).max() > 1e-3
    with patch(captioner, other, "image_tokens"):  # in force for all rows
        outer = effect(captioner, pictures[0], "two dogs", blank_image(model))
    np.testing.assert_allclose(outer.before, there.before, atol=1e-5)


def test_half_precision(captioner, pictures):
    half = Captioner(copy.deepcopy(captioner.model).bfloat16(), captioner.processor)
    for over in ("queries", "heads", "blocks"):
        rough, exact = (sweep(c, pictures[0], "a red car", over) for c in (half, captioner))
        for one, other in zip(rough, exact, strict=True):
            np.testing.assert_allclose(one.after, other.after, rtol=0.05)
    with patch(half, pictures[1], "image_tokens"):
        assert half.caption(pictures[0], preset="greedy").text


def test_what_does_not_exist_is_named(captioner, pictures):
    model = captioner.model
    for part, message in (
        ({"queries": [4]}, "query 4 does not exist; choose from global token to query 3"),
        ({"queries": [-1]}, "query -1 does not exist"),
        ({"heads": [(2, 0)]}, "block 2 does not exist; choose from 0 to 1"),
        ({"self_heads": [(0, 8)]}, "head 8 does not exist; choose from 0 to 7"),
        ({"bridge_heads": [8]}, "head 8 does not exist"),
        ({"blocks": [2]}, "block 2 does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            mute(model, **part)
    with pytest.raises(ValueError, match="no stage 'block 2'; choose one of image_tokens"):
        patch(captioner, pictures[0], "block 2")
    with pytest.raises(ValueError, match="position of image_tokens 4 does not exist"):
        patch(captioner, pictures[0], "image_tokens", positions=[4])
    with pytest.raises(ValueError, match="no sweep over 'words'; choose one of queries"):
        sweep(captioner, pictures[0], "a car", "words")


def test_what_does_not_fit_is_refused(captioner, pictures, inputs):
    model, two = captioner.model, stack([mute(captioner.model, queries=[i]) for i in range(2)])
    with (
        two,
        pytest.raises(ValueError, match=r"shape \[2, 1, 1, 5\] does not fit .* \[1, 1, 1, 5\]"),
    ):
        model(inputs["input_ids"], inputs["pixel_values"][:1])
    with pytest.raises(ValueError, match=r"'query 0 \| query 1' is for several"):
        effect(captioner, pictures[0], "a car", two)
    with pytest.raises(ValueError, match="'query 1' is an intervention in another model"):
        effect(captioner, pictures[0], "a car", mute(copy.deepcopy(model), queries=[1]))
    everyone = mute(model, queries=range(4), global_token=True)
    with everyone, pytest.raises(ValueError, match="no visual token is left; mute fewer"):
        model(**inputs)
    with pytest.raises(ImageError, match="a picture is"):
        effect(captioner, torch.zeros(2, 3, 8, 8), "a car", blank_image(model))
    with pytest.raises(ValueError, match="no word in the caption ' '"):
        effect(captioner, pictures[0], " ", blank_image(model))
