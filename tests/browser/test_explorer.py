"""The explorer in Chromium, on a separate JupyterLab; `make test-browser` installs Chromium.

EXPLORER_SCREENSHOT in the environment is the file of its screenshot.
"""

import io
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import playwright.sync_api as playwright
import pytest
from PIL import Image

import qvision_lab as ql
from qvision_lab.cli import main
from qvision_lab.interpretation.interventions import mute
from qvision_lab.plots.images import HEAT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
expect, box_of = playwright.expect, playwright.Locator.bounding_box
if CHROMIUM is None:
    pytest.skip("no Chromium; run make test-browser", allow_module_level=True)

PATIENCE = 180  # seconds, of a machine that has other things to do
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update")
QUIET += ("--disable-quic", "--disable-sync", "--no-first-run")
TOKEN = secrets.token_hex()
LAB = ("--no-browser", "--allow-root", "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}")
LAB += ("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> tuple[str, Path]:
    """Address and file of a notebook that shows the explorer, once its cell is run."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "call", lambda command: 0)
        main(["explore", "--output", str(folder / "x.ipynb")])
    news = folder / "CONFIG/lab/user-settings/@jupyterlab/apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *LAB, f"--port={port}"],
            **{"cwd": folder, "env": {**os.environ, **own}, "stdout": log, "stderr": log},
        )
    try:
        for _ in range(PATIENCE):
            assert server.poll() is None, (folder / "log").read_text()
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/lab/tree/x.ipynb?token={TOKEN}", folder / "x.ipynb"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def page(lab):
    address, notebook = lab
    content = nbformat.read(notebook, as_version=4)  # saved with the explorer of the last test
    content.cells = content.cells[:1]
    content.cells[0].update(outputs=[], execution_count=None)
    nbformat.write(content, notebook)
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1600, "height": 1300}, device_scale_factor=1.25)
        page.set_default_timeout(1000 * PATIENCE)
        expect.set_options(timeout=1000 * PATIENCE)
        page.goto(address)
        page.locator(".jp-KernelName").get_by_label("Python 3").first.wait_for()
        prompt = page.locator(".jp-Notebook .jp-InputPrompt").first
        for _ in range(PATIENCE // 10):  # a key is lost before kernel and focus are there
            page.locator(".jp-Notebook .jp-CodeCell").first.click()
            page.keyboard.press("Shift+Enter")
            with suppress(AssertionError):
                expect(prompt).to_have_text(re.compile(r"\[(\*|\d+)\]"), timeout=10_000)
                break
        yield page
        browser.close()


def peak_on_screen(picture, patch_grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch in the brightest colour."""
    shot = Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
    patches = np.asarray(shot.resize(patch_grid[::-1], Image.Resampling.BOX))
    brightest = 255 * np.array(plt.get_cmap(HEAT)(1.0)[:3])
    distances = np.linalg.norm(patches - brightest, axis=-1)
    return tuple(int(i) for i in np.unravel_index(distances.argmin(), patch_grid))


def find_example(captioner):
    """A scene, and a query whose muting changes its caption."""
    for scene in ql.scenes.generate(20, split="test", start=30):
        caption = captioner.caption(scene.image, preset="greedy").text
        for query in range(captioner.model.config.num_query_tokens):
            with mute(captioner.model, queries=[query]):
                if captioner.caption(scene.image, preset="greedy").text != caption:
                    return scene.image, query
    pytest.fail("no query matters to a caption")


def pressed(page) -> list[int]:
    """Positions of the words whose buttons are pressed, once the kernel has released the others."""
    expect(page.locator(".qv-words button.mod-active")).to_have_count(1)
    classes = page.locator(".qv-words button").evaluate_all("all => all.map(b => b.className)")
    return [i for i, names in enumerate(classes) if "mod-active" in names]


def test_upload_click_and_mute(page, tmp_path):
    captioner = ql.load()
    picture, query = find_example(captioner)
    picture.save(tmp_path / "mine.png")
    traced = ql.trace(captioner, picture)
    maps = ql.word_maps(traced)
    longest = max(range(len(maps)), key=lambda i: len(maps[i].label))
    other = next(i for i, m in enumerate(maps) if m.peak != maps[longest].peak)
    with mute(captioner.model, queries=[query]):
        muted = captioner.caption(picture, preset="greedy").text
    pictures, buttons = page.locator(".qv-picture"), page.locator(".qv-words button")

    def upload(name):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Upload a picture").click()
        chooser.value.set_files(tmp_path / name)

    upload("mine.png")
    expect(page.get_by_text(traced.caption, exact=True)).to_be_visible()
    opacity = page.locator(".widget-hslider", has_text="Opacity").locator(".noUi-handle")
    opacity.press("End")  # the map alone
    for index in (longest, other, longest):
        buttons.nth(index).press("Enter")
        patch_map = maps[index]
        text = f"{patch_map.label} ({patch_map.method}): highest in patch {patch_map.peak}"
        expect(pictures.first).to_have_attribute("aria-label", text)
        assert pressed(page) == [index]
        assert peak_on_screen(pictures.first, traced.patch_grid) == patch_map.peak

    page.get_by_title(f"mute query {query}", exact=True).click()
    expect(page.get_by_text(f"With query {query} muted")).to_be_visible()
    changed = page.locator(".qv-caption").nth(1)
    expect(changed).to_have_text(muted)
    assert changed.locator("mark").count()
    expect(page.get_by_text(traced.caption, exact=True).first).to_be_visible()
    expect(page.get_by_text("Ready.")).to_be_visible()
    assert page.get_by_text("unlike those").count() == 0  # a scene
    assert pictures.count() == 4
    sizes = {tuple(round(box[k]) for k in ("y", "height")) for box in map(box_of, pictures.all())}
    assert len(sizes) == 1  # whole and muted side by side, at one height
    if place := os.environ.get("EXPLORER_SCREENSHOT"):
        page.locator(".jp-OutputArea-output").first.screenshot(path=place)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    upload("noise.png")
    expect(page.get_by_text("unlike those that the checkpoint learned from")).to_be_visible()


def test_a_repeated_word_and_arrow_keys(page):
    text = page.get_by_placeholder("or read a caption of your own")
    text.fill("A red car and a red car")
    text.press("Enter")
    buttons = page.locator(".qv-words button")
    expect(buttons).to_have_count(7)
    expect(page.locator(".qv-title").first).to_have_text("The model says")  # not what was typed
    expect(page.locator(".qv-caption").first).not_to_have_text("A red car and a red car")
    for index in (5, 1, 6):
        buttons.nth(index).click()
        expect(buttons.nth(index)).to_have_class(re.compile("mod-active"))
        assert pressed(page) == [index]
    buttons.nth(6).press("ArrowLeft")
    expect(buttons.nth(5)).to_have_attribute("aria-pressed", "true")
    expect(buttons.nth(5)).to_be_focused()
    assert pressed(page) == [5]
    states = buttons.evaluate_all("all => all.map(b => b.getAttribute('aria-pressed'))")
    assert states == [str(i == 5).lower() for i in range(7)]
    expect(page.locator(".qv-picture").first).to_have_attribute("aria-label", re.compile("^red "))
    mute_query = page.get_by_title("mute query 3", exact=True)
    expect(mute_query).to_have_attribute("aria-pressed", "false")
    mute_query.press("Enter")
    expect(mute_query).to_have_attribute("aria-pressed", "true")


def test_ten_rapid_clicks_end_in_the_last(page):
    buttons = page.locator(".qv-words button")
    expect(page.get_by_text("Ready.")).to_be_visible()
    count = buttons.count()
    for click in range(10):
        buttons.nth(click % count).click()
    last = page.locator(".qv-words button").nth(9 % count)
    word = last.inner_text().split()[0]
    label = page.locator(".qv-picture").first
    expect(label).to_have_attribute("aria-label", re.compile(f"^{re.escape(word)} "))
    expect(page.get_by_text("Ready.")).to_be_visible()
    assert pressed(page) == [9 % count]


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (900, 800), (1600, 900)])
def test_the_picture_stays_in_view(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    expect(page.get_by_text("Ready.")).to_be_visible()
    page.locator(".qv").first.scroll_into_view_if_needed()
    page.locator(".qv-words").first.evaluate("e => e.scrollIntoView()")
    page.get_by_title("mute query 3", exact=True).click()
    expect(page.get_by_text("With query 3 muted")).to_be_visible()
    page.wait_for_timeout(500)
    boxes = [*map(box_of, page.locator(".qv-picture").all())]
    if folder := os.environ.get("EXPLORER_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/explorer_{width}x{height}.png")
    assert all(box["y"] >= 0 and box["y"] + box["height"] <= height for box in boxes)
    button = box_of(page.get_by_title("mute query 3", exact=True))
    assert 0 <= button["y"] <= height
