"""Profiles of queries against copies of a query, and against models where a path is exact."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from qvision_lab.interpretation.interventions import sweep
from qvision_lab.interpretation.queries import (
    compare_raised_and_fallen,
    direct_contributions,
    profile_queries,
)
from qvision_lab.interpretation.trace import trace, trace_all

CAPTIONS = ["a red dog", "a car.", "red"]


@pytest.fixture
def images(noise):
    return [noise[0], noise[0].rotate(90), Image.new("RGB", (9, 9), "red")]


def test_profiles_find_redundant_queries(byte_captioner, images):
    """A query that is a copy of another is in its cluster."""
    model = copy.deepcopy(byte_captioner.model)
    with torch.no_grad():
        model.qformer.query_tokens[0, 2] = model.qformer.query_tokens[0, 1]
    profiles = profile_queries(trace_all(replace(byte_captioner, model=model), images, CAPTIONS))
    assert [p.label for p in profiles] == ["global token", *(f"query {i}" for i in range(4))]
    assert profiles[2].cluster == profiles[3].cluster
    assert sum(p.attention for p in profiles) == pytest.approx(1, abs=1e-5)
    for profile in profiles:
        assert profile.map.values.sum() == pytest.approx(1, abs=1e-5)
        assert 0 <= profile.spread <= 1
        assert 0 <= profile.entropy <= np.log(4) + 1e-6
        assert set(profile.words) == {"a", "red", "dog", "car"}
        assert set(profile.traces) == {0, 1, 2}
    with pytest.raises(ValueError, match="no trace to profile"):
        profile_queries([])


def test_words_that_fall_are_those_of_the_sweep(byte_captioner, images):
    traces = list(trace_all(byte_captioner, images, CAPTIONS))
    profiles = profile_queries(traces)
    first, last = (-np.stack([e.change for e in sweep(traces[i], "queries")]) for i in (0, 2))
    red = (first[:, 1] + last[:, 0]) / 2  # of each visual token
    np.testing.assert_allclose([p.falls["red"] for p in profiles], red - red.mean(), atol=1e-5)
    dog = direct_contributions(traces[0])[list(traces[0].words[2].tokens)].sum(0)
    np.testing.assert_allclose([p.raises["dog"] for p in profiles], dog - dog.mean(), atol=1e-5)
    read = [t.bridge_attentions[:, list(t.words[0].tokens)].mean((0, 1)) for t in traces[2:]]
    alone = profile_queries(traces[2:])  # one word
    np.testing.assert_allclose([p.attention for p in alone], read[0], rtol=1e-5)


def test_contributions_are_complete_without_the_ffn(byte_captioner, noise):
    model = copy.deepcopy(byte_captioner.model)
    for weight in model.decoder.bridge.ffn.parameters():
        torch.nn.init.zeros_(weight)
    traced, decoder = trace(replace(byte_captioner, model=model), noise[0], "a dog"), model.decoder
    ids = torch.tensor(traced.token_ids)
    with torch.no_grad():
        visual_tokens = traced.to_tensor(traced.visual_tokens)[None]
        states = traced.to_tensor(traced.text_states)
        logits = decoder.lm_head(decoder.bridge(states[None], visual_tokens)[0])[0]
        rest = states + decoder.bridge.scale * decoder.bridge.attention.out_proj.bias
        rest = (rest * decoder.lm_head.weight[ids]).sum(-1)
    expected = logits.gather(1, ids[:, None])[:, 0] - rest
    found = direct_contributions(traced)
    assert np.abs(found).max() > 0.01
    np.testing.assert_allclose(found.sum(1), expected, atol=1e-4)


def test_prediction_is_of_each_query_by_itself(byte_captioner, noise):
    """Words that are raised in the order in which they fall; then those of the next query."""
    plain = profile_queries(trace_all(byte_captioner, noise[:1], ["red"]))[0]
    series = [pd.Series(row) for row in np.random.default_rng(0).normal(size=(8, 30))]
    exact = [replace(plain, raises=row, falls=np.exp(row)) for row in series]
    found = compare_raised_and_fallen(exact)
    assert found.own == pytest.approx(1)
    assert abs(found.other) < 0.2
    assert 0.5 < found.low < found.own - found.other < found.high
    assert found.p_value < 0.02
    pairs = zip(series, [*series[1:], series[0]], strict=True)
    shifted = compare_raised_and_fallen([replace(plain, raises=a, falls=b) for a, b in pairs])
    assert shifted.own < 0.2
    assert shifted.p_value > 0.05
    constant = [replace(plain, raises=0 * row, falls=row) for row in series]
    assert compare_raised_and_fallen(constant).own == 0
    assert "p = " in str(found)
    with pytest.raises(ValueError, match="1 queries cannot be shuffled"):
        compare_raised_and_fallen(exact[:1])
