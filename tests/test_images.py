"""Images of any kind are opened as a viewer shows them; hostile ones get a record, soon."""

import contextlib
import functools
import http.server
import io
import os
import pickle
import resource
import socketserver
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from qvision_lab.captioning import images
from qvision_lab.captioning.images import ImageError, open_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def picture() -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (6, 5), RED)
    picture.paste(BLUE, (3, 0, 6, 5))
    return picture


def encode(picture: Image.Image, kind: str = "png", **settings) -> bytes:
    picture.save(buffer := io.BytesIO(), kind, **settings)
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
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr"):
        opened = open_image(picture.convert(mode))
        assert (opened.mode, opened.size) == ("RGB", picture.size), mode


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
    gif = encode(Image.new("RGB", (1, 1), RED), kind="gif", save_all=True, append_images=frames)
    assert open_image(gif).getpixel((0, 0)) == RED


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for kind in (ramp, encode(Image.fromarray(ramp)), Image.fromarray(ramp.astype(np.int32))):
        gray = np.array(open_image(kind))[..., 0].ravel()
        np.testing.assert_array_equal(gray, np.arange(256))


def test_files_that_are_no_images(monkeypatch, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        complete = encode(Image.fromarray(noise), kind=kind)
        (tmp_path / f"half.{kind}").write_bytes(complete[: len(complete) // 2])
        with pytest.raises(ImageError, match=rf"half\.{kind}"):
            open_image(tmp_path / f"half.{kind}")
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


GREEDY = {"preset": "greedy", "max_new_tokens": 3}
SAMPLE = {"truncated.jpg", "pickle.jpg", "~b.png", "tile.tif", "byte\udcff.png"}


def png(width: int, height: int, depth: int = 8, color: int = 2, size: int = 0) -> bytes:
    """A PNG of `size` zeros, which are compressed a thousandfold."""
    packer, head = zlib.compressobj(), struct.pack(">IIBB3x", width, height, depth, color)
    data = b"".join(packer.compress(bytes(2**20)) for _ in range(-(-size >> 20))) + packer.flush()
    made = b"IHDR" + head, b"IDAT" + data, b"IEND"
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in made)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(*entries: tuple[int, int], follow: int = 0) -> bytes:
    """A TIFF whose directory has numbers by tag."""
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + struct.pack("<I", follow)


def write_hostile(folder, everything: bool) -> None:
    """Write hostile pictures: the sample, or all."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    good, jpg, gif = encode(photo), encode(photo, "jpeg"), encode(photo, "gif")
    text, many = PngImagePlugin.PngInfo(), [Image.new("P", (9, 9), i) for i in range(256)] * 8
    text.add_text("huge", "0" * 2**26, zip=True)
    sizes = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (277, 1)]
    tile = [(322, 30_000), (323, 30_000), (324, 0), (325, 9), *sizes]
    scans = encode(photo, "jpeg", progressive=True)
    scans = scans[:-2] + scans[scans.index(b"\xff\xda") : -2] * 200 + b"\xff\xd9"
    lab, ones = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), b"\xff" * 9999
    names = ("~b", "new\nline", "byte\udcff", "-rf", ".", "%s{0}", "\u202egnp")
    files = {f"{name}.png": good for name in names} | {
        "truncated.jpg": jpg[:500], "cut.png": good[:500], "cut.gif": gif[:500], "empty.jpg": b"",
        "png.jpg": good, "jpg.png": jpg, "zeros.png": bytes(9999), "magic.png": good[:8],
        "pixel.png": png(1, 1, 8, 2, 4), "line.png": encode(Image.new("1", (1, 20_000))),
        "wide.png": encode(Image.new("1", (20_000, 1))), "huge.png": png(2**31 - 1, 2**31 - 1),
        "none.png": png(0, 0), "depth.png": png(9, 9, 7), "channels.png": png(9, 9, 8, 5),
        "exif.jpg": encode(photo, "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "exif2.jpg": encode(photo, "jpeg", exif=b"Exif\0\0" + ones), "bmp.bmp": b"BM" + ones,
        "profile.jpg": encode(photo, "jpeg", icc_profile=ones), "page.jpg": b"<html>404</html>",
        "lab.png": encode(photo, icc_profile=lab), "text.png": encode(photo, pnginfo=text),
        "again.tif": tiff(*sizes, follow=8), "tile.tif": tiff(*tile), "strips.tif": tiff(*sizes),
        "tags.tif": tiff(*[(tag, 2**32 - 1) for tag in range(254, 340)]), "ii.tif": b"II*\0",
        "deep.tif": encode(Image.new("F", (9, 9), 0.5), "tiff"), "code.gif": gif[:-400] + ones,
        "int.tif": encode(Image.new("I", (9, 9)), "tiff"), "gif.gif": gif[:6] + ones[:4] + gif[10:],
        "frames.gif": encode(many[0], "gif", save_all=True, append_images=many[1:]),
        "scans.jpg": scans, "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pickle.jpg": pickle.dumps([0]), "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "riff.webp": b"RIFF" + ones, "box.avif": b"\0\0\0\x1cftypavif" + ones,
    }  # fmt: skip
    if everything:
        files["bomb.png"] = png(13_000, 13_000, 8, 6, 13_000 * 52_001)
        files["grey.png"] = png(13_000, 13_000, 16, 0, 13_000 * 26_001)
        (folder / "sparse.png").touch()
        os.truncate(folder / "sparse.png", 20 * 2**30)
    for name in files if everything else SAMPLE:
        (folder / name).write_bytes(files[name])
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    for name, target in {"loop.jpg": "loop.jpg", "dead.png": "a", "zero.png": "/dev/zero"}.items():
        (folder / name).symlink_to(target)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_has_a_caption_or_a_record(byte_captioner, tmp_path, everything):
    write_hostile(tmp_path, everything)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in os.listdir(tmp_path):
        start = time.process_time()
        with contextlib.suppress(ImageError):
            open_image(tmp_path / name)
        assert time.process_time() - start < 10, name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB
    report = byte_captioner.caption_folder(tmp_path, tmp_path / "o", temperature=1.0)
    assert (report.captioned, report.failed) == ((22, 31) if everything else (2, 8))


class HalfAnAnswer(socketserver.StreamRequestHandler):
    def handle(self):
        start = self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ncut")
        time.sleep(3 if b"slow" in start else 0)


def test_urls_and_folders_that_cannot_be_read_are_records(byte_captioner, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "URL_DEADLINE", 1)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HalfAnAnswer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, names = f"http://127.0.0.1:{server.server_address[1]}", ("cut", "a b.png", "slow")
        urls = [f"{host}/{name}" for name in names]
        report = byte_captioner.caption_folder([*urls, "http://[/"], tmp_path / "o", **GREEDY)
        server.shutdown()
    assert report.failed == 4
    assert "no complete answer in time" in (tmp_path / "o").read_text()
    refuse, scan = PermissionError(13, "Permission denied", str(tmp_path / "private")), os.scandir
    (tmp_path / "private").mkdir()

    def scan_or_refuse(path):
        if "private" in str(path):
            raise refuse
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_or_refuse)
    how = {"recursive": True, **GREEDY}
    assert byte_captioner.caption_folder(tmp_path, tmp_path / "other", **how).failed == 1


def test_pictures_that_are_overwritten_or_given_twice(byte_captioner, noise, tmp_path):
    expected = [c.token_ids for c in byte_captioner.caption(noise, **GREEDY)]
    array, image = np.empty((40, 60, 3), np.uint8), Image.new("RGB", (60, 40))

    def frames(reused):
        for each in noise:
            array[:] = each
            image.paste(each)
            yield reused

    files = [io.BytesIO(encode(each)) for each in noise]
    for size in (1, 2, 16):
        for given in (frames(array), frames(image), files, iter(files)):
            found = byte_captioner.caption(given, batch_size=size, **GREEDY)
            assert [c.token_ids for c in found] == expected
    lazy = [Image.open(io.BytesIO(encode(noise[0])))] * 9
    assert {c.token_ids for c in byte_captioner.caption(lazy, **GREEDY)} == {expected[0]}
    noise[0].save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        assert byte_captioner.caption(file, **GREEDY).source == file.name


def test_profiles_are_converted_to_srgb(noise):
    make = lambda name: ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()  # noqa: E731
    srgb = make("sRGB")
    for profile in (srgb, b"broken", make("XYZ")):  # the last is of other channels
        assert open_image(encode(noise[0], icc_profile=profile)).tobytes() == noise[0].tobytes()
    swapped = srgb.replace(b"s\0R\0G\0B", b"x\0x\0x\0x")
    for a, b in ((b"rXYZ", b"tXYZ"), (b"bXYZ", b"rXYZ"), (b"tXYZ", b"bXYZ")):
        swapped = swapped.replace(a, b, 1)
    found = np.array(open_image(encode(noise[0], icc_profile=swapped)), float)
    assert np.abs(found - np.array(noise[0], float)[..., ::-1]).mean() < 3
