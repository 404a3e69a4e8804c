"""Freezing: which parameters a run trains. A policy is data; applying one sets `requires_grad`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

import pandas as pd

from qvision_lab.model.captioner import QVisionForConditionalGeneration

PARTS = {  # of the model, in the counts
    "vision tower": "vision.tower",
    "image projection": "vision.projection",
    "Q-Former": "qformer",
    "bridge": "decoder.bridge",
    "GPT-Neo": "decoder.language_model",
}


@dataclass(frozen=True)
class Policy:
    """What a run trains: some modules completely, and the upper part of GPT-Neo."""

    modules: tuple[str, ...] = ("qformer", "decoder.bridge")
    # Share of GPT-Neo's blocks, from the first, that stay frozen; those above, the final norm and
    # the token embedding (tied to the output layer) are trained. None freezes all of GPT-Neo.
    freeze_ratio: float | None = None


POLICIES = {
    # In the first three the image projection stays frozen, in the original with random weights.
    "published": Policy(freeze_ratio=0.4),
    "phase1": Policy(freeze_ratio=0.7),
    "phase2": Policy(freeze_ratio=0.5),
    "qformer": Policy(("vision.projection", "qformer", "decoder.bridge")),
    "bridge": Policy(("decoder.bridge",)),
    "captioner": Policy(("vision.projection", "qformer", "decoder")),  # all but the tower
    "everything": Policy(("vision", "qformer", "decoder")),
}


def suggest(name: object, known: Iterable[str]) -> str:
    """The nearest of the known names, as a question, and all of them."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1, cutoff=0)[0]
    return f"did you mean {near!r}? Known are {', '.join(known)}."


def find_policy(policy: str | float | Policy) -> Policy:
    """A policy of your own, by name in `POLICIES`, or by freeze ratio, 0 to 1; else ValueError."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(
                f"no freezing policy {policy!r}; {suggest(policy, POLICIES)} A number, 0 to 1, is "
                "the share of GPT-Neo's blocks to freeze"
            )
        return POLICIES[policy]
    policy = policy if isinstance(policy, Policy) else Policy(freeze_ratio=policy)
    if policy.freeze_ratio is not None and not 0 <= policy.freeze_ratio <= 1:
        raise ValueError(f"freeze_ratio={policy.freeze_ratio} must be a share of blocks, 0 to 1")
    return policy


def apply(
    model: QVisionForConditionalGeneration,
    policy: str | float | Policy,
    *,
    thaw_projection: bool = False,
) -> pd.DataFrame:
    """Train what the policy (see `find_policy`) names and nothing else.

    `thaw_projection` trains the image projection too, which the original left random. Returns
    numbers of parameters: columns `total` and `trained`, one row per part, and the row `all`.
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
    if model.config.vision_config.model_type == "clip_vision_model":
        model.vision.tower.post_layernorm.requires_grad_(False)  # after the states that are read
    model.train(model.training)  # a frozen tower stays in evaluation mode
    table = pd.DataFrame(0, PARTS, ["total", "trained"])
    for part, name in PARTS.items():
        for weight in model.get_submodule(name).parameters():
            table.loc[part] += [weight.numel(), weight.numel() * weight.requires_grad]
    table.loc["all"] = table.sum()
    return table
