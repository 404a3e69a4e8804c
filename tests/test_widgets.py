"""The explorer without a browser: results, drawings, and what the controls do."""

import base64
import io
import re
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import qvision_lab as ql
from qvision_lab.captioning.images import open_image
from qvision_lab.interpretation.interventions import effects, mute
from qvision_lab.widgets import Explorer
from qvision_lab.widgets.backend import Backend, Request
from qvision_lab.widgets.html import color_limits, result_html

GREEDY = (("preset", "greedy"),)


@pytest.fixture(scope="module")
def backend(embedded) -> Backend:
    return Backend(embedded)


@pytest.fixture(scope="module")
def request_() -> Request:
    return Request(partial(open_image, ql.scenes.scene("test", 0, 1).image), GREEDY)


@pytest.fixture
def explorer(embedded):
    explorer = Explorer(embedded)
    explorer.pending.result()
    yield explorer
    explorer.close()


def drawn(html: str) -> np.ndarray:
    """Pixels of the first map, one for each patch."""
    png = base64.b64decode(re.search(r"qv-heat' src='data:image/png;base64,([^']+)", html)[1])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def change(explorer: Explorer, **values: object) -> None:
    """Set controls by name, and wait for the result."""
    for name, value in values.items():
        getattr(explorer, name).value = value
    explorer.pending.result()


def word(explorer: Explorer, index: int) -> None:
    explorer.words.children[index].value = True
    explorer.pending.result()


def upload(explorer: Explorer, name: str, content: bytes) -> None:
    file = {"name": name, "type": "", "size": len(content), "content": memoryview(content)}
    change(explorer, upload=({**file, "last_modified": datetime.now(timezone.utc)},))


def press(explorer: Explorer, *labels: str) -> None:
    for label in labels:
        explorer.parts[label].value = True
    explorer.pending.result()


def test_whole_and_muted_results_are_those_of_the_package(embedded, backend, request_):
    image, muted = request_.image(), ("query 3", "block 0, head 1")
    results = backend.run(replace(request_, muted=muted, token=4, block=1, head=2))
    whole, ablated = results
    same = mute(embedded.model, queries=[3], heads=[(0, 1)])
    (effect,) = effects(replace(whole.trace, captioner=embedded), [same])
    assert whole.caption == embedded.caption(image, preset="greedy").text
    np.testing.assert_allclose(np.log(whole.trace.probabilities), effect.before, atol=1e-3)
    np.testing.assert_allclose(np.log(ablated.trace.probabilities), effect.after, atol=1e-3)
    of_word, of_query = whole.maps
    expected = ql.word_maps(whole.trace)[whole.word]
    np.testing.assert_allclose(of_word.values, expected.values, atol=1e-5)
    assert of_word.label == max((word.text for word in whole.trace.words), key=len)
    attention = whole.trace.qformer_cross_attentions[1, 2, 4]
    np.testing.assert_array_equal(of_query.values.ravel(), attention)
    with same:
        assert ablated.caption == embedded.caption(image, preset="greedy").text
    assert not np.array_equal(ablated.maps[0].values, of_word.values)
    assert color_limits(results)[0] == max(of_word.values.max(), ablated.maps[0].values.max())


def test_every_part_can_be_muted_once_in_a_copy_that_shares_the_weights(embedded, backend):
    pairs = zip(backend.captioner.model.parameters(), embedded.model.parameters(), strict=True)
    assert all(mine is other for mine, other in pairs)
    with backend._muting(("bridge",)):
        assert not any(module._forward_hooks for module in embedded.model.modules())
    config = embedded.model.config
    labels = [name for group in backend.parts.values() for name in group]
    for group in backend.parts.values():
        for name, arguments in group.items():
            assert mute(embedded.model, **arguments).label == name
    heads = (2 * config.num_qformer_blocks + 1) * config.num_attention_heads
    assert len(labels) == 1 + config.num_query_tokens + heads + config.num_qformer_blocks + 1
    assert len(set(labels)) == len(labels)


def test_a_drawing_follows_its_map_and_has_a_text(backend, request_):
    (default,) = backend.run(request_)
    ends = [(default.caption, i) for i in (0, len(default.trace.words) - 1)]
    (first,), (last,) = (backend.run(replace(request_, word=word)) for word in ends)
    html = result_html(replace(first, caption="<b>"), [1, 1], "a < b")
    assert "a &lt; b" in html
    assert "&lt;b&gt;" in html
    peak = first.maps[0].peak
    assert f"aria-label='{first.maps[0].label} (agreement): highest in patch {peak}'" in html
    red, green, blue = np.moveaxis(drawn(html).astype(int), -1, 0)
    assert np.unravel_index((red + green + blue).argmax(), red.shape) == peak
    assert "<mark>&lt;b&gt;</mark>" in result_html(replace(first, caption="<b>"), [1, 1], "", "a")
    assert not np.array_equal(drawn(html), drawn(result_html(last, [1, 1], "last")))


def test_a_caption_without_a_word_has_a_result(backend, request_, monkeypatch):
    nothing = SimpleNamespace(text="", familiar=None)
    monkeypatch.setattr(backend, "_caption", lambda *request: nothing)
    (result,) = backend.run(request_)
    assert result.word is None
    assert [m.label for m in result.maps] == ["global token"]
    assert "(no word)" in result_html(result, color_limits([result]), "whole")


