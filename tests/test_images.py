"""Images of any kind are opened as a viewer shows them, or the error says why not."""

import functools
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from qvision_lab.captioning import images
from qvision_lab.captioning.images import ImageError, open_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def picture() -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (6, 5), RED)
    picture.paste(BLUE, (3, 0, 6, 5))
    return picture


def encode(picture: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **{"format": "png", **settings})
    return buffer.getvalue()


def test_every_kind_gives_the_same_image(picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    pixels = np.array(picture)
    tensor = torch.tensor(pixels)
    kinds = [path, str(path), path.read_bytes(), picture, pixels, pixels / 255]
    kinds += [pixels.astype(np.uint16) * 257, pixels.transpose(2, 0, 1)]
    kinds += [tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1).bfloat16() / 255]
    for kind in kinds:
        opened = open_image(kind)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.array(opened), pixels)


def test_url(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "picture.png")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert open_image(f"{url}/picture.png").tobytes() == picture.tobytes()
        with pytest.raises(ImageError, match=r"none\.png.*404"):
            open_image(f"{url}/none.png")
        monkeypatch.setattr(images, "URL_LIMIT", 10)
        with pytest.raises(ImageError, match="larger than"):
            open_image(f"{url}/picture.png")
        server.shutdown()
    with pytest.raises(ImageError, match="cannot read"):
        open_image(f"{url}/picture.png")


def test_exif_transparency_and_animation(picture):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert open_image(encode(picture, exif=exif)).getpixel((0, 0)) == BLUE
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0])
    for kind in (encode(clear), encode(palette, transparency=0), np.zeros((2, 2, 4))):
        assert open_image(kind).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (1, 1), BLUE)]
    gif = encode(Image.new("RGB", (1, 1), RED), format="gif", save_all=True, append_images=frames)
    assert open_image(gif).getpixel((0, 0)) == RED


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_other_modes(picture, mode):
    opened = open_image(picture.convert(mode))
    assert opened.mode == "RGB"
    assert opened.size == picture.size


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in (ramp, encode(Image.fromarray(ramp)), Image.fromarray(ramp.astype(np.int32))):
        gray = np.array(open_image(kind))[..., 0].ravel()
        np.testing.assert_array_equal(gray, np.arange(256))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_truncated(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    complete = encode(Image.fromarray(noise), format=kind)
    path = tmp_path / f"half.{kind}"
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ImageError, match=r"half\."):
        open_image(path)


def test_files_that_are_no_images(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)  # stands in for 20,000 x 20,000
    Image.new("RGB", (2100, 2100)).save(tmp_path / "huge.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    for name, words in {
        "huge.png": r"huge\.png has more than 4,000,000 pixels.*shrink",
        "empty.png": r"empty\.png is empty \(0 bytes\)",
        "text.png": r"text\.png is no picture",
        "none.png": r"cannot read .*none\.png",
        ".": "is a folder; caption_folder",
    }.items():
        with pytest.raises(ImageError, match=words):
            open_image(tmp_path / name)
    with pytest.raises(TypeError, match="int is no picture"):
        open_image(3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((2, 2, 5)), r"shape \[2, 2, 5\]"),
        (np.zeros((0, 4, 3)), r"shape \[0, 4, 3\]"),
        (np.full((2, 2), -1.0), "from -1 to -1"),
        (np.full((2, 2), np.nan), "from nan"),
        (np.zeros((2, 2), int), "int64"),
    ],
)
def test_arrays_that_are_no_images(values, words):
    with pytest.raises(ImageError, match=words):
        open_image(values)
