"""Opening images of any kind: paths, URLs, bytes, PIL images, arrays and tensors -> RGB."""

import io
import os
import urllib.request
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, Union

import numpy as np
from PIL import Image, ImageCms, ImageOps

from qvision_lab.data.atomic import find_path

if TYPE_CHECKING:
    from torch import Tensor

Picture: TypeAlias = Union[str, os.PathLike, bytes, BinaryIO, Image.Image, np.ndarray, "Tensor"]

URL_TIMEOUT, URL_DEADLINE = 20, 120  # seconds without an answer, and for all of it
URL_LIMIT, FILE_LIMIT = 64 * 2**20, 2**30  # bytes
BAND = 2**24  # pixels that are converted at a time
SCANS = 10  # of a progressive JPEG of the largest size; of a smaller one more
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no other decoder runs
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha
_one_at_a_time = Lock()  # two threads may be given the same PIL image or file object


class ImageError(ValueError):
    """An image that cannot be opened; the message names it and says what to do."""


def open_image(picture: Picture, name: str | None = None) -> Image.Image:
    """Open an image as RGB, the way a viewer shows it; errors call it `name`.

    EXIF orientation is applied, an RGB image with an ICC profile converted to sRGB, transparency
    composited on white, 16-bit grey scaled to 8; of an animation the first frame is taken.
    ImageError if it cannot be read, or decoding needs more than 2 * `PIL.Image.MAX_IMAGE_PIXELS`.

    Args:
        picture: a path; an http(s) URL of at most 64 MiB; an encoded file (one of `FORMATS`) as
            bytes or file object; a PIL image; an array or tensor [H,W], [H,W,C] or [C,H,W] with C
            of 1, 3 or 4, uint8, uint16, bool or floats from 0 to 1.
    """
    name = name or picture_name(picture) or type(picture).__name__
    if isinstance(picture, np.ndarray):
        return _from_array(picture, name)
    if hasattr(picture, "requires_grad"):  # a tensor, recognised without importing torch
        tensor = picture.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
        return _from_array(tensor.numpy(), name, channels_first=True)
    content = None if isinstance(picture, Image.Image) else _read_bytes(picture, name)
    try:
        if content is None:
            image, turn = picture, _one_at_a_time
        else:
            image, turn = Image.open(io.BytesIO(content), formats=FORMATS), nullcontext()
            _check_size(image, content)
        with turn:
            image.load()
            image = ImageOps.exif_transpose(image)
        return _as_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # decoders raise errors of many types
        if isinstance(error, Image.UnidentifiedImageError):
            known = ", ".join(FORMATS)
            problem = f"is no picture in a format known here ({known}); convert it to JPEG or PNG"
        elif isinstance(error, Image.DecompressionBombError):
            pixels = f"has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels to decode"
            problem = f"{pixels}; shrink it first, or raise PIL.Image.MAX_IMAGE_PIXELS"
        else:
            problem = f"is truncated or damaged ({error}); copy or download it again"
        raise ImageError(f"{name} {problem}.") from error


def walk_pictures(
    paths: str | os.PathLike | Iterable[str | os.PathLike], recursive: bool = False
) -> Iterator[tuple[str, str]]:
    """Images in folders, each folder sorted with its subfolders last, and listed files and URLs.

    Yields a path or URL, and its name: the path inside the folder, the file's own name, or the
    URL. ValueError at the end, if there was none.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    found = None
    for path in paths:
        if _is_url(path):
            yield (found := path), path
        elif not os.path.isdir(folder := find_path(path)):
            yield (found := str(folder)), folder.name
        else:
            unreadable: list[OSError] = []
            for place, subfolders, names in os.walk(folder, onerror=unreadable.append):
                names = sorted(names if recursive else names + subfolders)  # "x.jpg/" is an error
                subfolders[:] = sorted(subfolders) if recursive else ()
                for file in (Path(place, name) for name in names):
                    if file.suffix.lower() in SUFFIXES:
                        yield (found := str(file)), file.relative_to(folder).as_posix()
            for error in unreadable:  # its record says why
                yield (found := error.filename), os.path.relpath(error.filename, folder)
    if found is None:
        names = ", ".join(map(str, paths)) if isinstance(paths, Collection) else ""
        raise ValueError(
            f"no picture in {names or 'an empty list of paths'}; a folder's files count if they "
            f"end in {', '.join(SUFFIXES)}, those of its subfolders with recursive=True."
        )


def picture_name(picture: Picture) -> str | None:
    """Path or URL of an image; None where it has none."""
    if isinstance(picture, Image.Image):
        return str(getattr(picture, "filename", "")) or None
    if hasattr(picture, "read"):
        return name if isinstance(name := getattr(picture, "name", None), str) else None
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else None


def file_identity(path: str | os.PathLike) -> str | None:
    """Size and time of a file, which change with its content; None for what is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a URL; a name that no file can have
        return None
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_url(path: str | os.PathLike) -> bool:
    return str(path).startswith(("http://", "https://"))


