"""A recorded forward pass: nothing else than the model does, and every word with its tokens."""

import copy
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.captioning import Captioner
from qvision_lab.interpretation.trace import Trace, trace, trace_all
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.model.qformer import QFormerOutput

CAPTION = "It's a café, x-ray 🐟."


@pytest.fixture
def captioner(tiny, byte_tokenizer) -> Captioner:
    return Captioner(tiny, QVisionProcessor.from_config(tiny.config, byte_tokenizer))


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(3)]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_words_are_the_captions_and_their_tokens_spell_them(captioner, pictures):
    traced = trace(captioner, pictures[0], CAPTION)
    assert [w.text for w in traced.words] == ["It's", "a", "café", ",", "x-ray", "🐟."]
    for word in traced.words:
        assert CAPTION[slice(*word.span)] == word.text
        spelled = captioner.processor.decode(traced.token_ids[list(word.tokens)])
        assert spelled == word.text


def test_a_trace_is_the_models_own_forward_pass(captioner, pictures):
    model, processor = captioner.model, captioner.processor
    traced = trace(captioner, pictures[0], CAPTION)
    inputs = processor(images=pictures[0], text=CAPTION)
    ids = inputs["input_ids"]
    with torch.no_grad():
        output = model(ids, pixel_values=inputs["pixel_values"], output_attentions=True)
    expected = output.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(traced.logprobs, expected, atol=1e-5)
    np.testing.assert_array_equal(traced.token_ids, ids[0, 1:])
    bridge = output.decoder_cross_attentions[0, :, :-1]  # read where a token is predicted
    np.testing.assert_allclose(traced.bridge_attentions, bridge, atol=1e-6)
    for name in ("qformer_self", "qformer_cross", "bridge", "text"):
        maps = getattr(traced, f"{name}_attentions")
        np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert traced.tokens[-1] == "<END>"
    assert list(traced.norms) == [
        *("vision", "image tokens", "Q-Former block 0", "Q-Former block 1"),
        *("text layer 0", "text layer 1", "text layer 2", "bridge"),
    ]
    lengths = np.linalg.norm(traced.visual_tokens, axis=1)
    np.testing.assert_allclose(traced.norms["Q-Former block 1"], lengths, rtol=1e-5)
    assert not hooks(model)


def test_many_at_once_equal_one_by_one(captioner, pictures):
    captions = ["a", CAPTION, "a red dog"]
    for together, picture, caption in zip(
        trace_all(captioner, pictures, captions, batch_size=2), pictures, captions, strict=True
    ):
        alone = trace(captioner, picture, caption)
        assert (together.caption, together.words) == (alone.caption, alone.words)
        for name in (f.name for f in fields(alone)):
            if isinstance(value := getattr(alone, name), np.ndarray):
                np.testing.assert_allclose(getattr(together, name), value, atol=1e-5, err_msg=name)


def test_without_a_caption_it_is_the_greedy_one(captioner, pictures):
    caption = captioner.caption(pictures[0], preset="greedy").text
    assert trace(captioner, pictures[0]).caption == caption
    assert [t.caption for t in trace_all(captioner, pictures[:2], [None, "a"])] == [caption, "a"]


def test_saved_and_loaded_it_is_the_same(captioner, pictures, tmp_path):
    traced = trace(captioner, pictures[0], CAPTION)
    traced.save(tmp_path / "one.safetensors")
    loaded = Trace.load(tmp_path / "one.safetensors", captioner)
    for name in (f.name for f in fields(traced)):
        np.testing.assert_equal(getattr(loaded, name), getattr(traced, name))
    assert {path.name for path in tmp_path.iterdir()} == {"one.safetensors", "one.json"}
    modelless = Trace.load(tmp_path / "one.safetensors")
    for mine, theirs in zip(
        modelless.word_maps("rollout"), traced.word_maps("rollout"), strict=True
    ):
        np.testing.assert_array_equal(mine.values, theirs.values)
    with pytest.raises(ValueError, match=r"Trace\.load"):
        modelless.word_maps()


def test_a_missing_map_is_an_error_and_leaves_no_hook(captioner, pictures):
    def fused(module, inputs, output):
        return QFormerOutput(output.visual_tokens, None, None)

    with (
        captioner.model.qformer.register_forward_hook(fused),
        pytest.raises(ValueError, match="Q-Former self attention"),
    ):
        trace(captioner, pictures[0], CAPTION)
    assert not hooks(captioner.model)


def test_bad_or_unusual_input(captioner, pictures):
    with pytest.raises(TypeError, match="list is no picture"):
        trace(captioner, pictures, CAPTION)
    empty = trace(captioner, pictures[0], "")
    assert (empty.words, empty.word_maps()) == ((), [])
    assert np.isfinite(trace(captioner, Image.new("RGB", (1, 1)), "a dog").logprobs).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same(captioner, pictures, dtype):
    half = Captioner(copy.deepcopy(captioner.model).to(dtype), captioner.processor)
    whole, rough = (trace(c, pictures[0], CAPTION) for c in (captioner, half))
    np.testing.assert_allclose(rough.logprobs, whole.logprobs, atol=0.3)
    for method in ("composition", "rollout", "gradient", "occlusion", "integrated_gradients"):
        for mine, theirs in zip(rough.word_maps(method), whole.word_maps(method), strict=True):
            tolerance = max(0.3 * np.abs(theirs.values).max(), 0.1)  # the second in nats
            np.testing.assert_allclose(mine.values, theirs.values, atol=tolerance)
