"""Every architecture, the published one and the ablations: one result however it is computed."""

import copy

import pytest
import torch
from conftest import tiny_captioner, with_noise
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from test_model import GREEDY, TOLERANCE
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import qvision_lab as ql
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.interpretation.interventions import mute, patch, sweep
from qvision_lab.interpretation.trace import Trace, trace
from qvision_lab.training.optimizers import MuonAdamW
from qvision_lab.widgets import explore
from qvision_lab.widgets.backend import Backend

VARIANTS = {
    "published": {},
    "no global token": {"global_token": "none"},
    "global token added": {"global_token": "added"},
    "image tokens": {"bridge_reads": "image_tokens"},
    "mean image token": {"bridge_reads": "mean_image_token"},
    "prefix": {"bridge": "prefix"},
    "image tokens as prefix": {"bridge": "prefix", "bridge_reads": "image_tokens"},
}
ARCHITECTURE = {"global_token": "token", "bridge": "cross_attention"}
ARCHITECTURE |= {"bridge_reads": "visual_tokens"}
IMAGE = Image.new("RGB", (32, 32), "teal")


def varied(tiny, changes):
    """A random model in the sizes of `tiny`."""
    torch.manual_seed(5)
    config = ql.QVisionConfig.from_dict({**tiny.config.to_dict(), **changes})
    return ql.QVisionForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tiny):
    return with_noise(varied(tiny, VARIANTS[request.param]))


def test_cached_equals_uncached_and_teacher_forced(model, pixels):
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(pixel_values=pixels, **settings)
    uncached = model.generate(pixel_values=pixels, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **TOLERANCE)
    beams = {**GREEDY, "num_beams": 3}
    again = model.generate(pixel_values=pixels, use_cache=False, **beams)
    assert torch.equal(model.generate(pixel_values=pixels, **beams), again)
    whole = model(input_ids=cached.sequences, pixel_values=pixels).logits[:, :-1]
    words = cached.sequences[:, :-1] != model.config.pad_token_id
    assert_close(torch.stack(cached.logits, dim=1)[words], whole[words], **TOLERANCE)


def test_batched_equals_single(model, pixels, captions):
    together = model(input_ids=captions, pixel_values=pixels).logits
    words = captions != model.config.pad_token_id
    masked = model(input_ids=captions, pixel_values=pixels, attention_mask=words.long()).logits
    assert_close(masked[words], together[words], **TOLERANCE)
    generated = model.generate(pixel_values=pixels, **GREEDY)
    for i in range(len(pixels)):
        alone = model(input_ids=captions[[i]], pixel_values=pixels[[i]]).logits[0]
        assert_close(alone[words[i]], together[i][words[i]], **TOLERANCE)
        row = model.generate(pixel_values=pixels[[i]], **GREEDY)[0]
        assert torch.equal(row, generated[i, : len(row)])
    others = model(input_ids=captions, pixel_values=-pixels).logits
    assert (together[0] - others[0]).abs().max() > 0.01


def test_several_captions_of_an_image_equal_repeated_images(model, pixels, captions):
    grouped = model(input_ids=captions, pixel_values=pixels[:2])
    repeated = model(input_ids=captions, pixel_values=pixels[[0, 0, 1, 1]])
    assert_close(grouped.logits, repeated.logits, **TOLERANCE)
    assert len(grouped.visual_tokens) == 2


