"""Training runs: the same weights however often they are killed, and only complete files."""

import copy
import json
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
import yaml
from conftest import file_limit, interrupted, random_images, save_captioner
from transformers import TrainerState

import qvision_lab as ql
from qvision_lab.model.captioner import IGNORED_LABEL
from qvision_lab.model.decoder import Bridge
from qvision_lab.model.parameters import fingerprint_weights
from qvision_lab.training import freezing, load_recipe, train, train_captioner, trainer
from qvision_lab.training.memory import estimate_memory
from qvision_lab.training.optimizers import MuonAdamW
from qvision_lab.training.recipe import Phase, Training
from qvision_lab.training.samples import CaptionCollator, CaptionSamples
from qvision_lab.training.train import open_data
from qvision_lab.training.trainer import StageTrainer, Validation, last_checkpoint

BRIDGE = "training.phases=[{policy: bridge, epochs: 2}]"
WORDS = ("red", "blue", "cat", "dog", "on", "a", "mat")
PUBLISHED = (Phase(policy="published", epochs=1),)


def under(part: str, **settings) -> dict:
    return {f"{part}.{name}": value for name, value in settings.items()}


NEW = {  # a tiny new model, with a tower trained on Scenes
    **under("tower.model.vision_config", hidden_size=32, intermediate_size=64),
    **under("tower.model.vision_config", num_hidden_layers=1, num_attention_heads=2),
    **under("tower.model.text_config", hidden_size=32, num_heads=2),
    **under("tower.model", num_query_tokens=4, num_attention_heads=2),
    **under("tower", vocab_scenes=50, vocab_size=320, held_out=6, drawing_workers=0),
    **under("tower", data=[{"split": "train", "n": 12, "seed": 1}]),
    **under("tower", steps=8, batch_size=4, evaluations=4),
    **under("training", batch_size=4, evaluations=2),
    "training.phases.0.steps": 8,
    "data.train.n": 12,
    "data.validation.n": 6,
    "features.workers": 0,
    "scores": {"test": {"source": "scenes:test", "n": 4}},
    "calibration.n": 4,
}

RECIPE = """
name: tiny
seed: 3
checkpoint: HOME/base
reinitialise: [decoder.bridge]
data:
  train: {source: HOME/pictures/train.jsonl}
  validation: {source: HOME/pictures/val.jsonl}
features: {dtype: float32, workers: 0}
training:
  phases: [{policy: bridge, epochs: 2}, {policy: published, steps: 6, learning_rate: 0.001}]
  learning_rate: 0.003
  batch_size: 4
  captions_per_image: 3
  evaluations: 2
"""

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
def home(tmp_path, byte_captioner) -> Path:
    """A folder with a checkpoint, 12 images and 4 to validate on, a recipe of twelve steps."""
    save_captioner(byte_captioner, tmp_path / "base")
    (tmp_path / "pictures").mkdir()
    draw = random.Random(0)
    rows = []
    for i, picture in enumerate(random_images(16, 32, 32)):
        picture.save(tmp_path / f"pictures/{i}.png")
        captions = [" ".join(draw.choices(WORDS, k=4)) for _ in range(3 + i % 2)]
        rows.append({"file": f"{i}.png", "captions": captions})
    for name, some in (("train", rows), ("val", rows[12:])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"pictures/{name}.jsonl").write_text(lines)
    (tmp_path / "run.yaml").write_text(RECIPE.replace("HOME", str(tmp_path)))
    return tmp_path


@pytest.fixture
def quick(monkeypatch) -> None:
    """Validation without Java: captions are made, and their letters counted."""

    def count(predictions, dataset, metrics, resamples):
        letters = sum(map(len, predictions.values())) / 100
        return type("Report", (), {"scores": {"CIDEr": letters}})

    monkeypatch.setattr(trainer, "evaluate_dataset", count)


def run(home: Path, output: str, *overrides: str) -> Path:
    return train_captioner(load_recipe(str(home / "run.yaml"), overrides), home / output)


def run_new(output: Path, **changes) -> Path:
    return train_captioner(load_recipe("scenes", NEW | changes), output)


