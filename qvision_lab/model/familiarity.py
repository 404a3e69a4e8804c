"""Whether an image is like those that a checkpoint learned from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.special import bdtrc
from torch import Tensor

COMPONENTS = 64
MISSED = 0.01  # share of familiar images beyond the limit


@dataclass(frozen=True)
class Familiarity:
    """Principal components of mean vision states, and the distance from them that 1% exceed.

    The distance is what the components leave of a state, as in Wang et al. 2022 (ViM,
    arXiv:2203.10807).
    """

    mean: Float[Tensor, " C"]
    components: Float[Tensor, "K C"]
    limit: Float[Tensor, ""]

    @classmethod
    def fit(cls, learned: Float[Tensor, "N C"], held_out: Float[Tensor, "M C"]) -> Familiarity:
        """From mean states: the components of images learned from, the limit of others."""
        mean = learned.mean(0)
        *_, components = torch.linalg.svd(learned - mean, full_matrices=False)
        components = components[: min(COMPONENTS, len(components) // 2)].contiguous()
        fitted = cls(mean, components, torch.tensor(0.0))
        return cls(mean, components, fitted.distances(held_out).quantile(1 - MISSED))

    def distances(self, means: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
        """Distances of mean states from the components."""
        centred = means.float().cpu() - self.mean
        return (centred - centred @ self.components.T @ self.components).norm(dim=1)

    def holds(self, means: Float[Tensor, "B C"]) -> Bool[Tensor, " B"]:
        """Whether images are within the limit."""
        return self.distances(means) <= self.limit


def exceeds_chance(unfamiliar: int, images: int) -> bool:
    """Whether fewer than one in ten sets of familiar images would have so many beyond the limit."""
    return bdtrc(unfamiliar - 1, images, MISSED) < 0.1  # the binomial tail