def test_saved_models_load_through_transformers(model, pixels, captions, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is ql.QVisionForConditionalGeneration
    assert loaded.generation_config.repetition_penalty == 1.8
    assert loaded.decoder.lm_head.weight is loaded.decoder.language_model.wte.weight
    logits = model(input_ids=captions, pixel_values=pixels).logits
    assert torch.equal(loaded(input_ids=captions, pixel_values=pixels).logits, logits)
    for name in ARCHITECTURE:
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_tensors_have_the_names_of_the_published_architecture(tiny, model):
    absent = () if model.config.bridge_reads == "visual_tokens" else ("qformer.",)
    absent += ("decoder.bridge.",) if model.config.bridge == "prefix" else ()
    ours = model.state_dict()
    assert list(ours) == [name for name in tiny.state_dict() if not name.startswith(absent)]
    if model.config.global_token == "none":
        assert ours["qformer.global_token"].shape == (1, 0, 32)


def test_all_weights_of_a_variant_are_trained(model, pixels, captions):
    model = copy.deepcopy(model)
    model.vision.tower.requires_grad_(False)
    model(input_ids=captions, pixel_values=pixels, labels=captions).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    MuonAdamW(model, 1e-3, 0.02, 0.0).step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_attention_maps_are_distributions_and_change_nothing(model, pixels, captions):
    shown = model(input_ids=captions, pixel_values=pixels, output_attentions=True)
    logits = model(input_ids=captions, pixel_values=pixels).logits
    assert_close(shown.logits, logits, **TOLERANCE)
    count = shown.visual_tokens.shape[1]
    assert len(model.config.visual_token_labels) == count
    blocks, prefix = len(model.qformer.blocks) or 1, model.config.bridge == "prefix"
    length = 9 + prefix * count
    bridge = () if prefix else (shown.decoder_cross_attentions,)
    assert [m.shape for m in bridge] == [(4, 8, 9, count)] * (not prefix)
    assert [m.shape for m in shown.attentions] == [(4, 4, length, length)] * 2
    assert [m.shape for m in shown.qformer_self_attentions] == [(4, 8, count, count)] * blocks
    assert [m.shape for m in shown.qformer_cross_attentions] == [(4, 8, count, 4)] * blocks
    for attention in (*shown.qformer_cross_attentions, *bridge):
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert not prefix or shown.decoder_cross_attentions is None


def test_an_added_global_token_reaches_every_word(tiny, pixels, captions):
    added = varied(tiny, {"global_token": "added"})
    added.load_state_dict(tiny.state_dict())
    states, plain = (
        model(input_ids=captions, pixel_values=pixels, output_hidden_states=True).hidden_states[0]
        for model in (added, tiny)
    )
    token = tiny.encode(pixels)[1].visual_tokens[:, :1]
    assert_close(states - plain, (0.2 * token).expand_as(states), **TOLERANCE)


def test_old_configurations_are_the_published_architecture(tiny):
    fields = tiny.config.to_dict()
    for name, published in ARCHITECTURE.items():
        assert fields.pop(name) == published
    assert ql.QVisionConfig.from_dict(fields).to_dict() == tiny.config.to_dict()
    with pytest.raises(StrictDataclassError, match="bridge"):
        ql.QVisionConfig(bridge="none")


def test_queries_keep_their_names_without_the_global_token(tiny, tmp_path):
    captioner = tiny_captioner(varied(tiny, {"global_token": "none"}))
    queries = [f"query {i}" for i in range(4)]
    effects = sweep(trace(captioner, IMAGE, "a dog"), "queries")
    assert [effect.label for effect in effects] == queries
    with mute(captioner.model, queries=[3]):
        traced = trace(captioner, IMAGE, "a dog")
    assert (traced.bridge_attentions[..., 3] == 0).all()
    assert (traced.bridge_attentions[..., :3] > 0).all()
    traced.save(tmp_path / "trace.safetensors")
    maps = ql.query_maps(Trace.load(tmp_path / "trace.safetensors"))
    assert [patch_map.label for patch_map in maps] == queries
    parts = Backend(captioner).parts["Queries"].values()
    assert [mute(captioner.model, **part).label for part in parts] == queries
    with pytest.raises(ValueError, match=r"global token does not exist; .* query 0 to query 3"):
        mute(captioner.model, global_token=True)


def test_interpretation_names_the_part_that_a_variant_lacks(tiny):
    prefix = tiny_captioner(varied(tiny, {"bridge": "prefix"}))
    patches = tiny_captioner(varied(tiny, {"bridge_reads": "image_tokens"}))
    for inspect in (lambda: trace(prefix, IMAGE, "a dog"), lambda: explore(prefix)):
        with pytest.raises(ValueError, match=r"this model has no bridge .*bridge='prefix'"):
            inspect()
    traced = trace(patches, IMAGE, "a dog")
    assert ql.query_maps(traced)[3].label == "image token 3"
    for inspect in (
        lambda: ql.word_maps(traced, "gradient"),
        lambda: patch(patches, IMAGE, "visual_tokens"),
        lambda: explore(patches),
    ):
        with pytest.raises(ValueError, match=r"no Q-Former .*bridge_reads='image_tokens'"):
            inspect()


@pytest.mark.parametrize("changes", [{"bridge": "prefix"}, {"global_token": "added"}])
def test_steps_that_are_not_compiled_are_refused(tiny, changes):
    with pytest.raises(ValueError, match="caption with the model as it is"):
        FastDecoding(varied(tiny, changes), rows=1)
