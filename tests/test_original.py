"""The original algorithm gives the original ids, and every faster method gives the same ones."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import with_noise
from transformers import GenerationConfig

from qvision_lab import scenes
from qvision_lab.benchmark.latency import generate_the_original_way
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.decoding_step import Int8Decoder, Int8Linear, copy_sharing_weights, join
from qvision_lab.captioning.generation import Search
from qvision_lab.captioning.sampling import Choice, row_keys
from qvision_lab.interpretation.interventions import mute
from qvision_lab.model.captioner import PLAIN


def test_the_original_algorithm_gives_the_reference_ids(reference):
    model, expected, facts = reference
    greedy = [case for case in facts["generate"] if case["name"] == "greedy"]
    assert len(greedy) == 6
    for case in greedy:
        image = expected["pixel_values"][[case["image"]]]
        assert generate_the_original_way(model, image)[0].tolist() == case["ids"]


def test_fast_decoding_gives_the_reference_ids(reference):
    check_likeliest_words(*reference)


def check_likeliest_words(model, expected: dict, facts: dict) -> list[dict]:
    """Fast decoding of the original's generations by the likeliest word; the cases."""
    cases = [case for case in facts["generate"] if case["settings"]["top_k"] == 1]
    assert len(cases) == 12
    decoding = FastDecoding(model)
    for case in cases:
        settings = dict(case["settings"])
        steps, end = settings.pop("max_len"), len(case["ids"]) - 1
        image = expected["pixel_values"][[case["image"]]]
        for do_sample in (False, True):  # a draw among one word
            draws = row_keys(["any"]) if do_sample else None
            ids = run(decoding, {**settings, "do_sample": do_sample}, steps, image, draws)
            assert ids[0, :end].tolist() == case["ids"][1:]
            assert (ids[0, end:] == model.config.pad_token_id).all()
    return cases


def run(decoding: FastDecoding, settings: dict, steps: int, pixel_values, draws=None):
    model = decoding.model.config
    tokens = {"bos_token_id": model.start_token_id, "eos_token_id": model.end_token_id}
    config = GenerationConfig(**{**PLAIN, **settings}, **tokens, pad_token_id=model.pad_token_id)
    return decoding.run(Choice.from_config(config), steps, draws, pixel_values=pixel_values)[0]


def test_faster_methods_give_the_same_ids(tiny, pixels):
    pixels, length = pixels[:3], {"min_length": 5, "max_new_tokens": 20}
    slow = [generate_the_original_way(tiny, image[None], **length)[0].tolist() for image in pixels]

    def check(ids: torch.Tensor, expected: list[list[int]]) -> None:
        for row, reference in zip(ids.tolist(), expected, strict=True):
            assert row[: len(reference) - 1] == reference[1:]
            assert set(row[len(reference) - 1 :]) <= {tiny.config.pad_token_id}

    greedy = {"min_length": 5, "do_sample": False}
    compiled = FastDecoding(tiny, rows=1)
    assert compiled.compile_seconds > 0
    check(run(compiled, greedy, 20, pixels[:1]), slow[:1])  # really compiled
    rounded = copy_sharing_weights(tiny)
    rounded.decoder = Int8Decoder(tiny.decoder)
    assert not rounded.decoder.lm_head.weight.is_floating_point()
    int8 = run(FastDecoding(rounded, rows=1), greedy, 20, pixels[:1])  # not the code of `tiny`
    check(run(compiled, greedy, 20, pixels[:1]), slow[:1])
    assert run(FastDecoding(rounded), greedy, 20, pixels[:1]).equal(int8)
    how = {**PLAIN, **length, "do_sample": False}
    by_library = rounded.generate(pixel_values=pixels[:1], **how)
    assert by_library[0, 1:].tolist() == int8[0].tolist()
    with torch.compiler.set_stance("force_eager"):
        for decoding in (FastDecoding(tiny), compiled, FastDecoding(tiny, rows=4)):  # one padded
            check(run(decoding, greedy, 20, pixels), slow)


