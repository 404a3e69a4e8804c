"""The explorer without a browser: what is answered, what is drawn, and what the controls do."""

import base64
import io
import re
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab import scenes
from qvision_lab.captioning import Captioner, load
from qvision_lab.interpretation.interventions import effect, mute
from qvision_lab.widgets import Bench, Explorer, Question, Shown, draw, explore, tell

GREEDY = (("preset", "greedy"),)


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return load()


@pytest.fixture(scope="module")
def bench(captioner) -> Bench:
    return Bench(captioner)


@pytest.fixture(scope="module")
def question() -> Question:
    return Question(Shown("a scene", scenes.scene("test", 0, 1).image), GREEDY)


@pytest.fixture
def explorer(captioner):
    explorer = explore(captioner)
    explorer.pending.result()
    yield explorer
    explorer.close()


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def drawn(html: str) -> np.ndarray:
    return pixels(base64.b64decode(re.search(r'base64,([^"]+)', html)[1]))


def upload(explorer: Explorer, name: str, content: bytes) -> None:
    file = {
        "name": name,
        "type": "",
        "size": len(content),
        "last_modified": datetime.now(timezone.utc),
    }
    explorer.upload.value = ({**file, "content": memoryview(content)},)
    explorer.pending.result()


def press(explorer: Explorer, *labels: str) -> None:
    for label in labels:
        explorer.parts[label].value = True
    explorer.pending.result()


def test_whole_and_muted_readings_are_those_of_the_package(captioner, bench, question):
    picture, muted = question.picture.picture, ("query 3", "block 0, head 1")
    answer = bench.answer(replace(question, muted=muted, token=4, block=1, head=2))
    same = mute(captioner.model, queries=[3], heads=[(0, 1)])
    found = effect(captioner, picture, answer.whole.said, same)
    assert answer.whole.said == captioner.caption(picture, preset="greedy").text
    np.testing.assert_allclose(np.log(answer.whole.probabilities), found.before, atol=1e-3)
    np.testing.assert_allclose(np.log(answer.muted.probabilities), found.after, atol=1e-3)
    of_word, of_query = answer.whole.maps
    expected = answer.whole.trace.word_maps()[answer.word]
    np.testing.assert_allclose(of_word.values, expected.values, atol=1e-5)
    assert of_word.label == max((w.text for w in answer.whole.trace.words), key=len)
    np.testing.assert_array_equal(
        of_query.values.ravel(), answer.whole.trace.qformer_cross_attentions[1, 2, 4]
    )
    with same:
        assert answer.muted.said == captioner.caption(picture, preset="greedy").text
    assert not np.array_equal(answer.muted.maps[0].values, of_word.values)
    assert answer.vmax[0] == max(of_word.values.max(), answer.muted.maps[0].values.max())


def test_the_bench_keeps_its_mutes_to_itself_and_shares_the_weights(captioner, bench):
    ours, theirs = bench.captioner.model.parameters(), captioner.model.parameters()
    assert all(mine is other for mine, other in zip(ours, theirs, strict=True))
    with bench.parts["Whole"]["bridge"]:
        assert not any(module._forward_hooks for module in captioner.model.modules())


def test_every_part_can_be_muted_once(captioner, bench):
    config = captioner.model.config
    labels = [part.label for group in bench.parts.values() for part in group.values()]
    heads = (2 * config.num_qformer_blocks + 1) * config.num_attention_heads
    assert len(labels) == 1 + config.num_query_tokens + heads + config.num_qformer_blocks + 1
    assert len(set(labels)) == len(labels)


def test_a_compiled_captioner_is_explored_with_its_mutes(captioner, question):
    with torch.compiler.set_stance("force_eager"):
        compiled = Bench(captioner.compile())
    muted = replace(question, muted=("bridge",))
    for asked in (question, muted):
        ours, plain = compiled.answer(asked), Bench(captioner).answer(asked)
        assert ours.whole.said == plain.whole.said
        assert (ours.muted and ours.muted.said) == (plain.muted and plain.muted.said)
    assert ours.muted.said != ours.whole.said


