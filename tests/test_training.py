"""Training runs: the same weights however often they are killed, and only complete files."""

import copy
import json
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from transformers import TrainerCallback, TrainerState

import qvision_lab as ql
from qvision_lab.data.atomic import locked
from qvision_lab.data.coco import open_dataset
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import Checkpoint, Provenance, save_checkpoint
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import freezing, load_recipe, train_captioner, trainer
from qvision_lab.training.memory import estimate_memory
from qvision_lab.training.optimizers import MuonAdamW
from qvision_lab.training.recipe import Optimisation, Phase, Training
from qvision_lab.training.samples import CaptionCollator, CaptionSamples
from qvision_lab.training.train import open_data
from qvision_lab.training.trainer import (
    EpochAndPatienceCallback,
    StageTrainer,
    Validation,
    is_exhausted,
    last_checkpoint,
    training_arguments,
)

BRIDGE = "training.phases=[{policy: bridge, epochs: 2}]"
WORDS = ("red", "blue", "cat", "dog", "on", "a", "mat")
PUBLISHED = (Phase(policy="published", epochs=1),)
NEW = {  # a tiny new model, with a tower trained on Scenes
    "tower.model.vision_config.hidden_size": 32,
    "tower.model.vision_config.intermediate_size": 64,
    "tower.model.vision_config.num_hidden_layers": 1,
    "tower.model.vision_config.num_attention_heads": 2,
    "tower.model.text_config.hidden_size": 32,
    "tower.model.text_config.num_heads": 2,
    "tower.model.num_query_tokens": 4,
    "tower.model.num_attention_heads": 2,
    "tower.vocab_scenes": 50,
    "tower.vocab_size": 320,
    "tower.data": [{"split": "train", "n": 12, "seed": 1}],
    "tower.held_out": 6,
    "tower.drawing_workers": 0,
    "tower.steps": 8,
    "tower.batch_size": 4,
    "tower.evaluations": 4,
    "data.train.n": 12,
    "data.validation.n": 6,
    "features.workers": 0,
    "training.phases.0.steps": 8,
    "training.batch_size": 4,
    "training.evaluations": 2,
    "scores": {"test": 4},
}