def losses(output: Path) -> list[float]:
    curves = [pd.read_csv(output / f"phase-{i}/curve.csv") for i in (1, 2)]
    return pd.concat(curves)["loss"].dropna().tolist()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_new_model_stopped_in_each_stage_has_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = run_new(tmp_path / "whole", scores={})
    for step in (5, 4 + 5):  # of the tower, and of the captioner after the rest of the tower
        with interrupted(step):
            run_new(tmp_path / "stopped")
    resumed = run_new(tmp_path / "stopped")
    assert weights(resumed) == weights(whole)
    for stage in ("vision", "phase-1"):
        assert pd.read_csv(tmp_path / f"stopped/{stage}/curve.csv")["loss"].count() == 8
    scores = json.loads((resumed / "scores.json").read_text())
    assert scores["test"]["captioner"]["true"]["of"] == 4
    assert "object" in json.loads((resumed / "confidence.json").read_text())["kinds"]
    assert "a sixth caption | " in (resumed / "README.md").read_text()
    assert pd.read_csv(resumed / "vision.csv")["eval_category"].between(0, 1).any()
    log = pd.read_csv(resumed / "captioner.csv").dropna(subset="eval_true")
    assert log["eval_true"].between(0, 1).all()
    assert log["eval_effective_rank"].between(1, 5).all()
    assert log["eval_query_cosine"].between(-0.25, 1).all()
    model = ql.load(resumed).model
    assert model.generation_config.do_sample is False
    assert model.get_parameter("decoder.bridge.scale").dtype == torch.float32
    assert run_new(tmp_path / "stopped") == resumed  # nothing is left to do
    with pytest.raises(ValueError, match=r"settings of seed \(0, not 1\)"):
        run_new(tmp_path / "stopped", seed=1)


def test_optimizer_gives_matrices_to_muon(tiny):
    groups = MuonAdamW(tiny, 1e-3, 0.02, 0.0).muon.param_groups
    matrices = {id(weight) for group in groups for weight in group["params"]}
    assert id(tiny.qformer.key_proj.weight) in matrices
    assert id(tiny.decoder.language_model.wte.weight) not in matrices
    assert id(tiny.vision.tower.embeddings.patch_embedding.weight) not in matrices


def test_the_bridge_has_a_rate_of_its_own(tiny):
    optimizer = MuonAdamW(tiny, 1e-3, 0.02, 0.0, bridge_rate=0.5)
    rates = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    assert len(rates) == len(list(tiny.parameters()))
    for name, parameter in tiny.named_parameters():
        rate = rates[id(parameter)]
        assert rate in ((0.01, 5e-4) if ".bridge." in name else (0.02, 1e-3)), name
    with pytest.raises(ValueError, match="bridge_rate needs a matrix_learning_rate"):
        load_recipe("finetune_coco", {"training.bridge_rate": 0.5})


def test_a_loss_on_their_cosine_keeps_queries_apart(home, quick):
    phase = "training.phases=[{policy: qformer, steps: 6}]"
    cosines = []
    for weight in ("null", "100"):
        output = run(home, weight, phase, f"training.query_cosine={weight}")
        cosines.append(pd.read_csv(output / "captioner.csv")["eval_query_cosine"].dropna().iloc[-1])
    assert cosines[1] < cosines[0]


def test_visual_tokens_are_dropped_whole_and_in_training_alone(home, monkeypatch):
    read, forward = {True: [], False: []}, Bridge.forward
    validate, fast = Validation.__call__, []

    def validated(validation):
        fast.append(validation.captioner.decoding.can_run())
        return validate(validation)

    def recorded(bridge, states, visual_tokens, *args):
        read[bridge.training].append((visual_tokens == 0).float().mean(-1).flatten())
        return forward(bridge, states, visual_tokens, *args)

    monkeypatch.setattr(Bridge, "forward", recorded)
    monkeypatch.setattr(Validation, "__call__", validated)
    phase = "training.phases=[{policy: captioner, steps: 6}]"
    run(home, "run", phase, "training.token_dropout=0.5", "model.dropout=0")
    assert set(torch.cat(read[True]).tolist()) == {0, 1}  # share of zeros in each token
    assert set(torch.cat(read[False]).tolist()) == {0}
    assert fast == [True] * 2
    with pytest.raises(ValueError, match="query_cosine compares all visual tokens"):
        load_recipe("scenes", {"training.token_dropout": 0.5, "training.query_cosine": 1.0})


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_that_would_emulate_bfloat16_computes_in_float32(supported, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "has_bfloat16", lambda: supported)
    settings = load_recipe("scenes", {"training.tensorboard": True}).training
    assert settings.precision == "bfloat16"
    arguments = trainer.training_arguments(settings, tmp_path, 0, 10)
    assert arguments.bf16 is supported
    assert arguments.report_to == ["tensorboard"]


