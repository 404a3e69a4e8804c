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

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import playwright.sync_api as playwright
import pytest
from PIL import Image

import qvision_lab as ql
from qvision_lab.interpretation.interventions import mute
from qvision_lab.plots.images import HEAT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
expect = playwright.expect
if CHROMIUM is None:
    pytest.skip("no Chromium; run make test-browser", allow_module_level=True)

PATIENCE = 180  # seconds, of a machine that has other things to do
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update")
QUIET += ("--disable-quic", "--disable-sync", "--no-first-run")
TOKEN = secrets.token_hex()
LAB = ("--no-browser", "--allow-root", "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}")
LAB += ("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> str:
    """Address of a notebook that shows the explorer, once its cell is run."""
    folder = tmp_path_factory.mktemp("lab")
    cell = nbformat.v4.new_code_cell("import qvision_lab as ql\nql.explore(ql.load())")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "x.ipynb")
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
        yield f"http://127.0.0.1:{port}/lab/tree/x.ipynb?token={TOKEN}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def page(lab):
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1600, "height": 1300})
        page.set_default_timeout(1000 * PATIENCE)
        expect.set_options(timeout=1000 * PATIENCE)
        page.goto(lab)
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


def peak_on_screen(image, patch_grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch in the brightest colour, on the left picture of two."""
    shot = np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("RGB"))
    left = shot[:, : shot.shape[1] // 2]
    inked = (left < 250).any(-1)
    inside = left[inked.mean(1) > 0.5][:, inked.mean(0) > 0.5]  # not the title, nor the margins
    patches = np.asarray(Image.fromarray(inside).resize(patch_grid[::-1], Image.Resampling.BOX))
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


def test_upload_click_and_mute(page, tmp_path):
    captioner = ql.load()
    picture, query = find_example(captioner)
    picture.save(tmp_path / "mine.png")
    traced = ql.trace(captioner, picture)
    maps = ql.word_maps(traced)
    longest = max(maps, key=lambda m: len(m.label))
    other = next(m for m in maps if m.peak != longest.peak)
    with mute(captioner.model, queries=[query]):
        muted = captioner.caption(picture, preset="greedy").text
    images = page.locator("img[alt*='highest in patch']")

    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a picture").click()
    chooser.value.set_files(tmp_path / "mine.png")
    expect(page.get_by_text(traced.caption, exact=True)).to_be_visible()
    for patch_map in (longest, other, longest):
        page.get_by_role("button", name=patch_map.label, exact=True).first.press("Enter")
        text = f"{patch_map.label} ({patch_map.method}): highest in patch {patch_map.peak}"
        expect(images).to_have_attribute("alt", re.compile(f"^{re.escape(text)}"))
        assert peak_on_screen(images, traced.patch_grid) == patch_map.peak

    expect(page.get_by_text("Nothing is muted")).to_be_visible()
    page.get_by_role("button", name=str(query), exact=True).first.click()
    expect(page.get_by_text(f"With query {query} muted")).to_be_visible()
    expect(page.get_by_text(muted, exact=True)).to_be_visible()
    expect(page.get_by_text(traced.caption, exact=True)).to_be_visible()
    expect(page.get_by_text("Ready.")).to_be_visible()
    assert images.count() == 2
    if place := os.environ.get("EXPLORER_SCREENSHOT"):
        page.locator(".jp-OutputArea-output").first.screenshot(path=place)
