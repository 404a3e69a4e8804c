"""Freezing: which parameters a run trains. A policy is data; applying one sets `requires_grad`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from qvision_lab.model.captioner import QVisionForConditionalGeneration

PARTS = {  # of the model, and of the report
    "CLIP vision tower": "vision.tower",
    "image projection": "vision.projection",
    "Q-Former": "qformer",
    "bridge": "decoder.bridge",
    "GPT-Neo": "decoder.language_model",
}


@dataclass(frozen=True)
class Policy:
    """What a run trains.

    Args:
        modules: trained whole, by their names in the model.
        freeze_ratio: share of GPT-Neo's blocks, from the first, that stay as they are; the blocks
            above them, the final norm and the token embedding (tied to the output layer) are
            trained. None leaves all of GPT-Neo as it is.
    """

    modules: tuple[str, ...] = ("qformer", "decoder.bridge")
    freeze_ratio: float | None = None


POLICIES = {
    # In the first three the image projection stays as it is, in the original random.
    "published": Policy(freeze_ratio=0.4),
    "phase1": Policy(freeze_ratio=0.7),
    "phase2": Policy(freeze_ratio=0.5),
    "qformer": Policy(("vision.projection", "qformer", "decoder.bridge")),
    "bridge": Policy(("decoder.bridge",)),
    "everything": Policy(("vision", "qformer", "decoder")),
}


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model."""

    part: str
    total: int
    trained: int


@dataclass(frozen=True)
class FreezingReport:
    """What is trained of each part; printed as a table like the published card's."""

    parts: tuple[PartCount, ...]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    def __str__(self) -> str:
        rows = (*self.parts, PartCount("all", self.total, self.trained))
        lines = [f"{row.part:<20}{row.total:>14,}{row.trained:>14,}" for row in rows]
        return "\n".join([f"{'parameters':<20}{'total':>14}{'trained':>14}", *lines])


def find_policy(policy: str | float | Policy) -> Policy:
    """A policy by its name in `POLICIES`, or by its freeze ratio, 0 to 1.

    Raises:
        ValueError: there is none of this name, or the ratio is out of range.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            near = get_close_matches(policy, POLICIES, n=1, cutoff=0)[0]
            raise ValueError(
                f"no freezing policy {policy!r}; did you mean {near!r}? There are "
                f"{', '.join(POLICIES)}, and any share of GPT-Neo's blocks to freeze, 0 to 1."
            )
        return POLICIES[policy]
    policy = policy if isinstance(policy, Policy) else Policy(freeze_ratio=policy)
    if policy.freeze_ratio is not None and not 0 <= policy.freeze_ratio <= 1:
        raise ValueError(f"freeze_ratio={policy.freeze_ratio} is no share of blocks, 0 to 1.")
    return policy


def apply(
    model: QVisionForConditionalGeneration,
    policy: str | float | Policy,
    *,
    thaw_projection: bool = False,
) -> FreezingReport:
    """Train what the policy names and nothing else.

    Args:
        policy: a name in `POLICIES`, a freeze ratio (0 to 1) for Q-Former, bridge and the upper
            part of GPT-Neo, or a policy of your own.
        thaw_projection: train the image projection too, which the original left random.
    """
    policy = find_policy(policy)
    if thaw_projection:
        policy = replace(policy, modules=("vision.projection", *policy.modules))
    trained = [model.get_submodule(name) for name in policy.modules]
    if policy.freeze_ratio is not None:
        text = model.decoder.language_model
        trained += [*text.h[int(policy.freeze_ratio * len(text.h)) :], text.ln_f, text.wte]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    model.vision.tower.post_layernorm.requires_grad_(False)  # behind the states that are read
    counts = []
    for part, name in PARTS.items():
        weights = list(model.get_submodule(name).parameters())
        learned = sum(weight.numel() for weight in weights if weight.requires_grad)
        counts.append(PartCount(part, sum(weight.numel() for weight in weights), learned))
    return FreezingReport(tuple(counts))