# Runs a recipe in children of one process, each killed as planned: the import is paid once.
KILLED = """
import json, os, signal, sys
from qvision_lab.training import load_recipe, train_captioner, trainer
recipe, output, plans = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for method, count in plans:
    child = os.fork()
    if not child:
        calls = {"left": count}
        original = getattr(trainer.StageTrainer, method)
        def deadly(self, *args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)
        setattr(trainer.StageTrainer, method, deadly)
        train_captioner(load_recipe(recipe), output)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.fixture
def home(tmp_path, tiny, byte_tokenizer) -> Path:
    """A folder with a checkpoint, 12 images and 4 to validate on, a recipe of twelve steps."""
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    origin = Provenance("a test", "native", None, {}, "float32")
    save_checkpoint(Checkpoint(tiny, processor, origin), tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    draw = random.Random(0)
    rows = []
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
        captions = [" ".join(draw.choices(WORDS, k=4)) for _ in range(3 + i % 2)]
        rows.append({"file": f"{i}.png", "captions": captions})
    for name, some in (("train", rows), ("val", rows[12:])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"pictures/{name}.jsonl").write_text(lines)
    pictures = str(tmp_path / "pictures")
    recipe = {
        "name": "tiny",
        "seed": 3,
        "checkpoint": str(tmp_path / "base"),
        "reinitialise": ["decoder.bridge"],
        "data": {
            "train": {"source": f"{pictures}/train.jsonl"},
            "validation": {"source": f"{pictures}/val.jsonl"},
        },
        "features": {"dtype": "float32", "workers": 0},
        "training": {
            "phases": [
                {"policy": "bridge", "epochs": 2},
                {"policy": "published", "steps": 6, "learning_rate": 1e-3},
            ],
            "learning_rate": 3e-3,
            "batch_size": 4,
            "captions_per_image": 3,
            "evaluations": 2,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def quick(monkeypatch) -> None:
    """Validation without Java: captions are made, and their letters counted."""

    def count(predictions, references, metrics, judge=None):
        letters = sum(map(len, predictions.values())) / 100
        return type("Report", (), {"scores": {"CIDEr": letters}})

    monkeypatch.setattr(trainer, "evaluate", count)


def run(home: Path, output: str, *overrides: str) -> Path:
    return train_captioner(load_recipe(str(home / "run.yaml"), overrides), home / output)


def run_new(output: Path, **changes) -> Path:
    return train_captioner(load_recipe("scenes", NEW | changes), output)


def losses(output: Path) -> list[float]:
    curves = [pd.read_csv(output / f"phase-{i}/curve.csv") for i in (1, 2)]
    return pd.concat(curves)["loss"].dropna().tolist()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# --- new models ----------------------------------------------------------------------------------


def run_until_stopped(output: Path, monkeypatch) -> None:
    """Run the recipe and interrupt the first stage that has no checkpoint, at its sixth step."""
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
        run_new(output)


def test_a_new_model_stopped_in_each_stage_has_the_weights_of_an_uninterrupted_one(
    tmp_path, monkeypatch
):
    whole = run_new(tmp_path / "whole")
    for _ in ("tower", "captioner"):
        with pytest.raises(KeyboardInterrupt):
            run_until_stopped(tmp_path / "stopped", monkeypatch)
    resumed = run_new(tmp_path / "stopped")
    assert weights(resumed) == weights(whole)
    for stage in ("vision", "phase-1"):
        assert pd.read_csv(tmp_path / f"stopped/{stage}/curve.csv")["loss"].count() == 8
    scores = json.loads((resumed / "scores.json").read_text())
    assert scores["test"]["captioner"]["true"]["of"] == 4
    assert "a sixth caption | " in (resumed / "README.md").read_text()
    assert pd.read_csv(resumed / "vision.csv")["eval_category"].between(0, 1).any()
    assert pd.read_csv(resumed / "captioner.csv")["eval_true"].between(0, 1).any()
    model = ql.load(resumed).model
    assert model.generation_config.do_sample is False
    assert model.get_parameter("decoder.bridge.scale").dtype == torch.float32
    assert run_new(tmp_path / "stopped") == resumed  # nothing is left to do
    with pytest.raises(ValueError, match=r"settings of seed \(0, not 1\)"):
        run_new(tmp_path / "whole", seed=1)


@pytest.fixture
def new_model() -> QVisionForConditionalGeneration:
    """Random weights, without dropout."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 320}
    torch.manual_seed(0)
    config = QVisionConfig(
        vision_config={**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        text_config={**text, "attention_types": [[["global"], 2]]},
        num_query_tokens=4,
        num_attention_heads=2,
        dropout=0.0,
        start_token_id=1,
        end_token_id=2,
        pad_token_id=0,
    )
    return QVisionForConditionalGeneration(config)


def test_accumulation_changes_neither_loss_nor_gradients(tmp_path, new_model):
    draw = torch.Generator().manual_seed(0)
    samples = [
        {
            "vision_states": torch.randn(4, 32, generator=draw),
            "captions": [torch.tensor([1, *range(5, 7 + i + k), 2]) for k in range(2)],
        }
        for i in range(8)
    ]

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            trained = (p.grad for p in model.parameters() if p.grad is not None)
            self.gradients = torch.cat([gradient.flatten().clone() for gradient in trained])

    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        kept, model = KeepGradients(), copy.deepcopy(new_model)
        settings = Optimisation(
            learning_rate=1e-3, batch_size=batch_size, accumulation=accumulation
        )
        stage = StageTrainer(
            model,
            training_arguments(settings, tmp_path / str(accumulation), 0, 1),
            data_collator=CaptionCollator(0),
            train_dataset=samples,
            eval_dataset=samples[:2],
            callbacks=[kept],
            measure=lambda model: {},
        )
        stage.train()
        loss = next(row["loss"] for row in stage.state.log_history if "loss" in row)
        results.append((loss, kept.gradients))
    (loss, gradients), (accumulated_loss, accumulated_gradients) = results
    assert loss == pytest.approx(accumulated_loss, abs=1e-5)
    torch.testing.assert_close(gradients, accumulated_gradients, atol=1e-6, rtol=1e-4)


def test_optimizer_gives_matrices_to_muon_and_survives_saving(new_model):
    optimizer = MuonAdamW(new_model, 1e-3, 0.02, 0.0)
    matrices = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    assert id(new_model.qformer.key_proj.weight) in matrices
    assert id(new_model.decoder.language_model.wte.weight) not in matrices
    assert id(new_model.vision.tower.embeddings.patch_embedding.weight) not in matrices
    ids = torch.tensor([[1, 5, 6]])
    new_model(input_ids=ids, image_tokens=torch.ones(1, 4, 32), labels=ids).loss.backward()
    optimizer.step()
    again = MuonAdamW(new_model, 1e-3, 0.02, 0.0)
    again.load_state_dict(optimizer.state_dict())
    again.param_groups[0]["lr"] = 0.5
    assert again.muon.param_groups[0]["lr"] == 0.5
    saved = again.muon.state[new_model.qformer.key_proj.weight]["momentum_buffer"]
    kept = optimizer.muon.state[new_model.qformer.key_proj.weight]["momentum_buffer"]
    torch.testing.assert_close(saved, kept)


# --- fine-tuning ---------------------------------------------------------------------------------


def test_killed_and_resumed_ends_where_uninterrupted_does(home):
    whole = run(home, "whole")
    plans = [
        ["_save_optimizer_and_scheduler", 0],  # leaves a damaged checkpoint
        ["training_step", 4],
        ["evaluation_loop", 0],
        ["_save_optimizer_and_scheduler", 1],
        ["training_step", 3],
    ]
    killed = home / "killed"
    command = [sys.executable, "-c", KILLED, home / "run.yaml", killed, json.dumps(plans)]
    subprocess.run(command, check=True, capture_output=True)
    assert not (killed / "checkpoint").exists()
    resumed = run(home, "killed")
    assert weights(resumed) == weights(whole)
    assert losses(killed) == losses(home / "whole")
    assert len(losses(killed)) == 12


def test_a_finished_run_records_everything_and_is_not_run_again(home, quick, monkeypatch):
    checkpoint = run(home, "run")
    captioner = ql.load(checkpoint)
    assert captioner.caption(home / "pictures/0.png").text is not None
    run_file = yaml.safe_load((checkpoint / "run.yaml").read_text())
    assert run_file["recipe"]["training"]["accumulation"] == 1  # defaults, too
    assert run_file["versions"]["torch"] == torch.__version__.split("+")[0]
    assert run_file["data"].keys() == {"train", "validation"}
    card = (checkpoint / "README.md").read_text()
    for words in ("12 images", "4 images", "6 steps of `published`", "decoder.bridge", "CIDEr"):
        assert words in card
    curve = pd.read_csv(checkpoint / "captioner.csv")
    assert set(curve["phase"]) == {1, 2}
    scores = json.loads((checkpoint / "scores.json").read_text())["validation"]
    assert scores["CIDEr"] == curve[curve["phase"] == 2]["eval_cider"].max()

    before, after = ql.load(home / "base").model, captioner.model
    freezing.apply(before, "published")
    for name, weight in before.named_parameters():
        assert torch.equal(weight, after.get_parameter(name)) != weight.requires_grad

    monkeypatch.setattr(StageTrainer, "training_step", lambda *args: pytest.fail("trained"))
    again = run(home, "run", "features.workers=1", f"features.folder={home / 'run/features'}")
    assert weights(again) == weights(checkpoint)  # where and how features are read is no setting
    different = r"settings of training\.learning_rate \(0\.003, not 0\.01\);"
    with pytest.raises(ValueError, match=different):
        run(home, "run", "training.learning_rate=1e-2")
    with open(home / "pictures/train.jsonl", "a") as file:
        file.write(json.dumps({"file": "0.png", "caption": "one more"}) + "\n")
    with pytest.raises(ValueError, match=r"settings of data\.train \(\w+, not \w+\)"):
        run(home, "run")


def test_two_commands_do_not_write_to_one_folder(home):
    (home / "run").mkdir()
    with locked(home / "run"), pytest.raises(ValueError, match="another command is writing to"):
        run(home, "run")
    with locked(home / "run"):  # released, also after the error
        assert not (home / "run/run.yaml").exists()


def test_an_image_of_training_and_validation_is_validation_only(home):
    link = home / "linked"
    link.symlink_to(home / "pictures")
    recipe = load_recipe(
        str(home / "run.yaml"), {"data.train.images": f"{link}/../pictures/../linked"}
    )
    data = open_data(recipe.data)
    assert [len(images) for images in data.values()] == [12, 4]


def test_cached_features_train_as_pixels_do(home, quick):
    run(home, "cached")
    run(home, "pixels", "features=null")
    assert not (home / "pixels/features").exists()
    assert losses(home / "cached") == pytest.approx(losses(home / "pixels"), abs=1e-5)


def test_two_processes_train_as_one_does(home):
    config = json.loads((home / "base/config.json").read_text())
    (home / "base/config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "qvision_lab.cli", "train", home / "run.yaml", "--output", home / "two"]
    two = subprocess.Popen([*launch, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run(home, "one")
    output, _ = two.communicate()
    assert two.returncode == 0, output.decode()[-2000:]
    assert losses(home / "two") == pytest.approx(losses(home / "one"), abs=1e-4)


def test_changed_sizes_keep_the_tower_and_start_the_rest_from_random_weights(home, quick):
    parts = "reinitialise=[vision.projection, qformer, decoder]"
    sizes = ("model.num_query_tokens=2", "model.text_config.num_layers=1", parts)
    more = "model.text_config.attention_types=[[[global], 1]]", BRIDGE
    changed, base = ql.load(run(home, "changed", *sizes, *more)).model, ql.load(home / "base").model
    assert (changed.config.num_query_tokens, len(changed.decoder.language_model.h)) == (2, 1)
    for name, weight in base.vision.tower.named_parameters():
        assert torch.equal(weight, changed.vision.tower.get_parameter(name))
    assert not torch.equal(base.vision.projection.weight, changed.vision.projection.weight)
    with pytest.raises(ValueError, match=r"does not fit kept weights .* reinitialise"):
        run(home, "kept", "model.num_query_tokens=2")
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        run(home, "unfit", "model.num_attention_heads=5", parts)


def test_validation_uses_neither_labels_nor_the_random_numbers_of_training(
    home, tiny, byte_tokenizer
):
    images = open_dataset(home / "pictures/val.jsonl")
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    validation = Validation(images, processor, batch_size=3)
    state = torch.get_rng_state()
    captions = validation.captions(tiny)
    other = replace(images, images=tuple(replace(i, references=("cheese",)) for i in images))
    assert Validation(other, processor, batch_size=3).captions(tiny) == captions
    assert list(captions) == list(images.ids)
    assert len(set(captions.values())) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_evaluations_changes_no_weight(home, quick, monkeypatch):
    inputs, epochs = CaptionSamples.image_inputs, set()
    monkeypatch.setattr(
        CaptionSamples,
        "image_inputs",
        lambda self, image: epochs.add((self.seed, self.epoch)) or inputs(self, image),
    )
    for n in (6, 1):
        run(home, f"{n}", BRIDGE, f"training.evaluations={n}")
    often, once = (home / f"{n}/phase-1/checkpoint-6" for n in (6, 1))
    assert weights(often) == weights(once)
    assert epochs == {(4, 0), (4, 1), (3, 0)}  # of training, each once; of validation


def check_a_poisoned_loss_stops(home: Path, monkeypatch, *overrides: str) -> None:
    """The fifth loss is nan: training stops there, and the checkpoint of step 3 stays alone."""
    step = StageTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        bad = self.state.global_step == 4 and self.model.training
        return loss * float("nan") if bad else loss

    monkeypatch.setattr(StageTrainer, "compute_loss", poisoned)
    with pytest.raises(ValueError, match="the loss is nan at step 5 of"):
        run(home, "run", *overrides)
    assert {path.name for path in (home / "run/phase-1").glob("checkpoint-*")} == {"checkpoint-3"}


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(home, quick, monkeypatch):
    check_a_poisoned_loss_stops(home, monkeypatch, BRIDGE)


def test_weights_that_are_not_finite_are_not_saved(home, quick, monkeypatch):
    def poison(trainer, args, state, control, model, **kwargs):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))

    monkeypatch.setattr(EpochAndPatienceCallback, "on_step_end", poison)
    with pytest.raises(ValueError, match="weights are not finite at step 1 "):
        run(home, "run", "training.phases=[{policy: bridge, steps: 1}]")
    assert not list((home / "run/phase-1").glob("checkpoint-*"))


def test_a_full_disk_leaves_the_old_checkpoint_complete(home, quick, monkeypatch):
    """The kernel refuses to let a file grow, as it does on a full disk."""
    save = StageTrainer._save_optimizer_and_scheduler
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramped(self, folder):
        if self.state.global_step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            return save(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", cramped)
    with pytest.raises(OSError, match=r"step 6 could not be saved in .*make room"):
        run(home, "run", BRIDGE)
    kept = home / "run/phase-1/checkpoint-3"
    assert last_checkpoint(kept.parent) == str(kept)
    assert not (home / "run/phase-1/checkpoint-6").exists()
    ql.load(kept)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    for step, state in ((5, '{"global_step": 5}'), (10, '{"epoch": 1'), (15, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_bad_images_are_counted_and_left_out_only_if_asked(home, quick):
    (home / "pictures/3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of .* cannot be read \(3\.png: .*skip_bad"):
        run(home, "run", BRIDGE)
    with pytest.warns(UserWarning, match="left out"):
        checkpoint = run(home, "skipped", BRIDGE, "data.skip_bad=true")
    assert "11 images" in (checkpoint / "README.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reinitialise=[qformr]", "did you mean 'qformer'"),
        ("training.max_tokens=99", "must be from 3 to 64"),
        ("training.precision=float16", "needs a GPU"),
        ("training.batch_size=64", "less than training.batch_size=64"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(home, quick, override, message):
    with pytest.raises(ValueError, match=message):
        run(home, "run", override)


def test_a_phase_without_progress_ends_there_and_stays_ended(home, quick, monkeypatch):
    scores = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(Validation, "__call__", lambda self, model: {"cider": next(scores)})
    settings = "{phases: [{policy: bridge, epochs: 4}], learning_rate: 0.1, batch_size: 4, "
    settings = f"training={settings} evaluations: 12, patience: 2}}"
    checkpoint = run(home, "run", settings)
    assert json.loads((checkpoint / "scores.json").read_text())["validation"]["step"] == 1
    assert weights(run(home, "run", settings)) == weights(checkpoint)
    assert next(scores, None) is None


def test_patience_counts_evaluations_since_the_best():
    def judged(*values: float, by: str = "cider", patience: int | None = 2) -> bool:
        log = [{f"eval_{by}": value, "step": i} for i, value in enumerate(values)]
        return is_exhausted(TrainerState(log_history=log), by, patience)

    assert not judged()
    assert not judged(1, 3, 2)
    assert judged(1, 3, 2, 3)
    assert not judged(3, 1, 2, by="loss")
    assert judged(1, 3, 2, by="loss")
    assert not judged(*range(9, 0, -1), patience=None)


def test_tensorboard_gets_the_log_if_asked(home, quick):
    pytest.importorskip("tensorboard")
    run(home, "run", BRIDGE, "training.tensorboard=true")
    assert list((home / "run/phase-1").rglob("events.out.tfevents.*"))


# --- samples -------------------------------------------------------------------------------------


@pytest.fixture
def samples(home, tiny, byte_tokenizer) -> CaptionSamples:
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    images = open_dataset(home / "pictures/train.jsonl")
    return CaptionSamples(images, processor, 2, 12, seed=0)


def test_every_epoch_draws_other_captions_and_the_same_each_time(samples):
    def drawn(epoch: int) -> list[list[int]]:
        samples.epoch = epoch
        return [caption.tolist() for i in range(16) for caption in samples[i]["captions"]]

    first = drawn(0)
    assert drawn(1) != first
    assert drawn(0) == first
    assert len(first) == 32
    cut = [ids for ids in first if len(ids) == 12]
    assert cut
    assert all(ids[0] == 257 and ids[-1] == 258 for ids in first)


def test_encoding_an_image_once_for_all_captions_gives_the_gradients_of_several(samples, tiny):
    model = copy.deepcopy(tiny)
    samples.captions_per_image = 5  # of which there are three or four: the rest weighs nothing
    batch = CaptionCollator(model.config.pad_token_id)([samples[i] for i in range(4)])

    def gradients(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    once = gradients(batch)
    real = (batch["labels"] != IGNORED_LABEL).any(1)
    assert real.sum() == sum(len(samples.images[i].references) for i in range(4))
    pixels = batch["pixel_values"].repeat_interleave(5, dim=0)[real]
    ids, labels = batch["input_ids"][real], batch["labels"][real]
    several = gradients({"pixel_values": pixels, "input_ids": ids, "labels": labels})
    for one, other in zip(once, several, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_collator_counts_targets_only():
    rows = [torch.tensor([1, 7, 8, 2]), torch.tensor([1, 9, 2])]
    sample = {"vision_states": torch.zeros(49, 32), "captions": rows}
    batch = CaptionCollator(pad_token_id=0)([sample])
    assert batch["input_ids"].tolist() == [[1, 7, 8, 2], [1, 9, 2, 0]]
    ignored = IGNORED_LABEL
    assert batch["labels"].tolist() == [[ignored, 7, 8, 2], [ignored, 9, 2, ignored]]


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> QVisionForConditionalGeneration:
    """A model of the published sizes, trained as it was, without values."""
    with torch.device("meta"):
        model = QVisionForConditionalGeneration(QVisionConfig())
    freezing.apply(model, "published")
    return model


def test_memory_depends_on_what_is_trained(published):
    settings = Training(phases=PUBLISHED, learning_rate=1, max_tokens=20)
    all_long = estimate_memory(published, settings, images=8)
    assert all_long.weights == 4 * 509_190_401
    assert all_long.gradients == 4 * 305_511_425 == all_long.optimizer / 2
    assert all_long.activations > 3 * 4 * 40 * 19 * 50_259  # the logits
    assert estimate_memory(published, settings, 8, [20, 10]).peak < all_long.peak
    model = copy.deepcopy(published)
    freezing.apply(model, "qformer")
    assert estimate_memory(model, settings, images=8).activations < all_long.activations / 2


@pytest.mark.parametrize(
    ("precision", "images", "gigabytes"),
    [("float32", 8, 6.3), ("float32", 64, 20.2), ("bfloat16", 8, 6.7), ("bfloat16", 64, 16.4)],
)
def test_memory_is_what_a_gpu_was_measured_to_need(published, precision, images, gigabytes):
    """Peaks of an H200, five captions per image, of 14.5 tokens on average and 24 at most."""
    settings = Training(phases=PUBLISHED, learning_rate=1, precision=precision)
    estimate = estimate_memory(published, settings, images, lengths=[24, 5, 14, 15])
    assert estimate.peak / 1e9 == pytest.approx(gigabytes, rel=0.25)
    assert f"about {estimate.peak / 1e9:.1f} GB" in str(estimate)
