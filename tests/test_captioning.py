"""The Captioner: the same captions however they are asked for, and records that survive."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, StoppingCriteria

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import ImageError
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import QVisionProcessor

SPECIAL_TOKENS = {"pad_token": "<PAD>", "bos_token": "<START>", "eos_token": "<END>"}
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95, "max_new_tokens": 8}


def tiny_captioner() -> Captioner:
    """Random weights, and a tokenizer that can spell anything."""
    bpe = ByteLevelBPETokenizer()
    sentences = [f" a {color} {thing} " for color in ("red", "blue") for thing in ("car", "dog")]
    bpe.train_from_iterator(
        sentences, vocab_size=280, special_tokens=[*SPECIAL_TOKENS.values()], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **SPECIAL_TOKENS)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {"hidden_size": 16, "num_layers": 1, "attention_types": [[["global"], 1]]}
    config = QVisionConfig(
        vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        text_config={**text, "num_heads": 2, "vocab_size": len(tokenizer)},
        num_query_tokens=3,
        num_attention_heads=2,
        start_token_id=tokenizer.bos_token_id,
        end_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = QVisionForConditionalGeneration(config)
    for parameter in model.parameters():  # larger than usual, so that pictures make a difference
        torch.nn.init.normal_(parameter, std=0.3)
    return Captioner(model, QVisionProcessor.from_config(config, tokenizer))


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return tiny_captioner()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(5)]


@pytest.fixture
def folder(tmp_path, pictures):
    """Five pictures, the third one damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no picture")
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(captions):
    return [caption.token_ids for caption in captions]


