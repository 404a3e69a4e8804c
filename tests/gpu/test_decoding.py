"""Captions on a GPU: captured graphs equal the plain loop, `generate` and a CPU."""

import copy
import json
import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_cached_attention import compare_kernel
from test_captioning import GREEDY, counts, ids
from test_original import check_likeliest_words
from torch.testing import assert_close

import qvision_lab as ql
from qvision_lab import scenes
from qvision_lab.captioning import Caption, Captioner, cached_attention, compiled, reading
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.decoding_step import Buffers
from qvision_lab.captioning.sampling import random_integers
from qvision_lab.evaluation.bootstrap import paired_difference
from qvision_lab.interpretation.interventions import mute
from qvision_lab.interpretation.maps import METHODS, word_maps
from qvision_lab.interpretation.trace import trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.loading.checkpoint import Checkpoint, save_checkpoint
from qvision_lab.training.train import reinitialise

pytestmark = pytest.mark.filterwarnings("error:CUDA captured no")

SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}


class Uncaptured(FastDecoding):
    """The kernels of the graphs, launched one by one."""

    def _captured(self, key, function, buffers=None):
        return function


class Plain(FastDecoding):
    """The loop as a CPU runs it: without joined matrices, padded batches and graphs."""

    def _forget(self):
        super()._forget()
        self._captures = False


def uncaptured(captioner: Captioner, decoding: type[FastDecoding] = FastDecoding) -> Captioner:
    """A captioner of the same model that has captured nothing yet."""
    other = Captioner(captioner.model, captioner.processor)
    other.decoding = decoding(captioner.model)
    return other


def copied(captioner: Captioner) -> Captioner:
    return Captioner(copy.deepcopy(captioner.model), captioner.processor)


def share_equal(found: list, expected: list) -> float:
    return np.mean([one == other for one, other in zip(found, expected, strict=True)]).item()


def is_captured(captioner: Captioner) -> bool:
    graphs = [getattr(run, "__self__", None) for run in captioner.decoding._graphs.values()]
    return bool(graphs) and all(isinstance(graph, torch.cuda.CUDAGraph) for graph in graphs)


@pytest.fixture(scope="module")
def drawn() -> list[scenes.Scene]:
    return list(scenes.generate(500, split="test"))


@pytest.fixture(scope="module")
def pictures(drawn) -> list:
    return [scene.image for scene in drawn]


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """The embedded checkpoint in float32; no test changes its weights."""
    return ql.load(device="cuda")


