"""Batch-invariant sampling: draws depend on key, step and token alone, and are uniform."""

import pytest
import torch
from scipy.stats import chisquare

from qvision_lab.captioning.sampling import Choice, random_integers, row_keys


def test_random_integers_are_pinned():
    """Other integers would be other captions for the same seed."""
    keys, tokens = torch.tensor([[123456789, 987654321]]), torch.tensor([[0, 42, 486]])
    drawn = random_integers(keys, 7, tokens)
    assert drawn.tolist() == [[3577255200, 1234774473, 3948065074]]
    assert row_keys(["0/1/0"]).tolist() == [[1394329957, 2949134412]]
    assert random_integers(keys, torch.tensor([7]), tokens).equal(drawn)


def test_random_integers_depend_on_key_step_and_token_alone():
    keys, tokens = row_keys([str(i) for i in range(50)]), torch.arange(300)[None]
    together = random_integers(keys, 3, tokens)
    assert together.shape == (50, 300)
    assert random_integers(keys[17:18], 3, tokens).equal(together[17:18])
    assert random_integers(keys.flip(0), 3, tokens.flip(1)).equal(together.flip(0, 1))
    some = torch.tensor([[5, 250], [250, 5]])  # as behind top_k: others in each row
    assert random_integers(keys[:2], 3, some).equal(together[:2].gather(1, some))


def p_value(cells: torch.Tensor) -> float:
    """Of the hypothesis that all 256 cells are equally likely."""
    return chisquare(cells.flatten().bincount(minlength=256).numpy()).pvalue


HASHED = row_keys([f"0/{i}/0" for i in range(1000)])
COUNTED = torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.long)], dim=1)
TOKENS = torch.arange(1000)[None]


@pytest.mark.parametrize("keys", [HASHED, COUNTED, COUNTED.flip(1)], ids=["hashed", "0", "1"])
def test_random_integers_are_uniform_and_neighbours_independent(keys):
    drawn = random_integers(keys, 3, TOKENS)  # a million
    assert 0 <= drawn.min() < drawn.max() < 2**32
    neighbours = {
        "step": random_integers(keys, 4, TOKENS),
        "token": random_integers(keys, 3, TOKENS + 1),
        "first key": random_integers(keys + torch.tensor([1, 0]), 3, TOKENS),
        "second key": random_integers(keys + torch.tensor([0, 1]), 3, TOKENS),
        "seed": random_integers(row_keys([f"1/{i}/0" for i in range(1000)]), 3, TOKENS),
    }
    for shift in (24, 16, 9, 0):  # of 32 bits the noise takes the upper 23
        assert p_value(drawn >> shift & 255) > 1e-4, shift
    for name, others in neighbours.items():
        for shift in (28, 18, 9):
            pairs = (drawn >> shift & 15) * 16 + (others >> shift & 15)
            assert p_value(pairs) > 1e-4, (name, shift)


def test_sampling_draws_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    keys = row_keys([str(i) for i in range(20_000)])
    choice, ids = Choice(sampling=(("temperature", 0.8), ("top_k", 3))), torch.zeros(20_000, 1)
    drawn = choice.next_tokens(logits.expand(len(keys), -1), ids.long(), 1, 4, keys)
    shares = drawn.bincount(minlength=5) / len(keys)
    expected = torch.tensor([1.0, 0.0, -torch.inf, 2.0, -torch.inf]).div(0.8).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("setting", "value", "kept"),
    [
        *(("top_k", 2, 2), ("top_k", 0, 4), ("top_p", 0.7, 2), ("min_p", 0.5, 2)),
        *(("top_h", 0.8, 2), ("typical_p", 0.6, 2), ("typical_p", 1.0, 4)),
        *(("epsilon_cutoff", 0.1, 3), ("epsilon_cutoff", 0.0, 4), ("eta_cutoff", 0.5, 2)),
    ],
)
def test_sampling_applies_every_warper(setting, value, kept):
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(300, -1)
    keys = row_keys([str(i) for i in range(300)])
    ids, choice = torch.zeros(300, 1).long(), Choice(sampling=((setting, value),))
    drawn = choice.next_tokens(scores, ids, 1, 4, keys)
    assert drawn.unique().tolist() == list(range(kept))
