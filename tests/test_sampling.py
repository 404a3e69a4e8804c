"""Sampling: draws that depend on seed, picture and step alone, and are as good as random."""

import pytest
import torch
from scipy.stats import chisquare

from qvision_lab.captioning.sampling import Sampling, random_integers, row_keys


def test_random_integers_are_pinned():
    """Other integers would be other captions for the same seed."""
    keys, words = torch.tensor([[123456789, 987654321]]), torch.tensor([[0, 42, 486]])
    drawn = random_integers(keys, 7, words)
    assert drawn.tolist() == [[3577255200, 1234774473, 3948065074]]
    assert row_keys(["0/1/0"]).tolist() == [[1394329957, 2949134412]]
    assert random_integers(keys, torch.tensor([7]), words).equal(drawn)


def test_random_integers_depend_on_key_step_and_word_alone():
    keys, words = row_keys([str(i) for i in range(50)]), torch.arange(300)[None]
    together = random_integers(keys, 3, words)
    assert together.shape == (50, 300)
    assert random_integers(keys[17:18], 3, words).equal(together[17:18])
    assert random_integers(keys.flip(0), 3, words.flip(1)).equal(together.flip(0, 1))
    some = torch.tensor([[5, 250], [250, 5]])  # as behind top_k: others in each row
    assert random_integers(keys[:2], 3, some).equal(together[:2].gather(1, some))


def p_value(cells: torch.Tensor) -> float:
    """Of all 256 being equally likely."""
    return chisquare(cells.flatten().bincount(minlength=256).numpy()).pvalue


HASHED = row_keys([f"0/{i}/0" for i in range(1000)])
COUNTED = torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.long)], dim=1)
WORDS = torch.arange(1000)[None]


@pytest.mark.parametrize("keys", [HASHED, COUNTED, COUNTED.flip(1)], ids=["hashed", "0", "1"])
def test_random_integers_are_uniform_and_neighbours_independent(keys):
    drawn = random_integers(keys, 3, WORDS)  # a million
    assert 0 <= drawn.min() < drawn.max() < 2**32
    neighbours = {
        "step": random_integers(keys, 4, WORDS),
        "word": random_integers(keys, 3, WORDS + 1),
        "first key": random_integers(keys + torch.tensor([1, 0]), 3, WORDS),
        "second key": random_integers(keys + torch.tensor([0, 1]), 3, WORDS),
        "seed": random_integers(row_keys([f"1/{i}/0" for i in range(1000)]), 3, WORDS),
    }
    for shift in (24, 16, 9, 0):  # of 32 bits the noise takes the upper 23
        assert p_value(drawn >> shift & 255) > 1e-4, shift
    for name, others in neighbours.items():
        for shift in (28, 18, 9):
            pairs = (drawn >> shift & 15) * 16 + (others >> shift & 15)
            assert p_value(pairs) > 1e-4, (name, shift)


def test_seeded_sampling_draws_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    keys = row_keys([str(i) for i in range(20_000)])
    sampling = Sampling({"temperature": 0.8, "top_k": 3})
    drawn = sampling.words(torch.zeros(len(keys), 1).long(), logits.expand(len(keys), -1), keys, 1)
    shares = drawn.bincount(minlength=5) / len(keys)
    expected = torch.tensor([1.0, 0.0, -torch.inf, 2.0, -torch.inf]).div(0.8).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("setting", "value", "kept"),
    [
        *(
            ("top_k", 2, 2),
            ("top_k", 0, 4),
            ("top_p", 0.7, 2),
            ("min_p", 0.5, 2),
            ("top_h", 0.8, 2),
        ),
        *(("typical_p", 0.6, 2), ("epsilon_cutoff", 0.1, 3), ("eta_cutoff", 0.5, 2)),
        *(("epsilon_cutoff", 0.0, 4), ("typical_p", 1.0, 4)),
    ],
)
def test_seeded_sampling_knows_every_warper(setting, value, kept):
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(300, -1)
    keys = row_keys([str(i) for i in range(300)])
    drawn = Sampling({setting: value}).words(torch.zeros(300, 1).long(), scores, keys, 1)
    assert drawn.unique().tolist() == list(range(kept))
