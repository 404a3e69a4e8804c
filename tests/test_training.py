"""The recipe: the same result resumed, accumulated, or shared by processes.

As a program, this file is one of the processes that share a training run.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from transformers import CLIPVisionModel, TrainerCallback

from qvision_lab import scenes
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training.caption_stage import (
    CaptionCollator,
    CaptionedStates,
    SeenScenes,
    learn_to_tell,
    train_tokenizer,
)
from qvision_lab.training.recipe import load_recipe, run_recipe
from qvision_lab.training.trainer import MuonAdamW, StageTrainer, last_checkpoint, run_stage
from qvision_lab.training.vision_stage import (
    SHOWN,
    PatchEmbedding,
    SeeingModel,
    Sights,
    collate,
    normalise,
    picture_loss,
    sight,
    sight_type,
)

TINY = [
    "model.vision_config.hidden_size=32",
    "model.vision_config.intermediate_size=64",
    "model.vision_config.num_hidden_layers=1",
    "model.vision_config.num_attention_heads=2",
    "model.text_config.hidden_size=32",
    "model.text_config.num_heads=2",
    "model.num_query_tokens=4",
    "model.num_attention_heads=2",
    "tokenizer.pictures=50",
    "tokenizer.vocab_size=320",
    "vision.pictures=[{split: train, n: 12, seed: 1}]",
    "vision.held_out=6",
    "vision.workers=0",
    "vision.steps=8",
    "vision.batch_size=4",
    "captioner.pictures=12",
    "captioner.held_out=6",
    "captioner.workers=0",
    "captioner.steps=8",
    "captioner.batch_size=4",
    "scores={test: 4}",
]


def make_tokenizer():
    return train_tokenizer((caption for s in scenes.generate(40) for caption in s.captions), 320)


def make_config(tokenizer):
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    return QVisionConfig(
        vision_config={**vision, "num_attention_heads": 2, "image_size": 224, "patch_size": 32},
        text_config={**text, "attention_types": [[["global"], 2]]},
        num_query_tokens=4,
        num_attention_heads=2,
        dropout=0.0,
        start_token_id=tokenizer.bos_token_id,
        end_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def captioner_config(tokenizer):
    return make_config(tokenizer)


def run_until_stopped(output, monkeypatch):
    """Run the recipe and interrupt the first stage that starts anew, at its sixth step."""
    train, training_step = StageTrainer.train, StageTrainer.training_step

    def interruptible(trainer, *args, **kwargs):
        if trainer.state.global_step == 5 and trainer.fresh:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    def begin(trainer, resume_from_checkpoint):
        trainer.fresh = resume_from_checkpoint is None
        return train(trainer, resume_from_checkpoint=resume_from_checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(StageTrainer, "training_step", interruptible)
        patched.setattr(StageTrainer, "train", begin)
        run_recipe("scenes", output, TINY)


def test_a_stopped_recipe_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    whole = run_recipe("scenes", tmp_path / "whole", TINY)
    for _ in ("in the vision stage", "in the captioner stage"):
        with pytest.raises(KeyboardInterrupt):
            run_until_stopped(tmp_path / "stopped", monkeypatch)
    resumed = run_recipe("scenes", tmp_path / "stopped", TINY)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert weights[0] == weights[1]
    curve = pd.read_csv(tmp_path / "stopped/captioner/curve.csv")
    assert curve["loss"].notna().sum() == 8
    assert json.loads((resumed / "scores.json").read_text())["test"]["captioner"]["true"]["of"] == 4
    again = run_recipe("scenes", tmp_path / "stopped", TINY)  # a finished run can be run again
    assert (again / "model.safetensors").read_bytes() == weights[0]
    with pytest.raises(ValueError, match="settings of seed"):
        run_recipe("scenes", tmp_path / "whole", [*TINY, "seed=1"])


def test_overrides_change_single_values_and_refuse_unknown_ones():
    recipe = load_recipe("scenes", ["vision.steps=7", "captioner.learning_rate=1e-4"])
    assert recipe["vision"]["steps"] == 7
    assert recipe["captioner"]["learning_rate"] == 1e-4
    for bad in ("vision.stepz=7", "nothing.steps=7", "vision.steps", "seed.steps=7"):
        with pytest.raises(ValueError, match="cannot set"):
            load_recipe("scenes", [bad])
    with pytest.raises(ValueError, match=r"one of .*scenes"):
        load_recipe("nonsense")


def test_accumulation_changes_neither_loss_nor_gradients(tmp_path, captioner_config, tokenizer):
    states = np.random.default_rng(0).normal(size=(8, 49, 32)).astype(np.float16)
    processor = QVisionProcessor.from_config(captioner_config, tokenizer)
    captioned = CaptionedStates(SeenScenes("train", 0, states), processor, captions_per_visit=2)
    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 0.01, "weight_decay": 0.0}
    stage = {**rates, "steps": 1, "warmup_steps": 0, "bf16": False}

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            trained = (p.grad for p in model.parameters() if p.grad is not None)
            self.gradients = torch.cat([gradient.flatten().clone() for gradient in trained])

    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = QVisionForConditionalGeneration(captioner_config)
        folder = tmp_path / str(accumulation)
        kept = KeepGradients()
        trainer = run_stage(
            model,
            {**stage, "batch_size": batch_size, "accumulation": accumulation},
            0,
            folder,
            measure=lambda model: {},
            data_collator=CaptionCollator(captioner_config.pad_token_id),
            dataset=captioned,
            callbacks=[kept],
        )
        loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
        results.append((loss, kept.gradients))
    (loss, gradients), (accumulated_loss, accumulated_gradients) = results
    assert loss == pytest.approx(accumulated_loss, abs=1e-5)
    torch.testing.assert_close(gradients, accumulated_gradients, atol=1e-6, rtol=1e-4)


def learn_to_tell_briefly(folder: Path) -> list[float]:
    """The losses of four steps of stage two, on eight pictures each, by all processes together."""
    PartialState(cpu=True)  # joins the other process, where there is one
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    torch.manual_seed(0)
    tower = CLIPVisionModel(config.vision_config).eval()
    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 0.002, "weight_decay": 0.0}
    sizes = {"pictures": 24, "held_out": 4, "captions_per_visit": 2, "batch_size": 8, "steps": 4}
    stage = {**rates, **sizes, "warmup_steps": 1, "workers": 0, "bf16": False, "measurements": 1}
    learn_to_tell(tower, config, tokenizer, stage, 0, folder)
    return pd.read_csv(folder / "curve.csv")["loss"].dropna().tolist()


def test_two_processes_learn_what_one_does(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, __file__, tmp_path / "two"], check=True)
    shared = pd.read_csv(tmp_path / "two" / "curve.csv")["loss"].dropna().tolist()
    assert shared == pytest.approx(learn_to_tell_briefly(tmp_path / "one"), abs=1e-4)
    assert len(set(shared)) == 4


def test_optimizer_gives_matrices_to_muon_and_survives_saving(captioner_config):
    model = QVisionForConditionalGeneration(captioner_config)
    optimizer = MuonAdamW(model, 1e-3, 0.02, 0.0)
    matrices = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    assert id(model.qformer.key_proj.weight) in matrices
    assert id(model.decoder.language_model.wte.weight) not in matrices
    assert id(model.vision.tower.embeddings.patch_embedding.weight) not in matrices
    model(
        input_ids=torch.tensor([[1, 5, 6]]),
        image_tokens=torch.ones(1, 49, 32),
        labels=torch.tensor([[1, 5, 6]]),
    ).loss.backward()
    optimizer.step()
    copy = MuonAdamW(model, 1e-3, 0.02, 0.0)
    copy.load_state_dict(optimizer.state_dict())
    copy.param_groups[0]["lr"] = 0.5
    assert copy.muon.param_groups[0]["lr"] == 0.5
    saved = copy.muon.state[model.qformer.key_proj.weight]["momentum_buffer"]
    kept = optimizer.muon.state[model.qformer.key_proj.weight]["momentum_buffer"]
    torch.testing.assert_close(saved, kept)


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step, state in ((5, '{"global_step": 5}'), (10, '{"epoch": 1'), (15, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_collator_counts_targets_only(tokenizer):
    rows = [torch.tensor([1, 7, 8, 2]), torch.tensor([1, 9, 2])]
    sample = {"vision_states": torch.zeros(49, 32), "captions": rows}
    batch = CaptionCollator(pad_token_id=0)([sample])
    assert batch["input_ids"].tolist() == [[1, 7, 8, 2], [1, 9, 2, 0]]
    ignored = IGNORED_LABEL
    assert batch["labels"].tolist() == [[ignored, 7, 8, 2], [ignored, 9, 2, ignored]]


def test_every_caption_of_a_scene_is_visited_equally_often(captioner_config, tokenizer):
    processor = QVisionProcessor.from_config(captioner_config, tokenizer)
    states = np.zeros((3, 49, 32), np.float16)
    captioned = CaptionedStates(SeenScenes("train", 0, states), processor, captions_per_visit=2)
    seen = [tuple(c.tolist()) for i in range(1, 15, 3) for c in captioned[i]["captions"]]
    told = [tuple(processor.encode(c).tolist()) for c in scenes.scene("train", 0, 1).captions]
    assert sorted(seen) == sorted(told * 2)


def test_sights_tell_what_a_patch_shows_and_mirror_it():
    scene = scenes.scene("crowd", 1, 3)
    records = np.zeros(1, sight_type(7))
    records[0] = sight(scene, 7)
    sights = Sights(records, 7)
    plain, mirrored = sights[0], sights[1]
    thing = scene.objects[0]
    patch = int(thing.center[1] // 32) * 7 + int(thing.center[0] // 32)
    assert plain["center"][patch]
    assert plain["coverage"].max() <= 1
    assert (mirrored["pixels"][:, ::-1] == plain["pixels"]).all()
    rows = plain["category"].reshape(7, 7)
    assert (mirrored["category"].reshape(7, 7) == rows[:, ::-1]).all()
    row, column = divmod(patch, 7)
    other = row * 7 + 6 - column
    assert mirrored["box"][other][0] == pytest.approx(7 - plain["box"][patch][0], abs=0.01)
    assert (mirrored["box"][other][1:] == plain["box"][patch][1:]).all()
    batch = collate([plain, mirrored])
    assert batch["pixel_values"].shape == (2, 3, 224, 224)


def test_patches_are_embedded_as_by_the_convolution():
    embedding, pixels = PatchEmbedding(8, side=4), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(embedding(pixels), torch.nn.Conv2d.forward(embedding, pixels))


def test_training_pixels_are_the_processors(captioner_config, tokenizer):
    image = scenes.scene("train", 0, 0).image
    processor = QVisionProcessor.from_config(captioner_config, tokenizer)
    expected = processor(images=image)["pixel_values"]
    assert isinstance(image, Image.Image)
    torch.testing.assert_close(
        normalise(np.array(image)[None]), expected, atol=1e-5, rtol=0, check_dtype=False
    )


def test_tokenizer_spells_scenes_in_words_and_anything_else_in_bytes(tokenizer):
    caption = "A red car on a beach."
    assert tokenizer.decode(tokenizer(f" {caption} ")["input_ids"]).strip() == caption
    strange = "Ein grüner Zug, 列車!"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


if __name__ == "__main__":
    learn_to_tell_briefly(Path(sys.argv[1]))


def test_a_tower_told_by_pictures_is_never_told_where(captioner_config):
    records = np.array([sight(scene, 7) for scene in scenes.generate(4)], sight_type(7))
    sights = Sights(records, 7)
    truth = collate([sights[i] for i in range(4)])
    shown = truth["coverage"] > SHOWN
    generator = torch.Generator().manual_seed(0)
    category, color = (torch.randn(4, 49, n, generator=generator) for n in (21, 8))
    loss = picture_loss(category, color, shown, truth)
    order, other = (torch.randperm(49, generator=generator) for _ in range(2))
    moved = {name: truth[name][:, order] for name in ("category", "color")}
    elsewhere = picture_loss(category[:, other], color[:, other], shown[:, order], moved)
    torch.testing.assert_close(elsewhere, loss)
    right = torch.nn.functional.one_hot(truth["category"].where(shown, 0), 21) * 20.0
    assert picture_loss(right, color, shown, truth) < loss
    with pytest.raises(ValueError, match="patches, pictures"):
        SeeingModel(captioner_config.vision_config, told="captions")
