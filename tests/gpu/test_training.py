"""Training on a GPU: what a CPU cannot show."""

# ruff: noqa: F401, F811 - fixtures that other files have

import copy
import gc
import warnings

import pytest
import torch
import yaml
from conftest import interrupted, undropped
from test_training import check_a_poisoned_loss_stops, home, losses, quick, run
from test_training_gpu import caption_batch, check_gradients

import qvision_lab as ql
from qvision_lab.benchmark.training import Learner, random_batch
from qvision_lab.data.coco import open_dataset
from qvision_lab.model.captioner import IGNORED_LABEL
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import freezing, gpu
from qvision_lab.training.features import FeatureCache
from qvision_lab.training.memory import estimate_memory
from qvision_lab.training.optimizers import MuonAdamW
from qvision_lab.training.recipe import Optimisation, Phase, Training
from qvision_lab.training.trainer import StageTrainer, training_arguments

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("error:CUDA captured no"),
]


def recipe_with(home, **training) -> None:
    recipe = yaml.safe_load((home / "run.yaml").read_text())
    recipe["training"] |= {"precision": "bfloat16", "workers": None, "capture": True} | training
    (home / "run.yaml").write_text(yaml.safe_dump(recipe))


def test_resumed_ends_where_uninterrupted_does(home):
    recipe_with(home, matrix_learning_rate=0.01)
    whole = run(home, "whole")
    with interrupted(4):
        run(home, "stopped")
    resumed = run(home, "stopped")
    assert losses(home / "stopped") == pytest.approx(losses(home / "whole"), abs=1e-3)
    for one, other in zip(
        ql.load(resumed).model.parameters(), ql.load(whole).model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


def test_adamw_is_fused_and_batches_are_pinned(tmp_path):
    settings = Optimisation(learning_rate=1e-3, batch_size=2)
    arguments = training_arguments(settings, tmp_path, 0, 1)
    assert arguments.optim == "adamw_torch_fused"
    assert arguments.dataloader_pin_memory
    assert arguments.accelerator_config.non_blocking


def test_frozen_weights_are_saved_as_they_were_in_float32(home, monkeypatch):
    recipe_with(home, phases=[{"policy": 0.5, "epochs": 2}])
    step, held = StageTrainer.training_step, []
    monkeypatch.setattr(
        StageTrainer,
        "training_step",
        lambda self, *args: held.append(self.frozen[0].dtype) or step(self, *args),
    )
    tuned, base = ql.load(run(home, "run")).model, ql.load(home / "base").model
    assert set(held) == {torch.bfloat16}
    assert {weight.dtype for weight in tuned.parameters()} == {torch.float32}
    freezing.apply(base, 0.5)
    frozen = [name for name, weight in base.named_parameters() if not weight.requires_grad]
    assert len(frozen) > 20
    for name in frozen:
        assert torch.equal(base.get_parameter(name), tuned.get_parameter(name)), name


def test_losses_are_those_of_a_cpu(tiny):
    """In float32 with products in TF32, the first steps of AdamW."""
    found = []
    for device in ("cpu", "cuda"):
        model = undropped(tiny).to(device)
        freezing.apply(model, "published")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        torch.manual_seed(0)
        batches = [random_batch("ours", model.config) for _ in range(4)]
        losses = []
        for batch in batches:
            with gpu.tf32_products():
                loss = model(**{name: values.to(device) for name, values in batch.items()}).loss
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_captured_loss_is_the_models_with_its_gradients(tiny):
    """In float32, of two shapes in turn, before and after a step of the optimizer."""
    torch.set_float32_matmul_precision("highest")
    model, plain = undropped(tiny).cuda(), undropped(tiny).cuda()
    for each in (model, plain):
        freezing.apply(each, "published")
    captured = gpu.CapturedLoss(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-2) for each in (model, plain)]
    for turn, longest in enumerate((11, 7, 11, 11)):
        batch = {name: x.cuda() for name, x in caption_batch(tiny, turn, longest).items()}
        count = torch.tensor(30, device="cuda") if turn % 2 else None
        losses = (
            captured(**batch, num_items_in_batch=count),
            plain(**batch, num_items_in_batch=count).loss,
        )
        gradients = []
        for each, loss, optimizer in zip((model, plain), losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            gradients.append({name: p.grad for name, p in each.named_parameters()})
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
        check_gradients(*gradients)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():  # the same again, to the bit
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                one.copy_(other)
    assert len(captured.graphs) == 2


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(home, monkeypatch):
    recipe_with(home, phases=[{"policy": "bridge", "epochs": 2}])
    check_a_poisoned_loss_stops(home, monkeypatch)


def test_compiled_steps_learn_what_plain_ones_do():
    """Of the embedded checkpoint, which has no dropout, with frozen matrices in bfloat16."""
    found = []
    for compiled, captured in ((False, False), (True, False), (True, True)):
        model = copy.deepcopy(ql.load().model).cuda().train()
        freezing.apply(model, "published")
        torch.manual_seed(0)
        batches = [random_batch("ours", model.config, 8, packed=True) for _ in range(3)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        frozen, graphs, losses = gpu.frozen_matrices(model), gpu.CapturedLoss(model), []
        with gpu.holding(frozen, [weight.data.bfloat16() for weight in frozen]):
            context = gpu.compiled_blocks(model) if compiled else warnings.catch_warnings()
            with context:
                for batch in batches:
                    batch = {name: values.cuda() for name, values in batch.items()}
                    with torch.autocast("cuda", torch.bfloat16):
                        loss = graphs(**batch) if captured else model(**batch).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=0.01)
    assert found[2] == pytest.approx(found[0], rel=0.01)


def test_batched_matrices_are_orthogonalised_as_torch_does(tiny):
    models = [copy.deepcopy(tiny).cuda()]
    models.append(copy.deepcopy(models[0]))
    first = MuonAdamW(models[0], 1e-3, 0.02, 0.03).muon
    second = MuonAdamW(models[1], 1e-3, 0.02, 0.03).muon
    for step in range(3):
        for optimizer, method in ((first, torch.optim.Muon.step), (second, type(second).step)):
            torch.manual_seed(step)
            for weight in optimizer.param_groups[0]["params"]:
                weight.grad = torch.randn_like(weight)
            method(optimizer)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


def test_features_are_those_of_a_cpu(home, tiny, byte_tokenizer):
    images = open_dataset(home / "pictures/val.jsonl")
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    expected = FeatureCache(home / "cpu", tiny, "float32").encode(images, tiny, processor)
    model = copy.deepcopy(tiny).cuda()
    there = FeatureCache(home / "gpu", model, "float32").encode(images, model, processor, workers=2)
    for image in images:
        torch.testing.assert_close(
            there.view(image.image_id), expected.view(image.image_id), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("precision", "pictures"),
    [("float32", 8), ("float32", 64), ("bfloat16", 8), ("bfloat16", 64)],
)
def test_memory_is_as_estimated(precision, pictures):
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs a GPU with 30 GB")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        learner = Learner("ours", ql.QVisionForConditionalGeneration(QVisionConfig()))
    learner.captured = None  # graphs keep the memory of every length
    batch = random_batch("ours", learner.model.config, pictures)
    lengths = ((batch["labels"] != IGNORED_LABEL).sum(1) + 1).tolist()
    batch = {name: values.cuda() for name, values in batch.items()}
    for _ in range(2):
        learner.step(batch, precision)
    torch.cuda.reset_peak_memory_stats()
    learner.step(batch, precision)
    peak = torch.cuda.max_memory_allocated() - before
    settings = Training(
        phases=(Phase(policy="published", epochs=1),), learning_rate=1e-4, precision=precision
    )
    estimate = estimate_memory(learner.model, settings, pictures, lengths)
    assert estimate.peak == pytest.approx(peak, rel=0.25)