@pytest.mark.parametrize("settings", [{"preset": "greedy"}, SAMPLED, {"num_beams": 3}])
def test_batches_change_nothing(captioner, pictures, settings):
    one_by_one = captioner.caption(pictures, batch_size=1, **settings)
    in_batches = captioner.caption(iter(pictures), batch_size=3, **settings)
    assert ids(one_by_one) == ids(in_batches)
    assert len(set(ids(one_by_one))) > 1
    assert captioner.caption(pictures[0], **settings).token_ids == one_by_one[0].token_ids
    for one, other in zip(one_by_one, in_batches, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_seed_and_place_decide_what_is_drawn(captioner, pictures):
    same_picture = [pictures[0]] * 2
    before = torch.random.get_rng_state()
    captions = captioner.caption(same_picture, seed=1, num_return_sequences=3, **SAMPLED)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len({caption.token_ids for several in captions for caption in several}) == 6
    assert captioner.caption(same_picture, seed=1, num_return_sequences=3, **SAMPLED) == captions
    assert captioner.caption(pictures[0], seed=2, **SAMPLED).token_ids != captions[0][0].token_ids


@pytest.mark.parametrize("settings", [{"preset": "greedy"}, SAMPLED, {"preset": "beam"}])
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


def test_caption_ends_with_its_end_token(captioner, pictures):
    end = captioner.model.config.end_token_id
    finished = captioner.caption(pictures, preset="greedy", forced_eos_token_id=end)
    assert all(caption.token_ids.count(end) == 1 for caption in finished)
    assert all(caption.token_ids[-1] == end for caption in finished)
    assert not any("<" in caption.text for caption in finished)


def test_generates_as_generate_does(captioner, pictures):
    class ThreeTokens(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 4)

    stopped = captioner.caption(pictures[0], preset="greedy", stopping_criteria=[ThreeTokens()])
    assert len(stopped.token_ids) <= 3
    pixel_values = captioner.processor(images=pictures[:1])["pixel_values"]
    plain = captioner.model.generate(
        pixel_values=pixel_values,
        do_sample=False,
        max_new_tokens=30,
        min_length=0,
        repetition_penalty=1.0,
    )
    greedy = captioner.caption(pictures[0], preset="greedy")  # not the model's own penalty
    assert list(greedy.token_ids) == plain[0, 1 : len(greedy.token_ids) + 1].tolist()


def test_one_setting_chooses_the_search(captioner, pictures):
    for setting in ({"temperature": 0.5}, {"typical_p": 0.5}, {"eta_cutoff": 0.1}, {"top_h": 0.4}):
        sampled = captioner.caption(pictures[0], preset="greedy", **setting)
        assert sampled.settings.items() >= {"do_sample": True, **setting}.items()
        assert sampled.seed == 0
    beams = captioner.caption(pictures[0], num_beams=3, num_return_sequences=3)
    assert len(beams) == 3
    assert beams[0].seed is None
    assert "temperature" not in beams[0].settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperatur": 0.5}, "temperatur"),
        ({"temperature": 0.0}, "0.0"),
        ({"typical_p": 1.5}, "1.5"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams=2"),
        ({"preset": "best"}, "best"),
        ({"preprocessing": "square"}, "square"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"preset": "greedy", "num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_bad_settings_are_named(captioner, pictures, settings, named):
    with pytest.raises(ValueError, match=named):
        captioner.caption(pictures[0], **settings)


def test_nothing_to_caption(captioner, tmp_path):
    with pytest.raises(ValueError, match="images is empty"):
        captioner.caption([])
    with pytest.raises(ValueError, match=r"no picture in .*recursive=True"):
        captioner.caption_folder(tmp_path, tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match="empty list"):
        captioner.caption_folder([], tmp_path / "captions.jsonl")
    assert not (tmp_path / "captions.jsonl").exists()


def test_unreadable_picture_is_named(captioner, folder):
    with pytest.raises(ImageError, match=r"2\.png is truncated"):
        captioner.caption([folder / "1.png", folder / "2.png"])


def test_folder_reports_what_failed_and_retries_it(captioner, folder, pictures, tmp_path):
    output = tmp_path / "captions.jsonl"
    report = captioner.caption_folder(folder, output, batch_size=2, max_new_tokens=4)
    assert (report.captioned, report.skipped, report.failed) == (4, 0, 1)
    records = read(output)
    assert [record["source"] for record in records] == [str(folder / f"{i}.png") for i in range(5)]
    assert "2.png" in records[2]["error"]
    pictures[2].save(folder / "2.png")
    report = captioner.caption_folder(folder, output, max_new_tokens=4)
    assert (report.captioned, report.skipped, report.failed) == (1, 4, 0)
    assert all("caption" in record for record in read(output))


def test_interrupted_folder_goes_on_as_if_nothing_had_been(captioner, folder, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    captioner.caption_folder(folder, whole, batch_size=2, **SAMPLED)

    class Broken(Captioner):
        batches = 0

        def _caption_batch(self, *arguments):
            self.batches += 1
            if self.batches == 2:
                raise KeyboardInterrupt
            return super()._caption_batch(*arguments)

    broken = Broken(captioner.model, captioner.processor)
    with pytest.raises(KeyboardInterrupt):
        broken.caption_folder(folder, torn, batch_size=2, **SAMPLED)
    assert len(read(torn)) == 2
    with open(torn, "a") as file:
        file.write('{"source": "torn')
    report = captioner.caption_folder(folder, torn, batch_size=3, **SAMPLED)
    assert report.skipped == 2
    assert torn.read_bytes() == whole.read_bytes()


def test_other_pictures_change_no_draw(captioner, folder, tmp_path):
    captioner.caption_folder(folder, tmp_path / "all.jsonl", **SAMPLED)
    (folder / "0.png").unlink()
    captioner.caption_folder(folder, tmp_path / "fewer.jsonl", **SAMPLED)
    assert read(tmp_path / "all.jsonl")[1:] == read(tmp_path / "fewer.jsonl")


def test_other_settings_are_refused(captioner, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    captioner.caption_folder(folder, output, **SAMPLED)
    for changed in ({"temperature": 0.5}, {"seed": 3}, {"preprocessing": "clip"}):
        with pytest.raises(ValueError, match=rf"{next(iter(changed))} was"):
            captioner.caption_folder(folder, output, **{**SAMPLED, **changed})
    output.write_text("to do: captions\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no caption record"):
        captioner.caption_folder(folder, output, **SAMPLED)


def test_several_captions_a_picture_in_one_record(captioner, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    (folder / "deep").mkdir()
    (folder / "0.png").rename(folder / "deep" / "0.PNG")
    captioner.caption_folder(
        folder, output, recursive=True, num_beams=2, num_return_sequences=2, max_new_tokens=4
    )
    first, *_, last = read(output)
    assert first["caption"] == first["captions"][0]
    assert len(first["scores"]) == 2
    assert last["source"].endswith("0.PNG")


WORKER = """
import os, signal, sys
from test_captioning import SAMPLED, tiny_captioner
from qvision_lab.captioning import Captioner

class Dying(Captioner):
    batches = 0

    def _caption_batch(self, *arguments):
        self.batches += 1
        if self.batches == 2 and os.environ["RANK"] == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._caption_batch(*arguments)

tiny = tiny_captioner()
captioner = Dying(tiny.model, tiny.processor)
report = captioner.caption_folder(sys.argv[1], sys.argv[2], batch_size=2, **SAMPLED)
line = f"{report.captioned}+{report.skipped}+{report.failed}\\n"
os.write(1, line.encode())  # at once: both processes write to one pipe
"""


def test_processes_share_a_folder_and_outlive_a_kill(captioner, pictures, tmp_path):
    """Two processes of `accelerate launch`, one of them killed and the job started again."""
    folder, output = tmp_path / "pictures", tmp_path / "shared.jsonl"
    folder.mkdir()
    for i in range(12):
        pictures[i % 5].rotate(i).save(folder / f"{i:02}.png")
    (folder / "07.png").write_text("no picture")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
    ]
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}

    def run(dying: str) -> subprocess.CompletedProcess:
        words = ["--main_process_port=0", worker, folder, output, dying]
        return subprocess.run([*launch, *words], env=env, capture_output=True, text=True)

    killed = run(dying="1")
    assert killed.returncode != 0
    assert 2 <= sum(len(read(part)) for part in tmp_path.glob("shared.jsonl*")) < 12
    again = run(dying="none")
    assert again.returncode == 0, again.stderr
    alone = tmp_path / "alone.jsonl"
    captioner.caption_folder(folder, alone, batch_size=2, **SAMPLED)
    assert sorted(read(output), key=str) == sorted(read(alone), key=str)
    assert again.stdout.splitlines()[0] == again.stdout.splitlines()[1]
    assert [path.name for path in tmp_path.glob("shared.jsonl*")] == ["shared.jsonl"]


def test_a_folder_is_streamed(captioner, folder, tmp_path):
    output, asked = tmp_path / "captions.jsonl", []

    def paths():
        for name in ("0.png", "1.png", "0.png", "3.png", "4.png"):
            asked.append(len(read(output)))
            yield folder / name

    report = captioner.caption_folder(paths(), output, batch_size=1, max_new_tokens=3)
    assert (report.captioned, report.skipped) == (4, 1)  # each path once
    assert asked[-1] > 0  # there were records before the last path was asked for


def test_foreign_files_are_left_alone(captioner, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    output.write_text("a line that does not end")
    with pytest.raises(ValueError, match=r"line 1 of .* is no caption record"):
        captioner.caption_folder(folder, output)
    assert output.read_text() == "a line that does not end"


def test_another_model_is_the_one_that_captions(captioner, pictures):
    other = copy.deepcopy(captioner)
    assert ids(other.caption(pictures, preset="greedy")) == ids(
        captioner.caption(pictures, preset="greedy")
    )
    torch.manual_seed(1)
    other.model = QVisionForConditionalGeneration(captioner.model.config)
    expected = Captioner(other.model, captioner.processor).caption(pictures, preset="greedy")
    assert ids(other.caption(pictures, preset="greedy")) == ids(expected)
    assert ids(expected) != ids(captioner.caption(pictures, preset="greedy"))


def test_a_compiled_captioner_says_the_same(captioner, pictures):
    with torch.compiler.set_stance("force_eager"):
        compiled = captioner.compile(batch_size=2)
        assert compiled.decoding.compile_seconds > 0
        for settings in ({"preset": "greedy"}, SAMPLED):
            said = compiled.caption(pictures, batch_size=2, **settings)  # the last batch has one
            assert ids(said) == ids(captioner.caption(pictures, **settings))
