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


PRINTED = [  # words of a command, and what it prints
    ("info CHECKPOINT", ["native layout", "model.safetensors", "PARAMETERS"]),
    ("diagnose --model CHECKPOINT --n 2", ["2 pictures, 5 visual tokens each", "ollapsed: "]),
    ("scenes stats --n 20", ["objects per picture"]),
    ("demo --n 3 --model CHECKPOINT --output FIGURES/demo.png", ["(0/3)"]),  # weights are random
]


@pytest.mark.parametrize(("words", "printed"), PRINTED)
def test_a_command_prints_its_result(words, printed, checkpoint, tmp_path, capsys):
    words = words.replace("CHECKPOINT", str(checkpoint)).replace("FIGURES", f"{tmp_path}/figures")
    assert main(words.split()) == 0
    total = sum(parameter.numel() for parameter in tiny_captioner().model.parameters())
    shown = capsys.readouterr().out
    assert all(text.replace("PARAMETERS", f"{total:,}") in shown for text in printed)
    if "demo" in words:
        (sheet,) = (tmp_path / "figures").iterdir()
        assert Image.open(sheet).width > 500


def test_scenes_are_written(tmp_path):
    assert main(["scenes", "write", str(tmp_path), "--n", "2"]) == 0
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_look_draws_a_picture_of_yours(checkpoint, photos, tmp_path):
    output = tmp_path / "figures"
    words = ["look", str(photos / "good.png"), "--model", str(checkpoint), "--output", str(output)]
    assert main(words) == 0
    for name in ("words", "queries", "deletion"):
        assert Image.open(output / f"{name}.png").width >= 1200


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