def test_a_drawing_follows_its_map_and_has_a_text(bench, question):
    first, last = (
        bench.answer(replace(question, word=(bench.answer(question).whole.said, i))).whole
        for i in (0, -1)
    )
    assert not np.array_equal(pixels(draw(first, [1, 1])), pixels(draw(last, [1, 1])))
    told = tell(replace(first, said="<b>"), [1, 1], "a < b")
    assert "a &lt; b" in told
    assert "&lt;b&gt;" in told
    assert f'alt="{first.maps[0].label} (agreement): highest in patch {first.maps[0].peak}' in told
    np.testing.assert_array_equal(drawn(told), pixels(draw(first, [1, 1])))


def test_a_caption_without_a_word_is_answered(bench, question, monkeypatch):
    monkeypatch.setattr(bench, "_caption", lambda *question: "")
    answer = bench.answer(question)
    assert answer.word is None
    assert [m.label for m in answer.whole.maps] == ["global token"]
    assert "(no word)" in tell(answer.whole, answer.vmax, "whole")


def test_clicks_change_what_is_shown(explorer):
    caption, picture = explorer.words.value[0], drawn(explorer.whole.value)
    assert "Ready" in explorer.status.value
    assert "Nothing is muted" in explorer.muted.value
    explorer.words.index = int(explorer.words.index == 0)
    explorer.pending.result()
    assert not np.array_equal(drawn(explorer.whole.value), picture)
    for block, head in (("1", "all"), ("1", "2"), ("all", "all")):
        previous = explorer.whole.value
        explorer.block.value, explorer.head.value = block, head
        explorer.pending.result()
        assert explorer.whole.value != previous
    press(explorer, "query 3", "bridge")
    assert "With query 3, bridge muted" in explorer.muted.value
    assert caption in explorer.whole.value
    assert caption not in explorer.muted.value
    rows = re.findall(r"<tr>.*?</tr>", explorer.probabilities.value, re.DOTALL)
    assert [row.count("%") for row in rows] == [len(explorer.words.options)] * 2
    explorer.unmute.click()
    explorer.pending.result()
    assert "Nothing is muted" in explorer.muted.value


def test_search_settings_reach_the_captioner(explorer, captioner):
    assert (explorer.beams.disabled, explorer.seed.disabled) == (True, True)
    explorer.search.value, explorer.temperature.value, explorer.seed.value = "sampling", 2.0, 7
    explorer.pending.result()
    assert (explorer.beams.disabled, explorer.seed.disabled) == (True, False)
    settings = {"temperature": 2.0, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.0}
    picture = explorer.picture.value.picture
    assert captioner.caption(picture, preset="greedy", **settings).text in explorer.whole.value


def test_pictures_come_from_uploads_and_folders(explorer, tmp_path):
    for name in ("b.png", "a.png"):
        scenes.scene("test", 0, 20).image.save(tmp_path / name)
    explorer.folder.value = str(tmp_path)
    explorer.pending.result()
    assert [name for name, _ in explorer.picture.options[:3]] == ["a.png", "b.png", "scene 0"]
    assert explorer.picture.label == "a.png"
    scene = explorer.whole.value
    upload(explorer, "mine.png", (tmp_path / "a.png").read_bytes())
    assert explorer.picture.label == "mine.png"
    assert explorer.whole.value == scene


def test_what_goes_wrong_is_told_and_can_be_mended(explorer, tmp_path):
    upload(explorer, "<notes>.txt", b"no picture")
    assert 'role="alert"' in explorer.status.value
    assert "&lt;notes&gt;.txt is no picture in a format known here" in explorer.status.value
    explorer.folder.value = str(tmp_path)
    assert "no picture in" in explorer.status.value
    explorer.picture.index = len(explorer.picture.options) - 1
    explorer.pending.result()
    assert "Ready" in explorer.status.value
    press(explorer, *(label for label in explorer.parts if label.startswith(("query", "global"))))
    assert "no visual token is left" in explorer.status.value


def test_only_the_last_of_many_questions_is_answered(explorer, monkeypatch):
    asked, answer = [], explorer.bench.answer
    monkeypatch.setattr(explorer.bench, "answer", lambda q: asked.append(q) or answer(q))
    explorer._worker.submit(torch.ones(()).item).result()  # the worker is free
    for token in range(1, 20):
        explorer.token.value = token
    explorer.pending.result()
    assert asked[-1].token == 19
    assert len(asked) < 19
    assert f"query {18} (attention)" in explorer.whole.value
