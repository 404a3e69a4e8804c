"""The Captioner: the same captions for every batch size, and records that survive interruptions."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_images, tiny_captioner
from PIL import Image
from transformers import MaxLengthCriteria

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.generation import Search
from qvision_lab.captioning.images import ImageError
from qvision_lab.captioning.reading import Batch, Item, Reader, read_batches
from qvision_lab.data.atomic import locked
from qvision_lab.interpretation.maps import METHODS, word_maps
from qvision_lab.interpretation.trace import trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration

GREEDY = {"preset": "greedy"}
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95, "max_new_tokens": 8}


class Interrupted(Captioner):
    """Stops at its second batch."""

    batches = 0

    def stop(self):
        raise KeyboardInterrupt

    def _caption_batch(self, *arguments):
        self.batches += 1
        if self.batches == 2:
            self.stop()
        return super()._caption_batch(*arguments)


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return tiny_captioner()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return random_images(5)


@pytest.fixture
def folder(tmp_path, pictures):
    """Five images, the third one damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    os.truncate(folder / "2.png", 2000)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "captions.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(report) -> tuple[int, int, int]:
    return report.captioned, report.skipped, report.failed


def ids(captions):
    return [caption.token_ids for caption in captions]


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, {"num_beams": 3}])
def test_captions_are_batch_invariant(captioner, pictures, settings):
    one_by_one = captioner.caption(pictures, batch_size=1, **settings)
    in_batches = captioner.caption(iter(pictures), batch_size=3, **settings)
    assert ids(one_by_one) == ids(in_batches)
    assert len(set(ids(one_by_one))) > 1
    assert captioner.caption(pictures[0], **settings).token_ids == one_by_one[0].token_ids
    for one, other in zip(one_by_one, in_batches, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_draws_depend_on_seed_and_index(captioner, pictures):
    same_picture = [pictures[0]] * 2
    before = torch.random.get_rng_state()
    captions = captioner.caption(same_picture, seed=1, num_return_sequences=3, **SAMPLED)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len({caption.token_ids for several in captions for caption in several}) == 6
    assert captioner.caption(same_picture, seed=1, num_return_sequences=3, **SAMPLED) == captions
    assert captioner.caption(pictures[0], seed=2, **SAMPLED).token_ids != captions[0][0].token_ids


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, {"preset": "beam"}])
def test_logprobs_are_the_models_own(captioner, pictures, settings):
    caption = captioner.caption(pictures[0], repetition_penalty=1.5, **settings)
    model, start = captioner.model, captioner.model.config.start_token_id
    pixel_values = captioner.processor(images=pictures[0])["pixel_values"]
    with torch.no_grad():
        row = torch.tensor([[start, *caption.token_ids]])
        logits = model(row, pixel_values=pixel_values).logits[0, :-1]
    expected = logits.log_softmax(-1)[range(len(caption.token_ids)), caption.token_ids]
    np.testing.assert_allclose(caption.logprobs, expected, atol=1e-5)
    assert caption.score == pytest.approx(expected.mean().item(), abs=1e-5)
    assert len(caption.tokens) == len(caption.logprobs) == len(caption.token_ids)


def test_captions_are_those_of_generate(captioner, pictures):
    three = MaxLengthCriteria(max_length=4)  # with the start
    stopped = captioner.caption(pictures[0], stopping_criteria=[three], **GREEDY)
    assert len(stopped.token_ids) <= 3
    how = {"do_sample": False, "max_new_tokens": 30, "min_length": 0, "repetition_penalty": 1.0}
    plain = captioner.model.generate(**captioner.processor(images=pictures[:1]), **how)
    greedy = captioner.caption(pictures[0], **GREEDY)  # not the model's own penalty
    assert list(greedy.token_ids) == plain[0, 1 : len(greedy.token_ids) + 1].tolist()
    end = captioner.model.config.end_token_id
    for finished in captioner.caption(pictures, forced_eos_token_id=end, **GREEDY):
        assert finished.token_ids.index(end) == len(finished.token_ids) - 1
        assert "<END>" not in finished.text


def test_one_setting_chooses_the_search(captioner, pictures):
    for setting in ({"temperature": 0.5}, {"typical_p": 0.5}, {"eta_cutoff": 0.1}, {"top_h": 0.4}):
        sampled = captioner.caption(pictures[0], preset="greedy", **setting)
        assert sampled.settings.items() >= {"do_sample": True, **setting}.items()
        assert sampled.seed == 0
    first, _, _ = captioner.caption(pictures[0], num_beams=3, num_return_sequences=3)
    assert first.seed is None
    assert "temperature" not in first.settings


