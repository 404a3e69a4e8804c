"""A trace equals the model's own forward pass, and finds the tokens of every word."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.interpretation.maps import word_maps
from qvision_lab.interpretation.trace import Trace, trace, trace_all
from qvision_lab.model.qformer import QFormerOutput

CAPTION = "It's a café, x-ray 🐟."


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_words_are_the_captions_and_their_tokens_spell_them(byte_captioner, noise):
    traced = trace(byte_captioner, noise[0], CAPTION)
    assert [w.text for w in traced.words] == ["It's", "a", "café", ",", "x-ray", "🐟."]
    assert [CAPTION[slice(*w.span)] for w in traced.words] == [w.text for w in traced.words]
    for word in traced.words:
        assert byte_captioner.processor.decode(traced.token_ids[list(word.tokens)]) == word.text


def test_a_trace_is_the_models_own_forward_pass(byte_captioner, noise):
    model, processor = byte_captioner.model, byte_captioner.processor
    traced = trace(byte_captioner, noise[0], CAPTION)
    inputs = processor(images=noise[0], text=CAPTION)
    ids = inputs["input_ids"]
    with torch.no_grad():
        output = model(ids, pixel_values=inputs["pixel_values"], output_attentions=True)
    expected = output.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(traced.logprobs, expected, atol=1e-5)
    np.testing.assert_array_equal(traced.token_ids, ids[0, 1:])
    bridge = output.decoder_cross_attentions[0, :, :-1]  # read where a token is predicted
    np.testing.assert_allclose(traced.bridge_attentions, bridge, atol=1e-6)
    for name in ("qformer_self", "qformer_cross", "bridge"):
        np.testing.assert_allclose(getattr(traced, f"{name}_attentions").sum(-1), 1, atol=1e-5)
    assert traced.tokens[-1] == "<END>"
    assert list(traced.norms) == [
        *("vision", "image tokens", "Q-Former block 0", "Q-Former block 1"),
        *("text layer 0", "text layer 1", "text layer 2", "bridge"),
    ]
    lengths = np.linalg.norm(traced.visual_tokens, axis=1)
    np.testing.assert_allclose(traced.norms["Q-Former block 1"], lengths, rtol=1e-5)
    assert not hooks(model)


def test_a_trace_prints_a_few_lines(byte_captioner, noise):
    traced = trace(byte_captioner, noise[0], "a <red> dog")
    assert "2 blocks, 8 heads, 5 visual tokens, 4 patches" in repr(traced)
    assert len(repr(traced).splitlines()) == 3
    assert "&lt;" in traced._repr_html_()
    assert "Captioner of a model in memory" in repr(byte_captioner)


def test_a_batch_equals_single_traces_also_of_an_array_that_is_filled_again(byte_captioner, noise):
    def frames():
        frame = np.empty((40, 60, 3), np.uint8)
        for image in noise:
            frame[:] = np.asarray(image)
            yield frame

    captions = ["a", CAPTION, "a red dog"]
    traces = trace_all(byte_captioner, frames(), captions, batch_size=2)
    for batched, image, caption in zip(traces, noise, captions, strict=True):
        alone = trace(byte_captioner, image, caption)
        assert (batched.caption, batched.words) == (alone.caption, alone.words)
        for name in (f.name for f in fields(alone)):
            if isinstance(value := getattr(alone, name), np.ndarray):
                np.testing.assert_allclose(getattr(batched, name), value, atol=1e-5, err_msg=name)


def test_without_a_caption_it_is_the_greedy_one(byte_captioner, noise):
    caption = byte_captioner.caption(noise[0], preset="greedy").text
    assert trace(byte_captioner, noise[0]).caption == caption
    traces = trace_all(byte_captioner, noise[:2], [None, "a"])
    assert [t.caption for t in traces] == [caption, "a"]


def test_saved_and_loaded_it_is_the_same(byte_captioner, noise, tmp_path):
    traced, path = trace(byte_captioner, noise[0], CAPTION), tmp_path / "run.1"
    traced.save(path)
    loaded = Trace.load(path, byte_captioner)
    for name in (f.name for f in fields(traced)):
        np.testing.assert_equal(getattr(loaded, name), getattr(traced, name))
    assert list(tmp_path.iterdir()) == [path]
    without_model = Trace.load(path)
    maps = (word_maps(each, "rollout") for each in (without_model, traced))
    for mine, expected in zip(*maps, strict=True):
        np.testing.assert_array_equal(mine.values, expected.values)
    with pytest.raises(ValueError, match=r"Trace\.load"):
        word_maps(without_model)


def test_a_missing_map_is_an_error_and_leaves_no_hook(byte_captioner, noise):
    def fused(module, inputs, output):
        return QFormerOutput(output.visual_tokens, None, None)

    with (
        byte_captioner.model.qformer.register_forward_hook(fused),
        pytest.raises(ValueError, match="Q-Former self attention"),
    ):
        trace(byte_captioner, noise[0], CAPTION)
    assert not hooks(byte_captioner.model)


def test_invalid_or_unusual_input(byte_captioner, noise):
    with pytest.raises(TypeError, match="list is no picture"):
        trace(byte_captioner, noise, CAPTION)
    with pytest.raises(ValueError, match="a caption has 104 tokens, the model 64 positions"):
        trace(byte_captioner, noise[0], "a" * 100)
    empty = trace(byte_captioner, noise[0], "")
    assert (empty.words, word_maps(empty)) == ((), [])
    pixel = Image.new("RGB", (1, 1))
    assert np.isfinite(trace(byte_captioner, pixel, "a dog").logprobs).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same(byte_captioner, noise, dtype):
    half = replace(byte_captioner, model=copy.deepcopy(byte_captioner.model).to(dtype))
    full, rough = (trace(c, noise[0], CAPTION) for c in (byte_captioner, half))
    np.testing.assert_allclose(rough.logprobs, full.logprobs, atol=0.3)
    for method in ("composition", "rollout", "gradient", "occlusion", "integrated_gradients"):
        for mine, exact in zip(word_maps(rough, method), word_maps(full, method), strict=True):
            tolerance = max(0.3 * np.abs(exact.values).max(), 0.1)  # the second in nats
            np.testing.assert_allclose(mine.values, exact.values, atol=tolerance)