def test_killed_and_resumed_ends_where_uninterrupted_does(home):
    whole = run(home, "whole")
    saving = "_save_optimizer_and_scheduler"  # leaves a damaged checkpoint
    plans = [[saving, 0], ["training_step", 4], ["evaluation_loop", 0], [saving, 1]]
    plans.append(["training_step", 3])
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
    run(home, "pixels", "features=null")
    assert not (home / "pixels/features").exists()
    assert losses(home / "run") == pytest.approx(losses(home / "pixels"), abs=1e-5)
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


def test_a_second_command_is_refused_and_the_first_goes_on(home, monkeypatch):
    step, refused = StageTrainer.training_step, []

    def nested(trainer, *args, **kwargs):
        if not refused:
            with pytest.raises(ValueError, match="another command is writing to"):
                run(home, "run", BRIDGE)
            refused.append(True)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", nested)
    checkpoint = run(home, "run", BRIDGE)
    assert refused
    recorded = yaml.safe_load((checkpoint / "run.yaml").read_text())
    before = ql.load(home / "base")
    assert recorded["model"] == fingerprint_weights(before.model)
    shutil.rmtree(home / "base")
    next(before.model.qformer.parameters()).data.add_(1)
    save_captioner(before, home / "base")
    with pytest.raises(ValueError, match=r"settings of model \(\w+, not \w+\)"):
        run(home, "run", BRIDGE)


def test_an_image_of_training_and_validation_is_validation_only(home):
    link = home / "linked"
    link.symlink_to(home / "pictures")
    changes = {"data.train.images": f"{link}/../pictures/../linked"}
    recipe = load_recipe(str(home / "run.yaml"), changes)
    data = open_data(recipe.data)
    assert [len(images) for images in data.values()] == [12, 4]


def without_dropout(home: Path) -> None:
    config = json.loads((home / "base/config.json").read_text())
    (home / "base/config.json").write_text(json.dumps(config | {"dropout": 0.0}))


def test_two_processes_and_accumulated_batches_train_as_one_does(home):
    without_dropout(home)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "qvision_lab.cli", "train", home / "run.yaml", "--output", home / "two"]
    two = subprocess.Popen([*launch, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run(home, "one")
    run(home, "parts", "training.batch_size=1", "training.accumulation=4")
    output, _ = two.communicate()
    assert two.returncode == 0, output.decode()[-2000:]
    for other in ("two", "parts"):
        assert losses(home / other) == pytest.approx(losses(home / "one"), abs=1e-4)


def test_changed_sizes_keep_the_tower_and_start_the_rest_from_random_weights(home, quick):
    parts = "reinitialise=[vision.projection, qformer, decoder]"
    sizes = ("model.num_query_tokens=2", "model.text_config.num_layers=1", parts)
    more = "model.text_config.attention_types=[[[global], 1]]", BRIDGE
    changed, base = ql.load(run(home, "changed", *sizes, *more)).model, ql.load(home / "base").model
    assert (changed.config.num_query_tokens, len(changed.decoder.language_model.h)) == (2, 1)
    for name, weight in base.vision.tower.named_parameters():
        assert torch.equal(weight, changed.vision.tower.get_parameter(name))
    assert not torch.equal(base.vision.projection.weight, changed.vision.projection.weight)


def test_validation_uses_neither_labels_nor_the_random_numbers_of_training(home, byte_captioner):
    images, captioner = ql.coco.open_dataset(home / "pictures/val.jsonl"), byte_captioner
    state = torch.get_rng_state()
    captions = Validation(images, captioner).captions()
    other = replace(images, images=tuple(replace(i, references=("cheese",)) for i in images))
    assert Validation(other, captioner).captions() == captions
    assert list(captions) == list(images.ids)
    assert len(set(captions.values())) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_evaluations_changes_no_weight(home, quick, monkeypatch):
    inputs, epochs, captioner = CaptionSamples.image_inputs, set(), Mock(wraps=train.Captioner)

    def recorded(self, image, draw):
        epochs.add((self.seed, self.epoch))
        return inputs(self, image, draw)

    monkeypatch.setattr(CaptionSamples, "image_inputs", recorded)
    monkeypatch.setattr(train, "Captioner", captioner)
    for n in (6, 1):
        run(home, f"{n}", BRIDGE, f"training.evaluations={n}")
    often, once = (home / f"{n}/phase-1/checkpoint-6" for n in (6, 1))
    assert weights(often) == weights(once)
    assert epochs == {(4, 0), (4, 1), (3, 0)}  # of training, each once; of validation
    assert captioner.call_count == 2  # one for all evaluations of a run


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
    evaluate = StageTrainer.evaluation_loop

    def poison(self, *args, **kwargs):
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad).fill_(float("inf"))
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "evaluation_loop", poison)
    with pytest.raises(ValueError, match="weights are not finite at step 1 "):
        run(home, "run", "training.phases=[{policy: bridge, steps: 1}]")
    assert not list((home / "run/phase-1").glob("checkpoint-*"))


