"""The page of a trace: its numbers are the package's; in Chromium it opens from disk."""

import json
import re
import shutil

import numpy as np
import pytest

import qvision_lab as ql
from qvision_lab.interpretation.interventions import mute, sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def traced(embedded) -> ql.Trace:
    image = ql.scenes.scene("test", 0, 13).image
    words = embedded.caption(image, preset="greedy").text.split()
    return ql.trace(embedded, image, " ".join(words[:4]))  # of all of them the page takes longer


@pytest.fixture(scope="module")
def page(traced, tmp_path_factory):
    return traced.to_html(tmp_path_factory.mktemp("page") / "scene.html")


def content(page) -> dict:
    return json.loads(re.search(r"const data = (\{.*\});", page.read_text())[1])


def test_the_page_holds_the_numbers_of_the_package(traced, page):
    data = content(page)
    assert page.stat().st_size < 3e6
    assert not re.search(r"(src|href)=\"?https?:", page.read_text())
    assert data["words"] == [word.text for word in traced.words]
    for method in ("composition", "agreement"):
        expected = [m.values.ravel() for m in ql.word_maps(traced, method)]
        np.testing.assert_allclose(data["maps"][method], expected, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(data["attention"], traced.qformer_cross_attentions, atol=1e-3)
    after = np.exp([effect.after for effect in sweep(traced, "queries")])
    found = [each["probabilities"] for each in data["muted"]]
    np.testing.assert_allclose(found, after, rtol=2e-2, atol=1e-4)
    with mute(traced.model, queries=[3]):
        caption = traced.captioner.caption(traced.image, preset="greedy").text
    assert data["muted"][4]["caption"] == caption


def test_a_trace_without_its_captioner_has_what_needs_no_model(traced, tmp_path):
    traced.save(tmp_path / "trace.safetensors")
    loaded = ql.Trace.load(tmp_path / "trace.safetensors")
    data = content(loaded.to_html(tmp_path / "page.html"))
    assert [*data["maps"]] == ["composition", "rollout"]
    assert data["method"] in data["maps"]
    assert data["muted"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; run make test-browser")
def test_in_chromium_from_disk(traced, page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    expect, data = playwright.expect, content(page)
    requests, errors = [], []
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 800})
        expect.set_options(timeout=30_000)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page.as_uri())
        buttons, label = tab.locator("#words button"), tab.locator("#wordMap")
        expect(buttons).to_have_count(len(data["words"]))
        buttons.nth(1).click()
        expect(buttons.nth(1)).to_have_attribute("aria-pressed", "true")
        tab.keyboard.press("ArrowRight")
        expect(buttons.nth(2)).to_have_attribute("aria-pressed", "true")
        for method in ("occlusion", "agreement"):
            tab.locator("#method").select_option(method)
            (of_word,) = ql.word_maps(traced, method, [traced.words[2]])
            text = f"{of_word.label} ({method}): highest in patch {of_word.peak}"
            expect(label).to_have_attribute("aria-label", text)
        tab.locator("#token").select_option("4")
        tab.locator("#block").select_option("1")
        tab.locator("#head").select_option("2")
        peak = ql.query_maps(traced, 1, 2)[4].peak
        text = f"query 3 (attention): highest in patch {peak}"
        expect(tab.locator("#tokenMap")).to_have_attribute("aria-label", text)
        assert not tab.locator("#mutedFigure").is_visible()
        tab.locator("#muted").select_option("4")
        expect(tab.locator("#mutedCaption")).to_contain_text(data["muted"][4]["caption"])
        assert tab.locator("#mutedFigure").is_visible()
        assert tab.locator("#table tr").count() == 3
        tab.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert not errors
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
