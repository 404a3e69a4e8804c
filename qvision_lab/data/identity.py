"""Identity of a result: digests of model and data, versions, commit."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qvision_lab.data.coco import CaptionDataset

PACKAGES = ("qvision-lab", "torch", "transformers", "numpy", "pillow")
NOT_RECORDED = "not recorded"


def identify(model: str | None = None, data: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a result depends on but its settings, for its file.

    `model` is the digest by `fingerprint_weights`, None where no single model's weights matter;
    `data` has that of each data set by `fingerprint`.
    """
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"model": model, "data": dict(data or {}), "commit": _commit(), "versions": versions}


def read_identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a result's file, `NOT_RECORDED` where an older one lacks it."""
    return {name: content.get(name, NOT_RECORDED) for name in identify()}


def fingerprint(images: CaptionDataset) -> str:
    """Digest of ids, captions, and names and sizes of the files."""
    digest = hashlib.sha256()
    for image in images:
        size = image.image.stat().st_size if image.image and image.image.exists() else None
        name = image.image.name if image.image else image.drawing.name
        digest.update(json.dumps([image.image_id, name, size, image.references]).encode())
    return digest.hexdigest()[:16]


@cache
def _commit() -> str | None:
    """The git commit of the code, where it is in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