def test_a_full_disk_leaves_the_old_checkpoint_complete(home, quick, monkeypatch):
    save = StageTrainer._save_optimizer_and_scheduler

    def cramped(self, folder):
        with file_limit(1000) if self.state.global_step > 3 else nullcontext():
            return save(self, folder)

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
        ("model.num_query_tokens=2", r"does not fit kept weights .* reinitialise"),
        ("model.num_attention_heads=5", "num_attention_heads=5"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(home, quick, override, message):
    with pytest.raises(ValueError, match=message):
        run(home, "run", override)


def test_a_phase_without_progress_ends_there_and_stays_ended(home, quick, monkeypatch):
    scores = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(Validation, "__call__", lambda self: {"cider": next(scores)})
    settings = "{phases: [{policy: bridge, epochs: 4}], learning_rate: 0.1, batch_size: 4, "
    settings = f"training={settings} evaluations: 12, patience: 2}}"
    checkpoint = run(home, "run", settings)
    assert json.loads((checkpoint / "scores.json").read_text())["validation"]["step"] == 1
    assert weights(run(home, "run", settings)) == weights(checkpoint)
    assert next(scores, None) is None


def test_patience_counts_evaluations_since_the_best():
    def judged(*values: float, by: str = "cider", patience: int | None = 2) -> bool:
        log = [{f"eval_{by}": value, "step": i} for i, value in enumerate(values)]
        return trainer.is_exhausted(TrainerState(log_history=log), by, patience)

    assert not judged()
    assert not judged(1, 3, 2)
    assert judged(1, 3, 2, 3)
    assert not judged(3, 1, 2, by="loss")
    assert judged(1, 3, 2, by="loss")
    assert not judged(*range(9, 0, -1), patience=None)


@pytest.fixture
def samples(home, byte_captioner) -> CaptionSamples:
    images = ql.coco.open_dataset(home / "pictures/train.jsonl")
    return CaptionSamples(images, byte_captioner.processor, 2, 12, seed=0)


def test_every_epoch_draws_other_captions_and_the_same_each_time(samples):
    def drawn(epoch: int) -> list[list[int]]:
        samples.epoch = epoch
        return [caption.tolist() for i in range(16) for caption in samples[i]["captions"]]

    first = drawn(0)
    assert drawn(1) != first
    assert drawn(0) == first
    assert len(first) == 32
    assert max(map(len, first)) == 12
    assert all(ids[0] == 257 and ids[-1] == 258 for ids in first)


def test_encoding_an_image_once_for_all_captions_equals_once_for_each(samples, tiny):
    samples.captions_per_image = 5  # of which there are three or four: the rest weighs nothing
    batch = CaptionCollator(tiny.config.pad_token_id)([samples[i] for i in range(4)])
    real = (batch["labels"] != IGNORED_LABEL).any(1)
    assert real.sum() == sum(len(samples.images[i].references) for i in range(4))
    several = {name: batch[name][real] for name in ("input_ids", "labels")}
    several["pixel_values"] = batch["pixel_values"].repeat_interleave(5, dim=0)[real]
    both = tiny(**batch).loss, tiny(**several).loss
    torch.testing.assert_close(*both)
    gradients = (torch.autograd.grad(loss, tiny.vision.projection.weight) for loss in both)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def published() -> ql.QVisionForConditionalGeneration:
    """A model of the published sizes, trained as it was, without values."""
    with torch.device("meta"):
        model = ql.QVisionForConditionalGeneration(ql.QVisionConfig())
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
