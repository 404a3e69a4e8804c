"""Whether an image is like those that a checkpoint learned from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHRINKAGE = 0.01  # of the covariance towards its diagonal
MISSED = 0.01  # share of familiar images beyond the limit


@dataclass(frozen=True)
class Familiarity:
    """A normal distribution of mean image tokens, and the distance that 1% of images exceed.

    Mahalanobis distance as a measure of novelty: Lee et al. 2018, arXiv:1807.03888.
    """

    mean: Float[Tensor, " D"]
    whitening: Float[Tensor, "D D"]
    limit: Float[Tensor, ""]

    @classmethod
    def fit(cls, learned: Float[Tensor, "N D"], held_out: Float[Tensor, "M D"]) -> Familiarity:
        """From mean image tokens: the distribution of those learned from, the limit of others."""
        learned, held_out = learned.double(), held_out.double()
        covariance = learned.T.cov()
        covariance += SHRINKAGE * covariance.diag().diag()
        whitening = torch.linalg.cholesky(covariance.inverse()).T  # its square is the inverse
        fitted = cls(learned.mean(0).float(), whitening.float(), torch.tensor(0.0))
        limit = fitted.distances(held_out.float()).quantile(1 - MISSED)
        return cls(fitted.mean, fitted.whitening, limit)

    def distances(self, means: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Mahalanobis distances of mean image tokens from those learned from."""
        return ((means.float().cpu() - self.mean) @ self.whitening.T).norm(dim=1)

    def holds(self, means: Float[Tensor, "B D"]) -> Bool[Tensor, " B"]:
        """Whether images are within the limit."""
        return self.distances(means) <= self.limit
