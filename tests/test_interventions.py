"""Interventions against models that were changed for good, alone, nested and in batches."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qvision_lab.captioning import Captioner
from qvision_lab.interpretation.interventions import blank_image, effects, mute, patch, stack, sweep
from qvision_lab.interpretation.trace import trace, trace_all

CLOSE = {"atol": 1e-5, "rtol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 10, "min_length": 6, "repetition_penalty": 1.0}
EVERYTHING = {"queries": [1, 2], "global_token": True, "heads": [(0, 3)], "self_heads": [(1, 7)]}
EVERYTHING |= {"bridge_heads": [2], "blocks": [0], "bridge": True}


@pytest.fixture
def inputs(byte_captioner, noise) -> dict[str, torch.Tensor]:
    """Two images, and two captions of equal length for each."""
    ids = byte_captioner.processor(text=["a red car", "two dogs!", "the beach", "no words?"])
    images = byte_captioner.processor(images=noise[:2])
    return {"input_ids": ids["input_ids"], "pixel_values": images["pixel_values"]}


def drop_query(model, query):
    kept = [i for i in range(model.config.num_query_tokens) if i != query]
    model.qformer.query_tokens = torch.nn.Parameter(model.qformer.query_tokens[:, kept])


def drop_head(attention, head=3):
    size = attention.in_proj_weight.shape[1] // attention.num_heads
    torch.nn.init.zeros_(attention.out_proj.weight[:, head * size : (head + 1) * size])


REMOVED = {
    "first query": ({"queries": [0]}, lambda model: drop_query(model, 0)),
    "last query": ({"queries": [3]}, lambda model: drop_query(model, 3)),
    "head": ({"heads": [(1, 3)]}, lambda m: drop_head(m.qformer.blocks[1].cross_attention)),
    "self": ({"self_heads": [(0, 3)]}, lambda m: drop_head(m.qformer.blocks[0].self_attention)),
    "bridge head": ({"bridge_heads": [3]}, lambda model: drop_head(model.decoder.bridge.attention)),
    "block": ({"blocks": [0]}, lambda model: model.qformer.blocks.pop(0)),
    "bridge": ({"bridge": True}, lambda m: torch.nn.init.zeros_(m.decoder.bridge.scale)),
}


@pytest.mark.parametrize(("part", "remove"), REMOVED.values(), ids=REMOVED)
def test_muting_a_part_equals_a_model_without_it(tiny, inputs, part, remove):
    removed = copy.deepcopy(tiny)
    remove(removed)
    with mute(tiny, **part):
        logits = tiny(**inputs).logits
        ids = tiny.generate(pixel_values=inputs["pixel_values"], **GREEDY)
    assert_close(logits, removed(**inputs).logits, **CLOSE)
    assert not torch.allclose(logits, tiny(**inputs).logits, atol=1e-3)
    assert torch.equal(ids, removed.generate(pixel_values=inputs["pixel_values"], **GREEDY))


def test_a_muted_token_gets_no_attention(tiny, inputs):
    with mute(tiny, queries=[2], global_token=True):
        eager = tiny(**inputs, output_attentions=True)
        fused = tiny(**inputs)
    assert_close(eager.logits, fused.logits, **CLOSE)
    for attention in (*eager.qformer_self_attentions, eager.decoder_cross_attentions):
        assert (attention[..., [0, 3]] == 0).all()
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_a_blank_image_is_image_tokens_of_zero(tiny, inputs):
    with blank_image(tiny):
        logits = tiny(**inputs).logits
    assert torch.equal(logits, tiny(inputs["input_ids"], image_tokens=torch.zeros(2, 4, 32)).logits)


@pytest.mark.parametrize("stage", ["image_tokens", "visual_tokens"])
def test_a_patched_image_is_the_other_one(tiny, byte_captioner, noise, inputs, stage):
    ids, image, other = inputs["input_ids"][:2], *inputs["pixel_values"].split(1)
    with patch(byte_captioner, noise[1], stage):
        logits = tiny(ids, image).logits
        generated = tiny.generate(pixel_values=image, **GREEDY)
    assert_close(logits, tiny(ids, other).logits, **CLOSE)
    assert torch.equal(generated, tiny.generate(pixel_values=other, **GREEDY))


def test_a_patch_keeps_to_its_block_and_positions(tiny, byte_captioner, noise, inputs):
    ids, image, other = inputs["input_ids"][:1], *inputs["pixel_values"].split(1)
    visual_tokens = tiny.encode(image)[1].visual_tokens
    visual_tokens[:, [0, 2]] = tiny.encode(other)[1].visual_tokens[:, [0, 2]]
    with patch(byte_captioner, noise[1], "block 1", positions=[0, 2]):
        patched = tiny(ids, image).logits
    assert_close(patched, tiny(ids, visual_tokens=visual_tokens).logits, **CLOSE)
    image_tokens = tiny.vision(image)
    image_tokens[:, 3] = tiny.vision(other)[:, 3]
    with patch(byte_captioner, noise[1], "image_tokens", positions=[3]):
        patched = tiny(ids, image).logits
    assert_close(patched, tiny(ids, image_tokens=image_tokens).logits, **CLOSE)


def test_blocks_restore_the_model_also_after_an_exception(tiny, byte_captioner, noise, inputs):
    before, everything = tiny(**inputs).logits, mute(tiny, **EVERYTHING)
    patched = patch(byte_captioner, noise[0], "block 0")
    for each in (everything, blank_image(tiny), patched, everything):
        with pytest.raises(KeyError) as error, each, each:
            raise KeyError(tiny(**inputs).logits)
        assert not torch.equal(error.value.args[0], before)
        assert torch.equal(tiny(**inputs).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_nested_blocks_both_apply(tiny, byte_captioner, noise, inputs):
    with mute(tiny, queries=[0, 2], heads=[(0, 1)]):
        together = tiny(**inputs).logits
    with mute(tiny, queries=[0]), mute(tiny, heads=[(0, 1)]), mute(tiny, queries=[2]):
        assert_close(tiny(**inputs).logits, together, **CLOSE)
    with mute(tiny, queries=[0]), patch(byte_captioner, noise[1], "image_tokens"):
        nested = tiny(inputs["input_ids"][:2], inputs["pixel_values"][:1]).logits
    with mute(tiny, queries=[0]):
        expected = tiny(inputs["input_ids"][:2], inputs["pixel_values"][1:]).logits
    assert_close(nested, expected, **CLOSE)


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_every_image_of_a_batch_can_have_its_own(tiny, byte_captioner, noise, inputs, settings):
    pixels = inputs["pixel_values"]
    patched = patch(byte_captioner, noise[0], "block 0", positions=[1, 4])
    muted = mute(tiny, queries=[0], bridge_heads=[1]), mute(tiny, blocks=[1])
    several = [muted[0], patched, mute(tiny), muted[1]]
    batch = pixels[[0, 1, 0, 1]]
    ids = inputs["input_ids"].repeat_interleave(2, dim=0)  # [8,T]: two captions an image
    with stack(several):
        logits = tiny(ids, batch).logits
        generated = tiny.generate(pixel_values=batch, **{**GREEDY, **settings})
    for i, intervention in enumerate(several):
        with intervention:
            expected = tiny(ids[2 * i :][:2], batch[[i]]).logits
            alone = tiny.generate(pixel_values=batch[[i]], **{**GREEDY, **settings})
        assert_close(logits[2 * i :][:2], expected, **CLOSE)
        rows = len(alone)
        assert torch.equal(generated[rows * i :][:rows, : alone.shape[1]], alone)


def test_captioner_mutes_too(byte_captioner, noise):
    with mute(byte_captioner.model, queries=[0, 1], bridge_heads=[0, 3]):
        muted, alone = (byte_captioner.caption(x, preset="greedy") for x in (noise, noise[0]))
    assert muted[0].token_ids == alone.token_ids
    assert muted != byte_captioner.caption(noise, preset="greedy")


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
def test_a_sweep_equals_muting_one_by_one(byte_captioner, noise, over, last, count, labels):
    plain = trace(byte_captioner, noise[0], "a red car")
    swept = sweep(plain, over)
    assert len(swept) == count
    assert (swept[0].label, swept[-1].label) == labels
    assert [word.text for word in swept[0].words] == ["a", "red", "car"]
    assert len({tuple(one.after.round(4)) for one in swept}) == count
    with mute(byte_captioner.model, **{over: [last]}):
        muted = trace(byte_captioner, noise[0], "a red car")
    for traced, found in ((plain, swept[-1].before), (muted, swept[-1].after)):
        expected = [traced.logprobs[list(word.tokens)].sum() for word in traced.words]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_effects_of_mutes_and_patches_in_one_batch(byte_captioner, noise):
    model = byte_captioner.model
    here, there = trace_all(byte_captioner, noise[:2], ["two dogs"] * 2)
    patched, blank = patch(byte_captioner, noise[1], "image_tokens"), blank_image(model)
    nothing, swapped, without = effects(here, [mute(model), patched, blank])
    np.testing.assert_allclose(nothing.change, 0, atol=1e-6)
    (expected,) = effects(there, [blank])
    np.testing.assert_allclose(swapped.after, expected.before, atol=1e-5)
    np.testing.assert_allclose(without.after, expected.after, atol=1e-5)
    assert np.abs(swapped.change).max() > 1e-3
    with patched:  # in force for all rows
        (outer,) = effects(here, [blank])
    np.testing.assert_allclose(outer.before, expected.before, atol=1e-5)


def test_half_precision(byte_captioner, noise):
    half = Captioner(copy.deepcopy(byte_captioner.model).bfloat16(), byte_captioner.processor)
    rough, exact = (trace(c, noise[0], "a red car") for c in (half, byte_captioner))
    for over in ("queries", "heads", "blocks"):
        for one, other in zip(sweep(rough, over), sweep(exact, over), strict=True):
            np.testing.assert_allclose(one.after, other.after, rtol=0.05)
    with patch(half, noise[1], "image_tokens"):
        assert half.caption(noise[0], preset="greedy").text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"queries": [4]}, "query 4 does not exist; choose from global token to query 3"),
        ({"queries": [-1]}, "query -1 does not exist"),
        ({"heads": [(2, 0)]}, "block 2 does not exist; choose from 0 to 1"),
        ({"self_heads": [(0, 8)]}, "head 8 does not exist; choose from 0 to 7"),
        ({"bridge_heads": [8]}, "head 8 does not exist"),
        ({"blocks": [2]}, "block 2 does not exist"),
    ],
)
def test_parts_that_do_not_exist_are_refused(tiny, part, message):
    with pytest.raises(ValueError, match=message):
        mute(tiny, **part)


def test_what_does_not_fit_is_refused(tiny, byte_captioner, noise, inputs):
    traced = trace(byte_captioner, noise[0], "a car")
    with pytest.raises(ValueError, match="no stage 'block 2'; choose one of image_tokens"):
        patch(byte_captioner, noise[0], "block 2")
    with pytest.raises(ValueError, match="position of image_tokens 4 does not exist"):
        patch(byte_captioner, noise[0], "image_tokens", positions=[4])
    with pytest.raises(ValueError, match="no sweep over 'words'; choose one of queries"):
        sweep(traced, "words")
    two = stack([mute(tiny, queries=[i]) for i in range(2)])
    shapes = r"shape \[2, 1, 1, 5\] does not fit .* \[1, 1, 1, 5\]"
    with two, pytest.raises(ValueError, match=shapes):
        tiny(inputs["input_ids"], inputs["pixel_values"][:1])
    with pytest.raises(ValueError, match=r"'query 0 \| query 1' is for several"):
        effects(traced, [two])
    with pytest.raises(ValueError, match="'query 1' is an intervention in another model"):
        effects(traced, [mute(copy.deepcopy(tiny), queries=[1])])
    everything = mute(tiny, queries=range(4), global_token=True)
    with everything, pytest.raises(ValueError, match="no visual token is left; mute fewer"):
        tiny(**inputs)
    with pytest.raises(ValueError, match="no word in the caption ' '"):
        effects(trace(byte_captioner, noise[0], " "), [blank_image(tiny)])
