"""Fine-tuning: the same weights however often it is killed, and nothing half on the disk."""

import copy
import json
import random
import re
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
from transformers import TrainerState

import qvision_lab as ql
from qvision_lab.data.coco import open_dataset
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import Checkpoint, Provenance, save_checkpoint
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import caption_trainer, freezing, run_recipe
from qvision_lab.training.caption_stage import CaptionCollator
from qvision_lab.training.caption_trainer import (
    CaptionedPictures,
    CaptionTrainer,
    Pace,
    Validation,
    is_exhausted,
)
from qvision_lab.training.finetune import estimate_memory
from qvision_lab.training.finetune_recipe import FinetuneRecipe, Phase, Training
from qvision_lab.training.recipe import load_recipe
from qvision_lab.training.trainer import last_checkpoint

BRIDGE = "training.phases=[{policy: bridge, epochs: 2}]"
WORDS = ("red", "blue", "cat", "dog", "on", "a", "mat")

# Runs a recipe in children of one process, each killed as its plan says: the import is paid once.
KILLED = """
import json, os, signal, sys
from qvision_lab.training import finetune, run_recipe
recipe, output, plans = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for method, count in plans:
    child = os.fork()
    if not child:
        calls = {"left": count}
        original = getattr(finetune.CaptionTrainer, method)
        def deadly(self, *args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)
        setattr(finetune.CaptionTrainer, method, deadly)
        run_recipe(recipe, output)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.fixture
def home(tmp_path, tiny, byte_tokenizer) -> Path:
    """A folder with a checkpoint, 12 pictures and 4 to validate on, a recipe of twelve steps."""
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
        "kind": "finetune",
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
                {"policy": "published", "epochs": 2, "learning_rate": 1e-3},
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

    def count(predictions, references, metrics):
        letters = sum(map(len, predictions.values())) / 100
        return type("Report", (), {"scores": {"CIDEr": letters}})

    monkeypatch.setattr(caption_trainer, "evaluate", count)


def run(home: Path, output: str, *overrides: str) -> Path:
    return run_recipe(str(home / "run.yaml"), home / output, overrides)


def losses(output: Path) -> list[float]:
    curves = [pd.read_csv(output / f"phase-{i}/curve.csv") for i in (1, 2)]
    return pd.concat(curves)["loss"].dropna().tolist()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_killed_and_resumed_ends_where_uninterrupted_does(home):
    whole = run(home, "whole")
    plans = [
        ["_save_optimizer_and_scheduler", 0],  # leaves a torn checkpoint
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


def test_a_finished_run_tells_all_and_is_not_run_again(home, quick, monkeypatch):
    checkpoint = run(home, "run")
    captioner = ql.load(checkpoint)
    assert captioner.caption(home / "pictures/0.png").text is not None
    run_file = yaml.safe_load((checkpoint / "run.yaml").read_text())
    assert run_file["recipe"]["training"]["accumulation"] == 1  # what was not said, too
    assert run_file["versions"]["torch"] == torch.__version__.split("+")[0]
    assert run_file["data"].keys() == {"train", "validation"}
    card = (checkpoint / "README.md").read_text()
    for told in ("12 pictures", "4 pictures", "2 epochs of `published`", "decoder.bridge", "CIDEr"):
        assert told in card
    curve = pd.read_csv(checkpoint / "captioner.csv")
    assert set(curve["phase"]) == {1, 2}
    scores = json.loads((checkpoint / "scores.json").read_text())
    assert scores["CIDEr"] == curve[curve["phase"] == 2]["eval_cider"].max()

    before, after = ql.load(home / "base").model, captioner.model
    frozen = [name for name, p in freezing_of(before, "published") if not p.requires_grad]
    for name, weight in before.named_parameters():
        changed = not torch.equal(weight, after.get_parameter(name))
        assert changed != (name in frozen)

    monkeypatch.setattr(CaptionTrainer, "training_step", lambda *args: pytest.fail("trained"))
    again = run(home, "run")
    assert weights(again) == weights(checkpoint)
    different = r"settings of training\.learning_rate \(0\.003, not 0\.01\);"
    with pytest.raises(ValueError, match=different):
        run(home, "run", "training.learning_rate=1e-2")
    with open(home / "pictures/train.jsonl", "a") as file:
        file.write(json.dumps({"file": "0.png", "caption": "one more"}) + "\n")
    with pytest.raises(ValueError, match=r"settings of data\.train \(\w+, not \w+\)"):
        run(home, "run")


def freezing_of(model, policy):
    freezing.apply(model, policy)
    return model.named_parameters()


def test_cached_features_train_as_pixels_do(home, quick):
    run(home, "cached")
    run(home, "pixels", "features=null")
    assert not (home / "pixels/features").exists()
    assert losses(home / "cached") == pytest.approx(losses(home / "pixels"), abs=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(home):
    config = json.loads((home / "base/config.json").read_text())
    (home / "base/config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = ["-m", "qvision_lab.cli", "train", home / "run.yaml", "--output", home / "two"]
    two = subprocess.Popen([*launch, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run(home, "one")
    said, _ = two.communicate()
    assert two.returncode == 0, said.decode()[-2000:]
    assert losses(home / "two") == pytest.approx(losses(home / "one"), abs=1e-4)


def test_validation_sees_neither_labels_nor_the_random_numbers_of_training(
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
    look, epochs = CaptionedPictures._look, set()
    monkeypatch.setattr(
        CaptionedPictures,
        "_look",
        lambda self, image: epochs.add((self.seed, self.epoch)) or look(self, image),
    )
    for n in (6, 1):
        run(home, f"{n}", BRIDGE, f"training.evaluations={n}")
    often, once = (home / f"{n}/phase-1/checkpoint-6" for n in (6, 1))
    assert weights(often) == weights(once)
    assert epochs == {(4, 0), (4, 1), (3, 0)}  # of training, each once; of validation


def test_a_loss_that_is_no_number_stops_and_saves_nothing(home, quick, monkeypatch):
    step = CaptionTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        bad = self.state.global_step == 4 and self.model.training
        return loss * float("nan") if bad else loss

    monkeypatch.setattr(CaptionTrainer, "compute_loss", poisoned)
    with pytest.raises(ValueError, match="the loss is nan at step 5 of"):
        run(home, "run", BRIDGE)
    assert {path.name for path in (home / "run/phase-1").glob("checkpoint-*")} == {"checkpoint-3"}


def test_weights_that_are_no_numbers_are_not_saved(home, quick, monkeypatch):
    def poison(trainer, args, state, control, model, **kwargs):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))

    monkeypatch.setattr(Pace, "on_step_end", poison)
    with pytest.raises(ValueError, match="weights are no numbers any more at step 1 "):
        run(home, "run", "training.phases=[{policy: bridge, epochs: 0.1}]")
    assert not list((home / "run/phase-1").glob("checkpoint-*"))


def test_a_full_disk_leaves_the_old_checkpoint_whole(home, quick, monkeypatch):
    """The kernel refuses to let a file grow, as it does on a full disk."""
    save = CaptionTrainer._save_optimizer_and_scheduler
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramped(self, folder):
        if self.state.global_step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            return save(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(CaptionTrainer, "_save_optimizer_and_scheduler", cramped)
    with pytest.raises(OSError, match=r"step 6 could not be saved in .*make room"):
        run(home, "run", BRIDGE)
    kept = home / "run/phase-1/checkpoint-3"
    assert last_checkpoint(kept.parent) == str(kept)
    assert not (home / "run/phase-1/checkpoint-6").exists()
    ql.load(kept)


def test_bad_pictures_are_counted_and_left_out_only_if_asked(home, quick):
    (home / "pictures/3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of .* cannot be read \(3\.png: .*skip_bad"):
        run(home, "run", BRIDGE)
    recipe = yaml.safe_load((home / "run.yaml").read_text())
    recipe["data"]["skip_bad"] = True
    (home / "run.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.warns(UserWarning, match="left out"):
        checkpoint = run(home, "skipped", BRIDGE)
    assert "11 pictures" in (checkpoint / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainign": {}}, "there is no setting trainign; did you mean training?"),
        ({"features": {"dtyp": "float32"}}, "did you mean features.dtype?"),
        ({"seed": "three"}, "seed='three' must be of type int"),
        ({"data": {"train": {"source": "x"}}}, "lacks data.validation"),
        ({"reinitialise": "qformer"}, "reinitialise='qformer' must be of type tuple[str, ...]"),
        ({"training": 3}, "training is 3: give it settings"),
        ({"training": {"phases": [], "learning_rate": 1}}, "phases is empty"),
        (
            {"training": {"phases": [{"policy": "publishd", "epochs": 1}], "learning_rate": 1}},
            "did you mean 'published'",
        ),
        (
            {"training": {"phases": [{"policy": "everything", "epochs": 1}], "learning_rate": 1}},
            "set features to null",
        ),
    ],
)
def test_a_recipe_that_says_what_there_is_not_is_refused(home, change, message):
    recipe = yaml.safe_load((home / "run.yaml").read_text())
    with pytest.raises(ValueError, match=re.escape(message)):
        FinetuneRecipe.parse({**recipe, **change})


def test_shipped_recipes_are_read_and_numbers_may_be_text():
    for name in ("finetune_scenes", "finetune_coco"):
        recipe = FinetuneRecipe.parse(load_recipe(name, ["training.learning_rate=1e-4"]))
        assert recipe.training.learning_rate == 1e-4
    assert (
        FinetuneRecipe.parse(
            {**load_recipe("finetune_scenes"), "training": {"phases": [], "learning_rate": "1e-4"}}
            | {"training": {"phases": [{"policy": 0.5, "epochs": "2e0"}], "learning_rate": "1e-4"}}
        )
        .training.phases[0]
        .epochs
        == 2
    )


def test_refusals_before_anything_is_trained(home, quick):
    for override, message in (
        ("reinitialise=[qformr]", "did you mean 'qformer'"),
        (
            "training={phases: [{policy: 0.4, epochs: 1}], learning_rate: 1, max_tokens: 99}",
            "to 64",
        ),
        (
            "training={phases: [{policy: 0.4, epochs: 1}], learning_rate: 1, precision: float16}",
            "GPU",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(home, f"run {message}", override)


# --- samples --------------------------------------------------------------------------------------


@pytest.fixture
def samples(home, tiny, byte_tokenizer) -> CaptionedPictures:
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    images = open_dataset(home / "pictures/train.jsonl")
    return CaptionedPictures(images, processor, 2, 12, seed=0)


def test_every_epoch_draws_captions_anew_and_the_same_each_time(samples):
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


def test_one_look_for_all_captions_gives_the_gradients_of_several(samples, tiny):
    model = copy.deepcopy(tiny)
    samples.captions_per_image = 5  # of which there are three or four: the rest weighs nothing
    batch = CaptionCollator(model.config.pad_token_id)([samples[i] for i in range(4)])

    def gradients(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    once = gradients(batch)
    real = (batch["labels"] != -100).any(1)
    assert real.sum() == sum(len(samples.images[i].references) for i in range(4))
    pixels = batch["pixel_values"].repeat_interleave(5, dim=0)[real]
    several = gradients(
        {
            "pixel_values": pixels,
            "input_ids": batch["input_ids"][real],
            "labels": batch["labels"][real],
        }
    )
    for one, other in zip(once, several, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# --- when to stop, and what it takes --------------------------------------------------------------


def test_patience_counts_evaluations_since_the_best(home):
    settings = FinetuneRecipe.parse(yaml.safe_load((home / "run.yaml").read_text())).training
    settings = replace(settings, patience=2)

    def judged(*values: float, by: str = "cider") -> bool:
        log = [{f"eval_{by}": value, "step": i} for i, value in enumerate(values)]
        return is_exhausted(TrainerState(log_history=log), replace(settings, best_by=by))

    assert not judged()
    assert not judged(1, 3, 2)
    assert judged(1, 3, 2, 3)
    assert not judged(3, 1, 2, by="loss")
    assert judged(1, 3, 2, by="loss")
    assert not is_exhausted(
        TrainerState(log_history=[{"eval_cider": 9 - i} for i in range(9)]),
        replace(settings, patience=None),
    )


def test_a_phase_without_progress_ends_there_and_stays_ended(home, quick, monkeypatch):
    scores = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(Validation, "__call__", lambda self, model: next(scores))
    settings = "{phases: [{policy: bridge, epochs: 4}], learning_rate: 0.1, batch_size: 4, "
    settings = f"training={settings} evaluations: 12, patience: 2}}"
    checkpoint = run(home, "run", settings)
    assert json.loads((checkpoint / "scores.json").read_text())["step"] == 1
    assert weights(run(home, "run", settings)) == weights(checkpoint)
    assert next(scores, None) is None


def test_tensorboard_gets_the_log_if_asked(home, quick):
    pytest.importorskip("tensorboard")
    once = "phases: [{policy: bridge, epochs: 1}], learning_rate: 1, batch_size: 12"
    checkpoint = run(home, "run", f"training={{{once}, tensorboard: true}}")
    assert json.loads((checkpoint / "scores.json").read_text())["loss"] > 0  # of a smaller batch
    assert list((home / "run/phase-1").rglob("events.out.tfevents.*"))


@pytest.fixture(scope="module")
def published() -> QVisionForConditionalGeneration:
    """A model of the published sizes, trained as it was, without values."""
    with torch.device("meta"):
        model = QVisionForConditionalGeneration(QVisionConfig())
    freezing.apply(model, "published")
    return model


def test_memory_is_that_of_what_is_trained(published):
    settings = Training((Phase("published", 1),), learning_rate=1, max_tokens=20)
    all_long = estimate_memory(published, settings, pictures=8)
    assert all_long.weights == 4 * 509_190_401
    assert all_long.gradients == 4 * 305_511_425 == all_long.optimizer / 2
    assert all_long.activations > 3 * 4 * 40 * 19 * 50_259  # the logits
    assert estimate_memory(published, settings, 8, [20, 10]).peak < all_long.peak
    model = copy.deepcopy(published)
    freezing.apply(model, "qformer")
    assert estimate_memory(model, settings, pictures=8).activations < all_long.activations / 2


@pytest.mark.parametrize(
    ("precision", "pictures", "gigabytes"),
    [("float32", 8, 6.3), ("float32", 64, 20.2), ("bfloat16", 8, 6.7), ("bfloat16", 64, 16.4)],
)
def test_memory_is_what_a_gpu_was_measured_to_need(published, precision, pictures, gigabytes):
    """Peaks of an H200, five captions a picture of 14.5 tokens in the mean and 24 at most."""
    settings = Training((Phase("published", 1),), learning_rate=1, precision=precision)
    estimate = estimate_memory(published, settings, pictures, lengths=[24, 5, 14, 15])
    assert estimate.peak / 1e9 == pytest.approx(gigabytes, rel=0.25)
    assert f"about {estimate.peak / 1e9:.1f} GB" in str(estimate)