@pytest.fixture(scope="module")
def halved() -> Captioner:
    return ql.load(device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def on_cpu():
    before = torch.get_num_threads()
    torch.set_num_threads(min(8, os.cpu_count()))
    yield ql.load(device="cpu")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def captions(captioner, pictures) -> list[Caption]:
    """Greedy ones in float32."""
    found = captioner.caption(pictures, **GREEDY)
    assert is_captured(captioner)
    return found


@pytest.fixture(scope="module")
def greedy(captions) -> list[tuple[int, ...]]:
    return ids(captions)


@pytest.mark.parametrize("output_attentions", [True, False], ids=["open", "fused"])
def test_forward_equals_the_original(reference, output_attentions):
    model, expected, _ = reference
    words = expected["input_ids"] != model.config.pad_token_id
    batch = {name: expected[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        output = model(**batch, attention_mask=words.long(), output_attentions=output_attentions)
    close = {"atol": 1e-4, "rtol": 0}
    assert_close(output.image_tokens, expected["image_features"], **close)
    assert_close(output.visual_tokens, expected["visual_tokens"], **close)
    assert_close(output.logits[words], expected["logits"][words], **close)


def test_greedy_generations_are_the_originals(reference):
    model, expected, facts = reference
    for case in check_likeliest_words(model, expected, facts):
        settings, image = dict(case["settings"]), expected["pixel_values"][[case["image"]]]
        how = {"do_sample": True, "max_new_tokens": settings.pop("max_len"), **settings}
        assert model.generate(pixel_values=image, **how)[0].tolist() == case["ids"]


@pytest.mark.parametrize("beams", [1, 3])
def test_captured_captions_are_those_of_the_loop_and_of_generate(captioner, pictures, beams):
    some, how = pictures[:200], {**GREEDY, "num_beams": beams}
    expected = ids(captioner.caption(some, **how))
    for decoding in (Uncaptured, Plain):
        assert ids(uncaptured(captioner, decoding).caption(some, **how)) == expected
    generate = captioner.model.generate
    with patch.object(captioner.model, "generate", wraps=generate) as called:
        assert ids(captioner.caption(some, **how)) == expected
        called.assert_not_called()
        settings = {**how, "logits_processor": [], "batch_size": 200}
        assert ids(captioner.caption(some, **settings)) == expected
        called.assert_called_once()


def test_captions_are_a_cpus(captions, on_cpu, pictures):
    here = on_cpu.caption(pictures[:200], batch_size=100, **GREEDY)
    assert share_equal(ids(captions[:200]), ids(here)) >= 0.995
    for one, other in zip(captions, here, strict=False):
        if one.token_ids == other.token_ids:
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)


def test_bfloat16_captions_are_those_of_the_loop(halved, pictures):
    """The same kernels give the same; others round differently, and near-ties fall otherwise."""
    how = {**GREEDY, "batch_size": 40}
    expected = ids(halved.caption(pictures[:200], **how))
    assert is_captured(halved)
    others = (
        uncaptured(halved, Uncaptured),
        uncaptured(halved, Plain),
        halved.compile(batch_size=40),
    )
    shares = [share_equal(ids(each.caption(pictures[:200], **how)), expected) for each in others]
    print("bfloat16, captions equal to the captured ones (uncaptured, plain, compiled):", shares)
    assert shares[0] >= 0.9
    assert min(shares) >= 0.75


def test_captions_in_bfloat16_are_as_true(halved, captions, drawn, pictures):
    rounded = halved.caption(pictures, **GREEDY)
    single, half = (
        np.array([[scenes.check(c.text, s).true] for c, s in zip(found, drawn, strict=True)], float)
        for found in (captions, rounded)
    )
    difference, interval, p_value = paired_difference(half, single, lambda hits: hits / len(drawn))
    print(
        f"true captions of {len(drawn)}: float32 {single.mean():.1%}, bfloat16 {half.mean():.1%}, "
        f"difference {difference[0]:+.2%} ({interval[0, 0]:+.2%} to {interval[1, 0]:+.2%}), "
        f"p = {p_value[0]:.2f}"
    )
    assert single.mean() > 0.9
    assert abs(difference[0]) <= 0.02


@pytest.mark.parametrize("settings", [SAMPLED, {"preset": "published"}], ids=["sampled", "preset"])
def test_a_seed_gives_a_cpus_captions(captioner, on_cpu, pictures, settings):
    there = captioner.caption(pictures, seed=4, **settings)
    here = on_cpu.caption(pictures, seed=4, batch_size=100, **settings)
    assert len({caption.text for caption in there}) > 200
    pairs = list(enumerate(zip(there, here, strict=True)))
    others = [(i, a.text, b.text) for i, (a, b) in pairs if a.token_ids != b.token_ids]
    for i, one, other in others:  # two words that were nearly as likely
        print(f"scene {i}: on CUDA {one!r}, on the CPU {other!r}")
    assert len(others) <= 0.005 * len(pictures)
    by_library = captioner.caption(pictures[:100], seed=4, logits_processor=[], **settings)
    assert share_equal(ids(by_library), ids(there[:100])) >= 0.99


def test_random_integers_are_a_cpus():
    draw = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 2**32, (50, 2), generator=draw)
    for words in (torch.arange(50_259)[None], torch.randint(0, 50_259, (50, 40), generator=draw)):
        for step in (1, 2, 29, 2047):
            there = random_integers(keys.cuda(), torch.tensor([step]).cuda(), words.cuda())
            assert there.cpu().equal(random_integers(keys, step, words))


def test_batch_sizes_in_turn_change_nothing(captioner, pictures, greedy):
    """Sizes that come back, that are padded to others, and more than are kept."""
    other, some = uncaptured(captioner), pictures[:70]
    for batch_size in (7, 32, 7, 100, 30, 3, 1, 7):
        assert ids(other.caption(some, batch_size=batch_size, **GREEDY)) == greedy[:70], batch_size
    assert is_captured(other)
    assert len(other.decoding._buffers) <= compiled.CAPTURED
    several = {**SAMPLED, "num_return_sequences": 3}
    expected = other.caption(some, batch_size=70, **several)
    for batch_size in (7, 32):
        found = other.caption(some, batch_size=batch_size, **several)
        assert share_equal([*map(ids, found)], [*map(ids, expected)]) >= 0.98


def test_more_settings_than_graphs_are_kept(captioner, pictures, monkeypatch):
    monkeypatch.setattr(compiled, "GRAPHS", 3)
    other, plain = uncaptured(captioner), uncaptured(captioner, Plain)
    for penalty in (1.0, 1.2, 1.4, 1.6, 1.8, 1.0, 1.4):
        settings = {**GREEDY, "repetition_penalty": penalty}
        found = other.caption(pictures[:20], **settings)
        assert ids(found) == ids(plain.caption(pictures[:20], **settings)), penalty
        assert is_captured(other)
        assert len(other.decoding._graphs) <= 3


def test_captions_end_at_once_or_never(captioner, pictures):
    end, other = captioner.model.config.end_token_id, copied(captioner)
    decoder = other.model.decoder
    with torch.no_grad():  # <END> is the only word that the bridge's output points to
        direction = torch.nn.functional.normalize(decoder.lm_head.weight[end], dim=0)
        decoder.lm_head.weight[end] = 10 * direction
        decoder.bridge.ffn[3].bias += 1000 * direction
    for caption in other.caption(pictures[:20], **GREEDY):
        assert caption.token_ids == (end,)
        assert len(caption.logprobs) == 1
        assert caption.text == ""
    for length in (1, 10, 33):
        endless = {**GREEDY, "min_length": 40, "max_new_tokens": length}
        found = captioner.caption(pictures[:20], **endless)
        assert {len(caption.token_ids) for caption in found} == {length}
        assert end not in {token for caption in found for token in caption.token_ids}
        assert ids(found) == ids(uncaptured(captioner, Plain).caption(pictures[:20], **endless))


@pytest.mark.parametrize("where", ["allocating", "capturing"])
def test_out_of_memory_halves_a_batch(captioner, pictures, greedy, monkeypatch, where):
    most, allocate, choose = [8], Buffers.allocate, FastDecoding._choose

    def check(rows: int) -> None:
        if rows > most[0]:
            raise torch.OutOfMemoryError(f"{rows} rows")

    def allocates(model, rows, *sizes):
        check(rows)
        return allocate(model, rows, *sizes)

    def chooses(self, buffers, *how):
        choose(self, buffers, *how)
        if torch.cuda.is_current_stream_capturing():
            check(len(buffers.ids))

    if where == "allocating":
        monkeypatch.setattr(Buffers, "allocate", staticmethod(allocates))
    else:
        monkeypatch.setattr(FastDecoding, "_choose", chooses)
    other = uncaptured(captioner)
    with pytest.warns(UserWarning, match="need more memory") as warned:
        found = other.caption(pictures[:40], batch_size=32, **GREEDY)
    assert ids(found) == greedy[:40]
    assert is_captured(other)
    messages = [str(each.message) for each in warned if "more memory" in str(each.message)]
    assert [message.rpartition("=")[2] for message in messages] == ["16.", "8."]
    most[0], other = 0, uncaptured(captioner)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        other.caption(pictures[0], **GREEDY)
    monkeypatch.undo()
    assert ids(other.caption(pictures[:40], **GREEDY)) == greedy[:40]
    assert is_captured(other)


def test_where_nothing_can_be_captured_captions_are_the_same(
    captioner, pictures, greedy, monkeypatch
):
    def fails(*args, **how):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    other = uncaptured(captioner)
    with pytest.warns(UserWarning, match="CUDA captured no graph") as warned:
        found = other.caption(pictures[:40], batch_size=20, **GREEDY)
    assert ids(found) == greedy[:40]
    assert not is_captured(other)
    (message,) = [str(each.message) for each in warned if "captured" in str(each.message)]
    assert "(no graphs here); captions are made without, more slowly." in message
    assert ids(other.caption(pictures[:20], **GREEDY)) == greedy[:20]  # without another warning


def test_interventions_and_maps_next_to_captured_graphs(captioner, on_cpu, pictures, greedy):
    parts = {"queries": range(0, 24, 2), "heads": [(0, 1)], "bridge_heads": [3]}
    some, muted = pictures[:20], []
    for each in (captioner, on_cpu):
        with mute(each.model, **parts):
            muted.append(ids(each.caption(some, **GREEDY)))
    assert muted[0] == muted[1] != greedy[:20]
    assert ids(captioner.caption(some, **GREEDY)) == greedy[:20]
    there, here = (trace(each, pictures[2]) for each in (captioner, on_cpu))
    assert there.caption == here.caption
    np.testing.assert_allclose(there.bridge_attentions, here.bridge_attentions, atol=1e-4)
    for method in METHODS:
        found, expected = (
            np.stack([word.values for word in word_maps(traced, method)])
            for traced in (there, here)
        )
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found / largest, expected / largest, atol=1e-2, err_msg=method)
    assert ids(captioner.caption(some, **GREEDY)) == greedy[:20]
    assert is_captured(captioner)


