"""Opening images of any kind: paths, URLs, bytes, PIL images, arrays and tensors -> RGB."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

Picture: TypeAlias = Union[str, os.PathLike, bytes, Image.Image, np.ndarray, "Tensor"]

URL_TIMEOUT = 20  # seconds without an answer
URL_LIMIT = 64 * 2**20  # bytes
SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha


class ImageError(ValueError):
    """An image that cannot be opened; the message names it and says what to do."""


def open_image(picture: Picture, name: str | None = None) -> Image.Image:
    """Open an image as RGB, the way a viewer shows it.

    EXIF orientation is applied, transparency composited on white, 16-bit grey scaled to 8; of an
    animation the first frame is taken.

    Args:
        picture: a path; an http(s) URL of at most 64 MiB; an encoded file as bytes; a PIL image; an
            array or tensor [H,W], [H,W,C] or [C,H,W] with C of 1, 3 or 4, uint8, uint16, bool or
            floats from 0 to 1.
        name: its name in error messages.

    Raises:
        ImageError: if it cannot be read, or has more than 2 * `PIL.Image.MAX_IMAGE_PIXELS`.
        TypeError: if it is of another type.
    """
    name = name or picture_name(picture) or type(picture).__name__
    if isinstance(picture, np.ndarray):
        return _from_array(picture, name)
    if hasattr(picture, "detach"):  # a tensor, recognised without importing torch
        tensor = picture.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
        return _from_array(tensor.numpy(), name, channels_first=True)
    if not isinstance(picture, Image.Image):
        picture = io.BytesIO(_read_bytes(picture, name))
    try:
        image = Image.open(picture) if isinstance(picture, io.BytesIO) else picture
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except Exception as error:  # decoders raise errors of many types
        if isinstance(error, Image.UnidentifiedImageError):
            problem = "is no picture in a format known here; convert it to JPEG or PNG"
        elif isinstance(error, Image.DecompressionBombError):
            pixels = f"has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
            problem = f"{pixels}; shrink it first, or raise PIL.Image.MAX_IMAGE_PIXELS"
        else:
            problem = f"is truncated or damaged ({error}); copy or download it again"
        raise ImageError(f"{name} {problem}.") from error


def walk_pictures(
    paths: str | os.PathLike | Iterable[str | os.PathLike], recursive: bool = False
) -> Iterator[tuple[str, str]]:
    """Images in folders, each folder sorted with its subfolders last, and listed files and URLs.

    Yields:
        A path or URL, and its name: the path inside the folder, the file's own name, or the URL.

    Raises:
        ValueError: at the end, if there was none.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    found = None
    for path in paths:
        if _is_url(path):
            yield (found := path), path
        elif not (folder := Path(path).expanduser()).is_dir():
            yield (found := str(folder)), folder.name
        else:
            for place, subfolders, names in os.walk(folder):
                subfolders[:] = sorted(subfolders) if recursive else ()
                for file in (Path(place, name) for name in sorted(names)):
                    if file.suffix.lower() in SUFFIXES and file.is_file():
                        yield (found := str(file)), file.relative_to(folder).as_posix()
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


def _read_bytes(picture: str | os.PathLike | bytes, name: str) -> bytes:
    """The content of an image file, from a path or URL; at least one byte."""
    if not isinstance(picture, str | os.PathLike | bytes):
        raise TypeError(
            f"a {type(picture).__name__} is no picture; pass a path, URL, bytes, PIL image, array "
            "or tensor."
        )
    try:
        if isinstance(picture, bytes):
            content = picture
        elif _is_url(picture):
            request = urllib.request.Request(picture, headers={"User-Agent": "qvision-lab"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
                content = response.read(URL_LIMIT + 1)
            if len(content) > URL_LIMIT:
                raise ValueError(f"it is larger than {URL_LIMIT / 2**20:.0f} MiB")
        else:
            content = Path(picture).expanduser().read_bytes()
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder; caption_folder captions what is in it.") from error
    except (OSError, ValueError) as error:  # HTTP errors and time-outs are OSErrors
        raise ImageError(
            f"cannot read {name}: {error}; check it, or download the picture and pass its path."
        ) from error
    if not content:
        raise ImageError(f"{name} is empty (0 bytes); write or download it again.")
    return content


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":  # here and below, convert("RGB") would clip
        return _from_array(np.asarray(image), name)
    if image.mode.startswith("I"):
        return _from_array(np.clip(image, 0, 65535).astype(np.uint16), name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