def _read_bytes(picture: str | os.PathLike | bytes | BinaryIO, name: str) -> bytes:
    """The content of an image file, from a path, URL or file object; at least one byte."""
    if not (isinstance(picture, str | os.PathLike | bytes) or hasattr(picture, "read")):
        raise TypeError(
            f"a {type(picture).__name__} is no picture; pass a path, URL, bytes, file object, PIL "
            "image, array or tensor."
        )
    limit = FILE_LIMIT
    try:
        if isinstance(picture, bytes):
            content = picture
        elif hasattr(picture, "read"):
            with _one_at_a_time:
                if picture.seekable():
                    picture.seek(0)
                content = bytes(picture.read(limit + 1))
        elif _is_url(picture):
            content, limit = _download(str(picture)), URL_LIMIT
        else:
            if (path := find_path(picture)).exists() and not (path.is_file() or path.is_dir()):
                raise ValueError("it is a pipe or device")
            with path.open("rb") as file:
                content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"it is larger than {limit / 2**20:.0f} MiB")
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder; caption_folder captions what is in it.") from error
    except Exception as error:  # of the network, the file system, or a file object's own
        raise ImageError(
            f"cannot read {name}: {str(error) or 'no complete answer in time'}; check it, or "
            "download the picture and pass its path."
        ) from error
    if not content:
        raise ImageError(f"{name} is empty (0 bytes); write or download it again.")
    return content


def _download(url: str) -> bytes:
    """The answer of a URL; TimeoutError after `URL_DEADLINE`, also where it comes slowly."""
    answer: Future[bytes] = Future()

    def read() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "qvision-lab"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
                answer.set_result(response.read(URL_LIMIT + 1))
        except Exception as error:
            answer.set_exception(error)

    Thread(target=read, daemon=True).start()  # a socket has no deadline of its own
    return answer.result(URL_DEADLINE)


def _check_size(image: Image.Image, content: bytes) -> None:
    """Refuse a file that needs far more memory or time to decode than its size in pixels says."""
    needed = 0
    if image.format == "TIFF":  # a tile may be larger than its image
        needed = image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0)
    elif image.format in ("JPEG", "MPO"):  # every scan passes over the whole image
        needed = image.width * image.height * content.count(b"\xff\xda") // SCANS
    if needed > 2 * (Image.MAX_IMAGE_PIXELS or needed):
        raise Image.DecompressionBombError


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert in bands, since intermediate results take several times the memory of the image."""
    rows = max(1, BAND // image.width)
    if rows >= image.height:
        return _convert(image, name)
    canvas = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        canvas.paste(_convert(band, name), (0, top))
    return canvas


def _convert(image: Image.Image, name: str) -> Image.Image:
    image = _to_srgb(image)
    if image.mode == "F":  # here and below, convert("RGB") would clip
        return _from_array(np.asarray(image), name)
    if image.mode.startswith("I"):
        return _from_array(np.clip(image, 0, 65535).astype(np.uint16), name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.pop("icc_profile", None)  # else it would be applied again
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an embedded ICC profile, unless it is sRGB or broken."""
    if image.mode not in ("RGB", "RGBA") or not (profile := image.info.get("icc_profile")):
        return image
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        known = "srgb" in ImageCms.getProfileDescription(source).lower()
        if known or source.profile.xcolor_space.strip() != "RGB":
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    except Exception:  # many types, as of decoders
        return image


def _from_array(values: np.ndarray, name: str, channels_first: bool = False) -> Image.Image:
    shape = values.shape
    last = values.ndim == 3 and shape[-1] in CHANNELS
    if values.ndim == 3 and shape[0] in CHANNELS and (channels_first or not last):
        values, last = np.moveaxis(values, 0, -1), True  # [C,H,W] -> [H,W,C]
    if values.size == 0 or not (values.ndim == 2 or last):
        needed = "a picture is [H,W], [H,W,C] or [C,H,W], with C of 1, 3 or 4"
        raise ImageError(f"{name} has shape {list(shape)}; {needed}.")
    if values.dtype == np.uint16:
        values = np.rint(values / 257)  # 65535 -> 255
    elif values.dtype.kind in "bf":  # bool or float
        low, high = values.min(), values.max()  # NaN fails the comparison too
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name} holds numbers from {low:.4g} to {high:.4g}, not 0 to 1; pass pixels as "
                "uint8, or preprocessed ones to model.generate(pixel_values=...)."
            )
        values = np.rint(values * 255.0)
    elif values.dtype != np.uint8:
        raise ImageError(f"{name} holds {values.dtype}; convert it to uint8 (0 to 255).")
    values = values.astype(np.uint8)
    image = Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)
    return _as_rgb(image, name)