def test_graphs_read_weights_that_change(captioner, pictures, greedy):
    other, some = copied(captioner), pictures[:40]
    model, decoding = other.model, other.decoding
    first = {name: value.clone() for name, value in model.state_dict().items()}

    def add_noise() -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))

    assert ids(other.caption(some, **GREEDY)) == greedy[:40]
    graphs = dict(decoding._graphs)
    for change in (
        add_noise,
        lambda: model.load_state_dict(first),
        lambda: reinitialise(model, ("decoder.bridge", "decoder.language_model"), seed=0),
        lambda: model.load_state_dict(first),
    ):
        change()
        found = ids(other.caption(some, **GREEDY))
        assert found == ids(copied(other).caption(some, **GREEDY))
        restored = all(value.equal(first[name]) for name, value in model.state_dict().items())
        assert (found == greedy[:40]) == restored
        assert decoding._graphs == graphs  # the very ones
    model.to(torch.bfloat16)  # elsewhere in memory
    found = ids(other.caption(some, **GREEDY))
    assert share_equal(found, ids(copied(other).caption(some, **GREEDY))) >= 0.9
    assert is_captured(other)
    assert not set(decoding._graphs.values()) & set(graphs.values())


def test_a_model_is_saved_as_it_was_before_capture(captioner, pictures, tmp_path):
    origin, other = captioner.provenance, copied(captioner)
    checkpoint = Checkpoint(other.model, other.processor, origin)
    save_checkpoint(checkpoint, tmp_path / "before")
    other.caption(pictures[:8], **GREEDY)
    assert is_captured(other)
    save_checkpoint(checkpoint, tmp_path / "behind")
    other.model.save_pretrained(tmp_path / "plain")
    names = ("before", "behind", "plain")
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in names}
    assert sizes["before"] == sizes["behind"] == sizes["plain"]
    expected = captioner.model.state_dict()
    for model in (
        ql.load(tmp_path / "behind", device="cuda").model,
        QVisionForConditionalGeneration.from_pretrained(tmp_path / "plain").to("cuda"),
    ):
        for name, value in model.state_dict().items():
            assert value.equal(expected[name]), name
    assert ids(other.caption(pictures[:8], **GREEDY)) == ids(
        ql.load(tmp_path / "behind").caption(pictures[:8], **GREEDY)
    )


