"""Images unlike those that a checkpoint learned from are reported wherever they are captioned."""

import json
import warnings

import pytest
import torch
from conftest import random_images, save_captioner
from safetensors.torch import load_file, save_file

import qvision_lab as ql
from qvision_lab.cli import main
from qvision_lab.model.familiarity import Familiarity, exceeds_chance
from qvision_lab.model.loading.storage import CheckpointError


def test_a_hundredth_of_familiar_images_is_beyond_the_limit():
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0, 1.0, 1.0, 1.0])  # the last four are left

    def images(n: int, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(n, 8, generator=draw) * spread + shift

    familiarity = Familiarity.fit(images(4000), images(4000))
    assert 0.005 < (~familiarity.holds(images(4000))).float().mean() < 0.02
    assert not familiarity.holds(images(50, shift=5.0)).any()
    assert familiarity.components.shape == (4, 8)
    assert familiarity.limit == pytest.approx(13.28**0.5, rel=0.03)  # chi-squared, 4 degrees, 1%


def test_scenes_are_familiar_and_noise_is_not(embedded, tmp_path):
    scenes = [scene.image for scene in ql.scenes.generate(4, split="test", seed=3)]
    with warnings.catch_warnings(action="error"):
        assert all(caption.familiar for caption in embedded.caption(scenes))
    for image, name in zip([*scenes, *random_images(2, 224, 224)], "abcdef", strict=True):
        image.save(tmp_path / f"{name}.png")
    message = r"2 of 6 pictures are unlike those .*For photographs: ql.load\('photos'\)"
    with pytest.warns(UserWarning, match=message):
        report = embedded.caption_folder(tmp_path, tmp_path / "captions.jsonl", batch_size=4)
    assert report.unfamiliar == 2
    records = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [record.get("familiar", True) for record in records] == [True] * 4 + [False] * 2


def test_as_many_as_chance_gives_are_marked_without_a_warning(embedded):
    scenes = [scene.image for scene in ql.scenes.generate(40, split="test", seed=3)]
    scenes.append(random_images(1, 224, 224)[0])
    with warnings.catch_warnings(action="error"):
        captions = embedded.caption(scenes, preset="greedy")
    assert [caption.familiar for caption in captions] == [True] * 40 + [False]
    few = [exceeds_chance(1, images) for images in (1, 10, 11)]
    assert [*few, exceeds_chance(2, 100), exceeds_chance(4, 100), exceeds_chance(0, 0)] == [
        *(True, True, False),
        *(False, True, False),
    ]


def test_the_command_says_so_in_a_line(tmp_path, capsys):
    random_images(1, 224, 224)[0].save(tmp_path / "noise.png")
    assert main(["caption", str(tmp_path / "noise.png")]) == 0
    assert "\nqvision: 1 of 1 pictures are unlike those" in "\n" + capsys.readouterr().err


def test_captions_are_those_of_pixels(embedded):
    images = random_images(3, 224, 224)
    without = ql.Captioner(embedded.model, embedded.processor)
    expected = without.caption(images, preset="greedy")
    assert {caption.familiar for caption in expected} == {None}
    with pytest.warns(UserWarning, match="3 of 3 pictures"):
        found = embedded.caption(images, preset="greedy")
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_it_is_kept_with_the_checkpoint(byte_captioner, tmp_path):
    states = torch.randn(100, 16)
    byte_captioner.familiarity = Familiarity.fit(states, states)
    folder = save_captioner(byte_captioner, tmp_path / "a")
    again = ql.load(ql.convert(folder, tmp_path / "b")).familiarity
    for name, values in vars(byte_captioner.familiarity).items():
        assert torch.equal(getattr(again, name), values)
    path = folder / "familiarity.safetensors"
    stored = load_file(path)
    for bad in (stored | {"mean": torch.zeros(3)}, stored | {"more": torch.zeros(3)}):
        save_file(bad, path)
        with pytest.raises(CheckpointError, match=r"familiarity.safetensors does not fit width 16"):
            ql.load(folder)
    save_file(stored | {"limit": torch.tensor(float("nan"))}, path)
    with pytest.raises(CheckpointError, match=r"limit .* is not finite"):
        ql.load(folder)