def test_clicks_change_what_is_shown(explorer):
    caption, image = explorer._picked[0], drawn(explorer.whole.value)
    assert "Ready" in explorer.status.value
    assert "Nothing is muted" in explorer.muted.value
    word(explorer, int(explorer.words.children[0].value))
    assert not np.array_equal(drawn(explorer.whole.value), image)
    for block, head in (("1", "all"), ("1", "2"), ("all", "all")):
        previous = explorer.whole.value
        change(explorer, block=block, head=head)
        assert explorer.whole.value != previous
    press(explorer, "query 3", "bridge")
    assert "With query 3, bridge muted" in explorer.muted.value
    assert caption in explorer.whole.value
    assert caption not in explorer.muted.value
    assert "<mark>" in explorer.muted.value
    assert "mute(captioner.model, queries=[3], bridge=True)" in explorer.code.value
    rows = re.findall(r"<tr>.*?</tr>", explorer.probabilities.value, re.DOTALL)
    assert [row.count("%") for row in rows[1:]] == [len(explorer.words.children)] * 2
    explorer.unmute.click()
    explorer.pending.result()
    assert "Nothing is muted" in explorer.muted.value


def test_a_word_is_known_by_its_position(explorer):
    change(explorer, own="A red car and a red car")
    assert [b.description.split()[0] for b in explorer.words.children] == explorer.own.value.split()
    maps = {}
    for index in (1, 5, 1):
        word(explorer, index)
        assert [b.value for b in explorer.words.children] == [i == index for i in range(7)]
        maps[index] = drawn(explorer.whole.value)
    assert not np.array_equal(maps[1], maps[5])
    assert explorer.code.value.count("[1]") == 1
    explorer.words.children[1].value = False  # as a second click does
    assert explorer.words.children[1].value


def test_words_have_marks_tints_and_alternatives(explorer):
    index = int(explorer.image.label.split()[1])
    truth = ql.scenes.scene("test", 0, index).objects[0]
    other = "green" if truth.color != "green" else "red"
    change(explorer, own=f"A {other} {truth.category} on a beach")
    words = explorer.words.children
    assert [button.description.split()[-1] for button in words[1:3]] == ["✗", "✓"]
    assert "here the model would write" in words[0].tooltip
    tints = [[name for name in each._dom_classes if name.startswith("qv-p")] for each in words]
    assert tints[1] == ["qv-p0"]  # confidence in a color that is wrong
    assert "color right: " in words[1].tooltip
    assert tints[3:5] == [[], []]  # "on a" claims nothing
    explorer.backend.captioner.confidence = None
    change(explorer, own=explorer.own.value + ".")
    assert all(any(n.startswith("qv-p") for n in b._dom_classes) for b in explorer.words.children)


def test_only_one_visual_token_is_left(explorer):
    explorer.token.value = 4
    explorer.only.click()
    explorer.pending.result()
    muted = [name for name, button in explorer.parts.items() if button.value]
    assert len(muted) == len(explorer.token.options) - 1
    assert "query 3" not in muted
    assert "With global token, query 0, query 1, query 2, … muted" in explorer.muted.value


def test_a_picture_is_saved_and_a_foreign_one_is_warned_of(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer.save.click()
    assert "Saved explorer_scene_0.png" in explorer.status.value
    assert Image.open(tmp_path / "explorer_scene_0.png").width > 400
    assert not explorer.warning.value
    change(explorer, folder=str(tmp_path))
    assert "unlike those that the checkpoint learned from" in explorer.warning.value
    explorer.opacity.value = 0.25
    assert "--qv-opacity: 0.25" in explorer._style.value


def test_search_settings_reach_the_captioner(explorer, embedded):
    assert (explorer.beams.disabled, explorer.seed.disabled) == (True, True)
    change(explorer, search="sampling", temperature=2.0, seed=7)
    assert (explorer.beams.disabled, explorer.seed.disabled) == (True, False)
    settings = {"temperature": 2.0, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.0}
    image = explorer.image.value()
    assert embedded.caption(image, preset="greedy", **settings).text in explorer.whole.value


def test_images_come_from_uploads_and_folders(explorer, tmp_path):
    for name in ("b.png", "a.png"):
        ql.scenes.scene("test", 0, 20).image.save(tmp_path / name)
    change(explorer, folder=str(tmp_path))
    assert [name for name, _ in explorer.image.options[:3]] == ["a.png", "b.png", "scene 0"]
    assert explorer.image.label == "a.png"
    scene = explorer.whole.value
    upload(explorer, "mine.png", (tmp_path / "a.png").read_bytes())
    assert explorer.image.label == "mine.png"
    assert explorer.whole.value == scene


def test_errors_are_shown_and_can_be_mended(explorer, tmp_path):
    upload(explorer, "<notes>.txt", b"no picture")
    assert 'role="alert"' in explorer.status.value
    assert "&lt;notes&gt;.txt is no picture in a format known here" in explorer.status.value
    explorer.folder.value = str(tmp_path)
    assert "no picture in" in explorer.status.value
    explorer.image.index = len(explorer.image.options) - 1
    explorer.pending.result()
    assert "Ready" in explorer.status.value
    press(explorer, *(label for label in explorer.parts if label.startswith(("query", "global"))))
    assert "no visual token is left" in explorer.status.value


def test_only_the_last_of_many_requests_is_run(explorer, monkeypatch):
    requests, run = [], explorer.backend.run
    monkeypatch.setattr(explorer.backend, "run", lambda r: requests.append(r) or run(r))
    explorer._worker.submit(torch.ones(()).item).result()  # the worker is free
    for token in range(1, 20):
        explorer.token.value = token
    explorer.pending.result()
    assert requests[-1].token == 19
    assert len(requests) < 19
    assert "query 18 (attention)" in explorer.whole.value