def test_settings_are_tried_out_once_for_many_pictures(pictures, monkeypatch):
    captioner, tried, try_out = tiny_captioner(), [], Search.try_out
    record = lambda search, model: tried.append(try_out(search, model))  # noqa: E731
    monkeypatch.setattr(Search, "try_out", record)
    for size in (2, 2, 3, 2):
        captioner.caption(pictures[0], no_repeat_ngram_size=size)
    assert len(tried) == 3


NAN = float("nan")
WORKING = [
    *({"max_new_tokens": 64}, {"max_length": 5}, {"max_new_tokens": np.int64(5)}, {"top_p": 0}),
    *({"temperature": np.float32(0.5), "seed": np.int64(3)}, {"top_k": torch.tensor(3)}),
    *({"temperature": 2}, {"do_sample": None, "batch_size": np.int64(2)}, {"max_time": 5}),
    *({"bad_words_ids": ((1, 2), (3,))}, {"suppress_tokens": (3, 4)}, {"guidance_scale": 1.0}),
    *({"sequence_bias": {(1, 2): -1.0}}, {"num_beams": 2, "num_return_sequences": 2}),
]
REFUSED = {
    "max_new_tokens": (65, 10**9, 0, -5, "10", NAN, 2.5, True),
    "num_return_sequences": (10**7, 0, -1, "2"),
    "num_beams": (10**7, 0, -1, "3", 2.0),
    "temperature": (-1.0, 0, NAN, "0.5", float("inf")),
    **{"top_k": (-1, "5"), "top_p": (NAN, 2.0, "x"), "min_p": (NAN,), "typical_p": (NAN, 1.5)},
    **{"repetition_penalty": (0.0, -1.0, NAN, "x"), "length_penalty": (NAN,), "max_time": (NAN,)},
    **{"seed": ("x", 1.5, NAN, None), "batch_size": ("4", 0.5, NAN, 0), "min_length": (-1, "3")},
    "temperatur": (0.5,),
    **{"stop_strings": (["a"],), "guidance_scale": (2.0,), "sequence_bias": ({},)},
    **{"no_repeat_ngram_size": ("2",), "cache_implementation": ("quantized",), "max_length": (1,)},
    **{"logits_processor": ("x", [5]), "stopping_criteria": (5, "x"), "streamer": ("x", [])},
    **{"prefix_allowed_tokens_fn": (5,), "tokenizer": (5,)},
}
CASES = [({name: x}, name) for name, values in REFUSED.items() for x in values]
CASES += [
    *(({"preset": "best"}, "best"), ({"preprocessing": "square"}, "square")),
    ({"num_beams": 2, "temperature": 0.5}, "num_beams=2"),
    ({"preset": "greedy", "num_return_sequences": 2}, "num_return_sequences"),
]


def test_sampling_replaces_the_beams_of_a_model(pictures):
    captioner = tiny_captioner()
    captioner.model.generation_config.update(num_beams=3, do_sample=False)
    sampled = captioner.caption(pictures[0], temperature=0.5, num_return_sequences=4)
    assert {c.settings.get("num_beams", 1) for c in sampled} == {1}
    assert captioner.caption(pictures[0]).settings["num_beams"] == 3
    with pytest.raises(ValueError, match="num_beams=3 and sampling"):
        captioner.caption(pictures[0], preset="beam", temperature=0.5)


@pytest.mark.parametrize("settings", WORKING, ids=str)
def test_settings_of_any_kind_of_number_resume(captioner, pictures, tmp_path, settings):
    pictures[0].save(tmp_path / "a.png")
    for captioned in (1, 0):
        report = captioner.caption_folder(tmp_path, tmp_path / "o", **settings)
        assert (report.captioned, report.skipped) == (captioned, 1 - captioned)


@pytest.mark.parametrize(("settings", "named"), CASES)
def test_other_values_are_refused_before_the_first_batch(captioner, settings, named):
    unread = (pytest.fail("a picture was read") for _ in range(1))
    with pytest.raises(ValueError, match=named):
        captioner.caption(unread, **settings)


def test_processors_criteria_and_streamers_work_alone_and_in_lists(captioner, pictures):
    def forbid(ids, scores):
        return scores.index_fill(1, torch.arange(255), -torch.inf)

    def stop(ids, scores, **_):
        return torch.full((len(ids),), ids.shape[1] > 2)

    class Heard(list):
        put, end = list.append, list.clear

    for how in ({"preset": "greedy"}, {"temperature": 0.5}):
        for several in (lambda x: x, lambda x: [x], lambda x: (x,)):
            settings = {"logits_processor": several(forbid), "stopping_criteria": several(stop)}
            for caption in captioner.caption(pictures, max_new_tokens=9, **how, **settings):
                assert len(caption.token_ids) <= 2
                assert set(caption.token_ids) <= {255, 256, 257, 258}
    captioner.caption(pictures[0], preset="greedy", streamer=Heard())


