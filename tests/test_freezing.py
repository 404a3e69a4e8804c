"""What is trained: the original's tensors, the card's numbers."""

import copy

import pytest
import torch

import qvision_lab as ql
from qvision_lab.model.loading.published import stored_name
from qvision_lab.training import freezing
from qvision_lab.training.freezing import POLICIES, Policy

QUERY_PROJ = 1024 * 1024 + 1024  # a layer that the card counts and nothing uses


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def model(tiny) -> ql.QVisionForConditionalGeneration:
    return copy.deepcopy(tiny)


@pytest.mark.parametrize("policy", ["published", "phase1", "phase2"])
def test_trained_tensors_are_the_originals(reference, policy):
    model, _, facts = reference
    freezing.apply(model, policy)
    ours = {stored_name(name) for name in trained(model)}
    model.requires_grad_(True)
    theirs = facts["trainable"][str(POLICIES[policy].freeze_ratio)]
    assert ours == {name for name in theirs if not name.startswith("query_proj")}


@pytest.mark.parametrize(
    ("policy", "gpt_neo"),
    [("published", 240_364_544), ("phase1", 152_212_480), ("phase2", 202_585_088)],
)
def test_counts_at_full_size_are_the_cards(policy, gpt_neo):
    with torch.device("meta"):
        model = ql.QVisionForConditionalGeneration(ql.QVisionConfig())
    report = freezing.apply(model, policy)
    counted = report["trained"]
    assert counted["GPT-Neo"] == gpt_neo
    assert counted["Q-Former"] + counted["bridge"] + QUERY_PROJ == 66_196_481
    assert counted["vision tower"] == counted["image projection"] == 0
    assert report.loc["all", "total"] == 509_190_401
    if policy == "published":
        assert counted["all"] == 305_511_425 == 306_561_025 - QUERY_PROJ


def test_policies_train_what_they_name(model):
    frozen_tower = set(dict(model.vision.tower.named_parameters(prefix="vision.tower")))
    freezing.apply(model, "bridge")
    assert all(name.startswith("decoder.bridge.") for name in trained(model))
    freezing.apply(model, "qformer")
    assert {"vision.projection.weight", "decoder.bridge.scale"} <= trained(model).keys()
    assert not any("language_model" in name or name in frozen_tower for name in trained(model))
    everything = freezing.apply(model, "everything").loc["all"]
    unread = sum(p.numel() for p in model.vision.tower.post_layernorm.parameters())
    assert everything.trained == everything.total - unread
    freezing.apply(model, 1.0)
    assert not any(".h." in name for name in trained(model))
    projection = {"vision.projection.weight", "vision.projection.bias"}
    freezing.apply(model, Policy(("vision.projection",)))
    assert set(trained(model)) == projection
    freezing.apply(model, "published")
    before = set(trained(model))
    freezing.apply(model, "published", thaw_projection=True)
    assert set(trained(model)) - before == projection


def test_everything_that_is_trained_gets_a_gradient(model):
    """Else data-parallel training waits for it in vain."""
    for policy in (*POLICIES, 0.0):
        freezing.apply(model, policy, thaw_projection=True)
        model.zero_grad()
        ids = torch.tensor([[257, 3, 4, 258]])
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids).loss.backward()
        assert not [name for name, p in trained(model).items() if p.grad is None]
