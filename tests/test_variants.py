"""What an ablation varies in the model: every variant, against itself by other ways."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from test_model import ONE_BY_ONE, TOLERANCE, generate_with_and_without_cache
from torch.testing import assert_close

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.interpretation.interventions import mute, patch, sweep
from qvision_lab.interpretation.trace import Trace, trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training.trainer import MuonAdamW
from qvision_lab.widgets import explore, parts

VARIANTS = {
    "no global token": {"global_token": "none"},
    "global token added": {"global_token": "added"},
    "image tokens": {"bridge_reads": "image_tokens"},
    "mean image token": {"bridge_reads": "mean_image_token"},
    "prefix": {"bridge": "prefix"},
    "image tokens as prefix": {"bridge": "prefix", "bridge_reads": "image_tokens"},
}


PICTURE = Image.new("RGB", (32, 32), "teal")


def varied(tiny, changes):
    """A random model in the sizes of `tiny`."""
    torch.manual_seed(5)
    config = QVisionConfig.from_dict({**tiny.config.to_dict(), **changes})
    return QVisionForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tiny):
    """A random model of each variant, with biases too."""
    model = varied(tiny, VARIANTS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def captions() -> torch.Tensor:
    ids = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[1, 5], ids[1, 6:] = 257, 258, 256
    return ids


def test_cached_equals_uncached(variant, pixels):
    cached = generate_with_and_without_cache(variant, pixels)
    whole = variant(input_ids=cached.sequences, pixel_values=pixels).logits[:, :-1]
    words = cached.sequences[:, :-1] != variant.config.pad_token_id
    assert_close(torch.stack(cached.logits, dim=1)[words], whole[words], **TOLERANCE)


def test_batched_equals_single(variant, pixels, captions):
    together = variant(input_ids=captions, pixel_values=pixels).logits
    words = captions != variant.config.pad_token_id
    masked = variant(input_ids=captions, pixel_values=pixels, attention_mask=words.long()).logits
    assert_close(masked[words], together[words], **TOLERANCE)
    generated = variant.generate(pixel_values=pixels, **ONE_BY_ONE)
    for i in range(len(pixels)):
        alone = variant(input_ids=captions[[i]], pixel_values=pixels[[i]]).logits[0]
        assert_close(alone[words[i]], together[i][words[i]], **TOLERANCE)
        row = variant.generate(pixel_values=pixels[[i]], **ONE_BY_ONE)[0]
        assert torch.equal(row, generated[i, : len(row)])
    assert (
        together[0] - variant(input_ids=captions, pixel_values=-pixels).logits[0]
    ).abs().max() > 0.01


def test_several_captions_of_an_image_equal_repeated_images(variant, pixels, captions):
    grouped = variant(input_ids=captions, pixel_values=pixels[:2])
    repeated = variant(input_ids=captions, pixel_values=pixels[[0, 0, 1, 1]])
    assert_close(grouped.logits, repeated.logits, **TOLERANCE)


def test_saved_variants_come_back(variant, pixels, captions, tmp_path):
    variant.save_pretrained(tmp_path)
    loaded = QVisionForConditionalGeneration.from_pretrained(tmp_path)
    logits = variant(input_ids=captions, pixel_values=pixels).logits
    assert torch.equal(loaded(input_ids=captions, pixel_values=pixels).logits, logits)
    for name in ("global_token", "bridge", "bridge_reads"):
        assert getattr(loaded.config, name) == getattr(variant.config, name)


def test_all_weights_of_a_variant_learn(variant, pixels, captions):
    model = QVisionForConditionalGeneration(variant.config)
    model.vision.tower.requires_grad_(False)
    optimizer = MuonAdamW(model, 1e-3, 0.02, 0.0)
    model(input_ids=captions, pixel_values=pixels, labels=captions).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_maps_say_what_visual_tokens_are_made_of(variant, pixels, captions):
    shown = variant(input_ids=captions, pixel_values=pixels, output_attentions=True)
    logits = variant(input_ids=captions, pixel_values=pixels).logits
    assert_close(shown.logits, logits, **TOLERANCE)
    count = shown.visual_tokens.shape[1]
    assert len(variant.config.visual_token_labels) == count
    for cross in shown.qformer_cross_attentions:
        assert cross.shape == (4, 8, count, 4)
        assert_close(cross.sum(-1), torch.ones(cross.shape[:-1]))
    if variant.config.bridge == "prefix":
        assert shown.decoder_cross_attentions is None
    else:
        assert shown.decoder_cross_attentions.shape == (4, 8, 9, count)


def test_an_added_global_token_reaches_every_word(tiny, pixels, captions):
    added = varied(tiny, {"global_token": "added"})
    added.load_state_dict(tiny.state_dict())
    states, plain = (
        model(input_ids=captions, pixel_values=pixels, output_hidden_states=True).hidden_states[0]
        for model in (added, tiny)
    )
    token = tiny.encode(pixels)[1].visual_tokens[:, :1]
    assert_close(states - plain, (0.2 * token).expand_as(states), **TOLERANCE)


def test_configurations_of_before_are_the_published_architecture(tiny):
    fields = tiny.config.to_dict()
    for name in ("global_token", "bridge", "bridge_reads"):
        del fields[name]
    config = QVisionConfig.from_dict(fields)
    assert (config.global_token, config.bridge) == ("token", "cross_attention")
    assert config.bridge_reads == "visual_tokens"
    with pytest.raises(StrictDataclassError, match="bridge"):
        QVisionConfig(bridge="none")


@pytest.fixture
def captioner_of(tiny, byte_tokenizer):
    def make(**changes) -> Captioner:
        model = varied(tiny, changes)
        return Captioner(model, QVisionProcessor.from_config(model.config, byte_tokenizer))

    return make


def test_queries_keep_their_names_without_the_global_token(captioner_of, tmp_path):
    captioner = captioner_of(global_token="none")
    queries = [f"query {i}" for i in range(4)]
    assert [effect.label for effect in sweep(captioner, PICTURE, "a dog", "queries")] == queries
    with mute(captioner.model, queries=[3]):
        traced = trace(captioner, PICTURE, "a dog")
    assert (traced.bridge_attentions[..., 3] == 0).all()
    assert (traced.bridge_attentions[..., :3] > 0).all()
    traced.save(tmp_path / "trace.safetensors")
    maps = Trace.load(tmp_path / "trace.safetensors").query_maps()
    assert [patch_map.label for patch_map in maps] == queries
    assert [part.label for part in parts(captioner.model)["Queries"].values()] == queries
    with pytest.raises(ValueError, match=r"global token does not exist; .* query 0 to query 3"):
        mute(captioner.model, global_token=True)


def test_looking_inside_names_the_part_that_a_variant_lacks(captioner_of):
    prefix, patches = captioner_of(bridge="prefix"), captioner_of(bridge_reads="image_tokens")
    for look in (lambda: trace(prefix, PICTURE, "a dog"), lambda: explore(prefix)):
        with pytest.raises(ValueError, match=r"this model has no bridge .*bridge='prefix'"):
            look()
    seen = trace(patches, PICTURE, "a dog")
    assert seen.query_maps()[3].label == "image token 3"
    for look in (
        lambda: seen.word_maps("gradient"),
        lambda: patch(patches, PICTURE, "visual_tokens"),
        lambda: explore(patches),
    ):
        with pytest.raises(ValueError, match=r"no Q-Former .*bridge_reads='image_tokens'"):
            look()


@pytest.mark.parametrize("changes", [{"bridge": "prefix"}, {"global_token": "added"}])
def test_steps_that_are_not_compiled_are_refused(tiny, changes):
    with pytest.raises(ValueError, match="caption with the model as it is"):
        FastDecoding(varied(tiny, changes), rows=1)