def test_inference_mode_changes_nothing(captioner, pictures):
    how = {"preset": "greedy", "max_new_tokens": 40}
    with torch.inference_mode():
        inside, traced = captioner.caption(pictures[0], **how), trace(captioner, pictures[0])
        assert all(word_maps(traced, method) for method in METHODS)
    assert inside == captioner.caption(pictures[0], **how)


def test_nothing_to_caption(captioner, tmp_path, output):
    with pytest.raises(ValueError, match="images is empty"):
        captioner.caption([])
    with pytest.raises(ValueError, match=r"no picture in .*recursive=True"):
        captioner.caption_folder(tmp_path, output)
    with pytest.raises(ValueError, match="empty list"):
        captioner.caption_folder([], output)
    assert not output.exists()


def test_folder_records_failures_and_retries_them(captioner, folder, pictures, output):
    with pytest.raises(ImageError, match=r"2\.png is truncated"):
        captioner.caption([folder / "1.png", folder / "2.png"])
    report = captioner.caption_folder(folder, output, batch_size=2, max_new_tokens=4)
    assert counts(report) == (4, 0, 1)
    records = read(output)
    assert [record["source"] for record in records] == [str(folder / f"{i}.png") for i in range(5)]
    assert "2.png" in records[2]["error"]
    pictures[2].save(folder / "2.png")
    assert counts(captioner.caption_folder(folder, output, max_new_tokens=4)) == (1, 4, 0)
    assert all("caption" in record for record in read(output))


def test_a_resumed_folder_equals_an_uninterrupted_one(captioner, folder, tmp_path):
    complete, torn, fewer = (tmp_path / f"{name}.jsonl" for name in ("complete", "torn", "fewer"))
    captioner.caption_folder(folder, complete, batch_size=2, **SAMPLED)
    interrupted = Interrupted(captioner.model, captioner.processor)
    with pytest.raises(KeyboardInterrupt):
        interrupted.caption_folder(folder, torn, batch_size=2, **SAMPLED)
    assert len(read(torn)) == 2
    with open(torn, "a") as file:
        file.write('{"source": "torn')
    report = captioner.caption_folder(folder, torn, batch_size=3, **SAMPLED)
    assert report.skipped == 2
    assert torn.read_bytes() == complete.read_bytes()
    (folder / "0.png").unlink()  # other images change no draw
    captioner.caption_folder(folder, fewer, **SAMPLED)
    assert read(complete)[1:] == read(fewer)


def test_files_of_other_settings_are_refused(captioner, folder, output):
    captioner.caption_folder(folder, output, **SAMPLED)
    for changed in ({"temperature": 0.5}, {"seed": 3}, {"preprocessing": "clip"}):
        with pytest.raises(ValueError, match=rf"{next(iter(changed))} was"):
            captioner.caption_folder(folder, output, **{**SAMPLED, **changed})


def test_changed_images_are_captioned_again_and_other_weights_refused(captioner, folder, output):
    captioner.caption_folder(folder, output, **GREEDY)
    before = read(output)
    shutil.copy(folder / "3.png", folder / "0.png")
    assert counts(captioner.caption_folder(folder, output, **GREEDY)) == (1, 3, 1)
    records = {Path(record["source"]).name: record for record in read(output)}
    assert len(records) == len(before) == len(read(output))
    assert records["0.png"]["image"] != before[0]["image"]
    assert records["0.png"]["caption"] == captioner.caption(folder / "3.png", **GREEDY).text
    assert records["1.png"] == before[1]
    other = copy.deepcopy(captioner.model)
    with torch.no_grad():
        other.decoder.bridge.scale += 1e-3
    with pytest.raises(ValueError, match=r"weights was '\w+', now '\w+'"):
        Captioner(other, captioner.processor).caption_folder(folder, output, **GREEDY)


def test_several_captions_in_one_record(captioner, folder, output):
    (folder / "deep").mkdir()
    (folder / "0.png").rename(folder / "deep" / "0.PNG")
    search = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    captioner.caption_folder(folder, output, recursive=True, **search)
    first, *_, last = read(output)
    assert first["caption"] == first["captions"][0]
    assert len(first["scores"]) == 2
    assert last["source"].endswith("0.PNG")


WORKER = """
import os, signal, sys
from test_captioning import SAMPLED, Interrupted, counts, tiny_captioner

class Dying(Interrupted):
    def stop(self):
        if os.environ["RANK"] == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)

tiny = tiny_captioner()
captioner = Dying(tiny.model, tiny.processor)
report = captioner.caption_folder(sys.argv[1], sys.argv[2], batch_size=2, **SAMPLED)
os.write(1, f"{counts(report)}\\n".encode())  # in one write: both processes share the pipe
"""