def test_the_kernel_equals_pytorch():
    assert cached_attention.triton is not None
    sizes = [(1, 1, 4, 1, 1), (7, 6, 32, 32, 32), (3, 4, 24, 48, 5)]
    sizes += [(5, 16, 64, 32, 256), (2, 2, 128, 128, 100)]
    compare_kernel(sizes, (torch.float32, torch.bfloat16), "cuda", tolerance=5e-5)


def test_compiled_captions_are_the_same(captioner, pictures, greedy):
    quick = captioner.compile(batch_size=4)
    assert quick.decoding.compile_seconds > 0
    found = quick.caption(pictures[:100], batch_size=4, **GREEDY)
    assert is_captured(quick)
    assert share_equal(ids(found), greedy[:100]) >= 0.99
    with pytest.raises(ValueError, match="int8=True gains nothing on cuda"):
        captioner.compile(int8=True)


def test_processes_read_a_folder_as_threads_do(captioner, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures[:40]):
        picture.save(folder / f"{i:02}.jpg")
    damaged = folder / "33.jpg"
    damaged.write_bytes(damaged.read_bytes()[:500])
    other, how = uncaptured(captioner), {"batch_size": 16, **GREEDY}
    assert counts(other.caption_folder(folder, tmp_path / "threads.jsonl", **how)) == (39, 0, 1)
    monkeypatch.setattr(reading, "MANY", 1)
    assert reading.count_workers(other.model.device, 40, 1) > 0
    assert counts(other.caption_folder(folder, tmp_path / "processes.jsonl", **how)) == (39, 0, 1)
    complete = (tmp_path / "processes.jsonl").read_text()
    assert complete == (tmp_path / "threads.jsonl").read_text()
    torn = tmp_path / "torn.jsonl"
    torn.write_text("".join(complete.splitlines(keepends=True)[:10]))
    assert counts(other.caption_folder(folder, torn, **how)) == (29, 10, 1)
    without_scores = [  # their last digits may differ
        [{**json.loads(line), "score": None} for line in text.splitlines()]
        for text in (torn.read_text(), complete)
    ]
    assert without_scores[0] == without_scores[1]