SETTINGS = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.8, "min_length": 9},
    {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.5}
    | {"num_return_sequences": 2},
    {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 2, "early_stopping": True, "length_penalty": -1.0},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 3, "repetition_penalty": 1.8, "min_length": 9},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_decoding_is_generate(tiny, pixels, settings, dtype):
    model, k = copy.deepcopy(tiny).to(dtype), settings.get("num_return_sequences", 1)
    config = {**PLAIN, "do_sample": False, **settings}
    search = Search.from_settings(model, preset="greedy", seed=3, **config, max_new_tokens=20)
    fast = search.run(FastDecoding(model), list("abcd"), pixel_values=pixels)
    plain = replace(search, live={"logits_processor": []})  # live objects need `generate`
    slow = plain.run(FastDecoding(model), list("abcd"), pixel_values=pixels)
    assert len(fast[0]) == 4 * k
    if dtype == torch.float32:
        ends = slow[0].shape[1]
        assert fast[0][:, :ends].equal(slow[0])
        words = slow[0] != model.config.pad_token_id
        torch.testing.assert_close(fast[1][:, :ends][words], slow[1][words], atol=1e-4, rtol=0)
    else:
        same = fast[0][:, 0] == slow[0][:, 0]  # later words follow these
        assert same.float().mean() > 0.6
        torch.testing.assert_close(fast[1][same, 0], slow[1][same, 0], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 3},
        {"early_stopping": True, "length_penalty": 0.0},
        {"early_stopping": "never", "length_penalty": 2.0, "max_new_tokens": 12},
    ],
)
def test_beams_that_end_are_those_of_generate(embedded, settings):
    pictures = [scene.image for scene in scenes.generate(12, split="test")]
    found, single, slow = (
        embedded.caption(pictures, num_beams=3, **settings, **how)
        for how in ({}, {"batch_size": 1}, {"logits_processor": []})
    )
    found, single, slow = ([*np.ravel(captions)] for captions in (found, single, slow))
    assert [c.token_ids for c in found] == [c.token_ids for c in single]
    assert [c.token_ids for c in found] == [c.token_ids for c in slow]
    assert len({len(c.token_ids) for c in found}) > 1
    for one, other in zip(found, slow, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_settings_beyond_a_choice_go_to_generate(tiny, pixels):
    beyond = {"no_repeat_ngram_size": 2}
    for settings in (beyond, {"num_beams": 2, **beyond}, {"typical_p": 0.5}):
        search = Search.from_settings(tiny, preset="greedy", **settings)
        assert Choice.from_config(search.config) is None
        assert len(search.run(FastDecoding(tiny), list("abcd"), pixel_values=pixels)[0]) == 4


def test_fast_decoding_follows_weights_that_change(tiny, pixels):
    model = copy.deepcopy(tiny)
    decoding, plain = FastDecoding(model), {"do_sample": False}
    layers = [block.attn.attention for block in model.decoder.language_model.h]
    parts = [[layer.q_proj, layer.k_proj, layer.v_proj] for layer in layers]
    joined = [join(part) for part in parts]
    for linear, part in zip(joined, parts, strict=True):  # views of it are found
        assert join(part).weight.data_ptr() == linear.weight.data_ptr()
    torch.manual_seed(0)
    first = run(decoding, plain, 12, pixels)
    assert first.equal(run(FastDecoding(tiny), plain, 12, pixels))
    with_noise(model)
    for linear, part in zip(joined, parts, strict=True):
        assert linear.weight.equal(torch.cat([layer.weight for layer in part]))
    changed = run(decoding, plain, 12, pixels)
    assert not changed.equal(first)
    assert changed.equal(run(FastDecoding(copy.deepcopy(model)), plain, 12, pixels))
    model.to(torch.bfloat16)  # elsewhere in memory
    assert run(decoding, plain, 12, pixels).shape == first.shape


def test_hooks_prevent_fast_decoding(tiny, pixels):
    model = copy.deepcopy(tiny)
    decoding = FastDecoding(model)
    assert decoding.can_run()
    model.vision.tower(pixels, output_attentions=True)  # leaves hooks of transformers behind
    assert decoding.can_run()
    with mute(model, bridge=True):
        assert not decoding.can_run()
    assert decoding.can_run()


def test_int8_weights_are_within_half_a_step():
    linear = torch.nn.Linear(24, 16)
    rounded = Int8Linear(linear)
    x = torch.randn(5, 24)
    step = linear.weight.abs().amax(dim=1) / 127
    assert (rounded(x) - linear(x)).abs().le(x.abs().sum(1, keepdim=True) * step / 2 + 1e-5).all()
    assert rounded.weight.dtype == torch.int8