def test_processes_share_a_folder_and_resume_after_a_kill(captioner, pictures, tmp_path):
    """Two processes of `accelerate launch`: refused, one of them killed, and started again."""
    folder, output = tmp_path / "pictures", tmp_path / "shared.jsonl"
    folder.mkdir()
    for i in range(12):
        pictures[i % 5].rotate(i).save(folder / f"{i:02}.png")
    (folder / "07.png").write_text("no picture")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--main_process_port=0", worker, folder, output]
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    how = {"env": env, "capture_output": True, "text": True}

    with locked(output):
        refused = subprocess.run([*launch, "none"], **how)
    assert refused.returncode != 0
    assert "another command is writing to" in refused.stderr
    assert not list(tmp_path.glob("shared.jsonl*"))
    assert subprocess.run([*launch, "1"], **how).returncode != 0
    assert 2 <= sum(len(read(part)) for part in tmp_path.glob("shared.jsonl*")) < 12
    again = subprocess.run([*launch, "none"], **how)
    assert again.returncode == 0, again.stderr
    alone = tmp_path / "alone.jsonl"
    captioner.caption_folder(folder, alone, batch_size=2, **SAMPLED)
    assert sorted(read(output), key=str) == sorted(read(alone), key=str)
    assert again.stdout.splitlines()[0] == again.stdout.splitlines()[1]
    assert [path.name for path in tmp_path.glob("shared.jsonl*")] == ["shared.jsonl"]


def test_a_folder_is_streamed(captioner, folder, output):
    asked = []

    def paths():
        for name in ("0.png", "1.png", "0.png", "3.png", "4.png"):
            asked.append(len(read(output)))
            yield folder / name

    report = captioner.caption_folder(paths(), output, batch_size=1, max_new_tokens=3)
    assert counts(report) == (4, 1, 0)  # each path once
    assert asked[-1] > 0  # there were records before the last path was asked for


def test_a_replaced_model_captions(captioner, pictures):
    other = copy.deepcopy(captioner)
    first = ids(captioner.caption(pictures, **GREEDY))
    assert ids(other.caption(pictures, **GREEDY)) == first
    torch.manual_seed(1)
    other.model = QVisionForConditionalGeneration(captioner.model.config)
    expected = ids(Captioner(other.model, captioner.processor).caption(pictures, **GREEDY))
    assert ids(other.caption(pictures, **GREEDY)) == expected != first


def test_a_compiled_captioner_gives_the_same_captions(captioner, pictures):
    with torch.compiler.set_stance("force_eager"):
        compiled = captioner.compile(batch_size=2)
        assert compiled.decoding.compile_seconds > 0
        for settings in (GREEDY, SAMPLED):
            found = compiled.caption(pictures, batch_size=2, **settings)  # the last batch has one
            assert ids(found) == ids(captioner.caption(pictures, **settings))


@pytest.fixture
def reader(captioner) -> Reader:
    return Reader(captioner.processor, "training", torch.device("cpu"))


@pytest.fixture
def items(tmp_path) -> list[Item]:
    """75 image files, some of them damaged: more than a process reads at a time."""
    paths = [tmp_path / f"{i}.png" for i in range(75)]
    for path, picture in zip(paths, random_images(75, 30, 20), strict=True):
        picture.save(path)
    for i in (0, 31, 32, 74):
        os.truncate(paths[i], 100)
    return [Item(path, str(path), path.name) for path in paths]


@pytest.mark.parametrize("batch_size", [7, 32, 50, 100])
def test_processes_and_threads_read_the_same(reader, items, batch_size):
    by_threads, by_processes = (
        [
            ([(item, str(error)) for item, error in batch.items], batch.pixels.tolist())
            for batch in read_batches(iter(items), reader, batch_size, workers)
        ]
        for workers in (0, 2)
    )
    assert by_processes == by_threads
    assert [item for pairs, _ in by_threads for item, _ in pairs] == items
    assert [len(pairs) for pairs, _ in by_threads[:-1]] == [batch_size] * (75 // batch_size)


def test_a_process_returns_the_error_of_an_image(reader, items):
    (batch,) = read_batches(items[:3], reader, 3, workers=1)
    (first, error), *others = batch.items
    assert isinstance(error, ImageError)
    assert first.source in str(error)
    assert others == [(item, None) for item in items[1:3]]
    assert batch.pixels.shape == (2, 32, 32, 3)
    start, rest = batch.split(2)
    assert start.pixels.equal(batch.pixels[:1])
    assert Batch.join([start, rest]).pixels.equal(batch.pixels)
    (damaged,) = read_batches(items[:1], reader, 3, workers=1)
    assert damaged.pixels.shape == (0, 32, 32, 3)
    for workers in (0, 1):
        assert list(read_batches([], reader, 4, workers)) == []
