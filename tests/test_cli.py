"""The command: light to start, plain about errors, and honest in its exit status."""

import json
import subprocess
import sys

import pytest
from conftest import save_captioner, tiny_captioner
from PIL import Image

from qvision_lab.cli import main
from qvision_lab.model.captioner import generation_preset

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "numpy", "PIL")
COMMANDS = "caption eval diagnose info convert demo curves look explore scenes train ablate "
COMMANDS += "findings bench tables"
LISTED = {"train": "finetune_coco", "ablate": "architecture"}  # a recipe, a study


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    captioner = tiny_captioner()
    captioner.model.generation_config = generation_preset("greedy", captioner.model.config)
    return save_captioner(captioner, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def photos(tmp_path):
    """An image, and a text file named like one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "good.png")
    (folder / "bad.png").write_text("hello")
    return folder


def test_help_is_light():
    code = (
        "import sys, qvision_lab; from qvision_lab.cli import main; status = main([]); "
        f"print(status, [name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, last = run.stdout.splitlines()
    assert last == "0 []"
    assert any("caption pictures" in line for line in shown)


def test_every_command_has_help(capsys):
    names = [[name] for name in COMMANDS.split()]
    for words in ([], *names, ["scenes", "write"], ["scenes", "stats"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert "usage: qvision" in shown
        assert LISTED.get(" ".join(words), "") in shown


def test_caption_to_the_screen(checkpoint, photos, capsys):
    odd = (photos / "good.png").rename(photos / "line\u2028break.png")
    assert main(["caption", str(odd), "--model", str(checkpoint)]) == 0
    assert capsys.readouterr().out.startswith(f"{odd}: ")
    words = ["--temperature", "0.9", "--num-captions", "2", "--json"]
    assert main(["caption", str(odd), "--model", str(checkpoint), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["source"] == str(odd)
    assert len(record["captions"]) == 2
    assert record["settings"]["temperature"] == 0.9


def test_caption_to_a_file_counts_failures(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    words = ["caption", str(photos), "--model", str(checkpoint), "--output", str(output)]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "1 captioned, 0 already there, 1 failed" in shown.out
    assert "bad.png is no picture" in shown.err
    (photos / "bad.png").unlink()
    assert main(words) == 0
    assert "0 captioned, 1 already there, 0 failed" in capsys.readouterr().out


WRONG = "caption NOWHERE|caption no_photos/|caption PHOTOS --model NOWHERE|info NOWHERE|demo --n 0|"
WRONG += "caption PHOTOS --model CHECKPOINT --preset best|scenes stats --split everything|"
WRONG += "train NOWHERE --output NOWHERE"


@pytest.mark.parametrize("words", WRONG.split("|"))
def test_user_errors_are_one_line(words, checkpoint, photos, tmp_path, capsys):
    places = {"NOWHERE": tmp_path / "nowhere", "PHOTOS": photos, "CHECKPOINT": checkpoint}
    (tmp_path / "nowhere").mkdir()
    assert main([str(places.get(word, word)) for word in words.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qvision: error: ")


def test_info_prints_parameters_and_provenance(checkpoint, capsys):
    assert main(["info", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "native layout" in shown
    assert "model.safetensors" in shown
    total = sum(parameter.numel() for parameter in tiny_captioner().model.parameters())
    assert f"{total:,}" in shown


def test_diagnose_prints_a_verdict(checkpoint, capsys):
    assert main(["diagnose", "--model", str(checkpoint), "--n", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 pictures, 5 visual tokens each")
    assert "ollapsed: " in shown.splitlines()[-1]


def test_scenes_are_written_and_described(tmp_path, capsys):
    assert main(["scenes", "write", str(tmp_path / "scenes"), "--n", "2"]) == 0
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 2
    assert main(["scenes", "stats", "--n", "20"]) == 0
    assert "objects per picture" in capsys.readouterr().out


def test_look_draws_a_picture_of_yours(checkpoint, photos, tmp_path):
    output = tmp_path / "figures"
    words = ["look", str(photos / "good.png"), "--model", str(checkpoint), "--output", str(output)]
    assert main(words) == 0
    for name in ("words", "queries", "deletion"):
        assert Image.open(output / f"{name}.png").width >= 1200


def test_demo_checks_its_captions(checkpoint, tmp_path, capsys):
    sheet = tmp_path / "figures" / "demo.png"
    words = ["demo", "--n", "3", "--model", str(checkpoint), "--output", str(sheet)]
    assert main(words) == 0
    assert Image.open(sheet).width > 500
    assert list(sheet.parent.iterdir()) == [sheet]
    assert "(0/3)" in capsys.readouterr().out  # no caption of random weights is true


def test_explore_writes_a_notebook_and_opens_it(photos, tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(subprocess, "call", lambda command: commands.append(command) or 0)
    output = tmp_path / "x.ipynb"
    assert main(["explore", str(photos), "--output", str(output)]) == 0
    assert commands == [[sys.executable, "-m", "jupyterlab", str(output)]]
    (cell,) = json.loads(output.read_text())["cells"]
    assert f"ql.explore(ql.load(None), ['{photos}'])" in cell["source"]
    output.write_text("{}")
    assert main(["explore", "--output", str(output)]) == 2
    assert "holds something else" in capsys.readouterr().err
