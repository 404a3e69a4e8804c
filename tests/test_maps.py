"""Maps of words and queries against the model itself, and against the axioms of each method."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import qvision_lab as ql
from qvision_lab.interpretation.maps import METHODS, composition, rolled_out, shared_methods
from qvision_lab.interpretation.trace import Trace, trace

RUN_THE_MODEL = ("gradient", "occlusion", "integrated_gradients")


@pytest.fixture
def traced(byte_captioner, noise) -> Trace:
    return trace(byte_captioner, noise[0], "a red dog")


def values(traced: Trace, method: str) -> np.ndarray:
    return np.stack([m.values.ravel() for m in ql.word_maps(traced, method)])  # [W,P]


def words_logprobs(
    captioner: ql.Captioner, traced: Trace, image_tokens: torch.Tensor
) -> np.ndarray:
    """By the whole model."""
    ids = captioner.processor(text=traced.caption)["input_ids"]
    with torch.no_grad():
        logits = captioner.model(ids, image_tokens=image_tokens[None]).logits[0, :-1]
    by_token = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return np.array([by_token[list(word.tokens)].sum() for word in traced.words])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_map_for_each_word(traced, method):
    maps = ql.word_maps(traced, method)
    assert [(m.label, m.method) for m in maps] == [(word, method) for word in ("a", "red", "dog")]
    assert all(m.values.shape == (2, 2) and np.ptp(m.values) > 0 for m in maps)
    second = ql.word_maps(traced, method, traced.words[1:2])
    np.testing.assert_allclose(second[0].values, maps[1].values, atol=1e-4)
    assert maps[0].values[maps[0].peak] == maps[0].values.max()


def test_shared_methods_are_the_same(traced):
    for words in (traced.words, traced.words[1:]):
        for name, method in shared_methods().items():
            np.testing.assert_array_equal(method(traced, words), METHODS[name](traced, words))


def test_composition_is_bridge_times_cross_attention_where_the_word_is_predicted(traced):
    assert traced.words[1].tokens == (3, 4, 5)  # of " a red dog ", letter by letter
    bridge = traced.bridge_attentions.mean(0)[[3, 4, 5]].mean(0)  # [N]
    by_block = [bridge @ cross.mean(0) for cross in traced.qformer_cross_attentions]
    for block in (0, 1):
        found = composition(traced, traced.words, block)[1]
        np.testing.assert_allclose(found, by_block[block], rtol=1e-5)
    np.testing.assert_allclose(values(traced, "composition")[1], np.mean(by_block, 0), rtol=1e-5)


def test_attention_maps_are_shares(traced):
    np.testing.assert_allclose(rolled_out(traced).sum(1), 1, atol=1e-5)
    for method in ("composition", "rollout"):
        np.testing.assert_allclose(values(traced, method).sum(1), 1, atol=1e-5)
    for block, head in ((None, None), (0, None), (None, 3), (1, 7)):
        maps = ql.query_maps(traced, block, head)
        assert [m.label for m in maps[:2]] == ["global token", "query 0"]
        np.testing.assert_allclose([m.values.sum() for m in maps], 1, atol=1e-5)


def test_rollout_of_one_block_is_half_image_and_half_query(traced):
    one, own = traced.qformer_cross_attentions[:1], np.eye(5)[None, None]
    one = replace(traced, qformer_self_attentions=own, qformer_cross_attentions=one)
    half = 0.5 * traced.qformer_cross_attentions[0].mean(0)
    np.testing.assert_allclose(rolled_out(one), np.hstack([0.5 * np.eye(5), half]), atol=1e-6)


def test_occlusion_is_what_the_model_loses_with_a_patch(byte_captioner, traced):
    tokens = torch.from_numpy(traced.image_tokens)
    whole = words_logprobs(byte_captioner, traced, tokens)
    without = [torch.cat([tokens[:i], tokens[i + 1 :]]) for i in range(4)]
    losses = [whole - words_logprobs(byte_captioner, traced, others) for others in without]
    np.testing.assert_allclose(values(traced, "occlusion"), np.transpose(losses), atol=1e-4)


def test_integrated_gradients_are_complete(byte_captioner, traced):
    tokens = torch.from_numpy(traced.image_tokens)
    whole, blank = (words_logprobs(byte_captioner, traced, x) for x in (tokens, 0 * tokens))
    assert np.abs(whole - blank).min() > 0.01
    found = values(traced, "integrated_gradients").sum(1)
    np.testing.assert_allclose(found, whole - blank, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("method", RUN_THE_MODEL)
def test_maps_move_with_the_patches(traced, method):
    """The Q-Former knows no positions, so shuffled image tokens give the shuffled map."""
    order = [2, 0, 3, 1]
    shuffled = replace(traced, image_tokens=traced.image_tokens[order])
    expected = values(traced, method)[:, order]
    np.testing.assert_allclose(values(shuffled, method), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", RUN_THE_MODEL)
def test_a_model_that_ignores_the_image_has_empty_maps(byte_captioner, noise, method):
    model = copy.deepcopy(byte_captioner.model)
    torch.nn.init.zeros_(model.decoder.bridge.scale)
    blind = trace(replace(byte_captioner, model=model), noise[0], "a red dog")
    np.testing.assert_allclose(values(blind, method), 0, atol=1e-5)


def test_gradients_need_no_trainable_weights_and_leave_none_behind(byte_captioner, noise, traced):
    assert (values(traced, "gradient") >= 0).all()
    model = copy.deepcopy(byte_captioner.model).requires_grad_(False)
    frozen = replace(byte_captioner, model=model)
    with torch.no_grad():
        for method in ("gradient", "integrated_gradients"):
            found = values(trace(frozen, noise[0], "a red dog"), method)
            np.testing.assert_allclose(found, values(traced, method), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in frozen.model.parameters())
    assert not any(m._forward_pre_hooks for m in byte_captioner.model.modules())


def test_what_does_not_exist_is_named(traced):
    with pytest.raises(ValueError, match=r"no method 'grad'.*rollout"):
        ql.word_maps(traced, "grad")
    with pytest.raises(ValueError, match="no block 2; choose one of 0 to 1"):
        composition(traced, traced.words, block=2)
    with pytest.raises(ValueError, match="no head 8; choose one of 0 to 7"):
        ql.query_maps(traced, head=8)
