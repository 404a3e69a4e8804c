"""Files of a checkpoint: found in a folder or on the Hub, and read, headers first."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message has the reason and a remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """Entry of a safetensors header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # such as "F32"

    def read(self) -> Tensor:
        """The tensor, in a separate memory mapping, which is closed with the tensor."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Entries of all tensors in safetensors files, by name; their data is not read."""
    stored = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy or download the checkpoint again.")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    entry = file.get_slice(name)
                    shape = tuple(entry.get_shape())
                    stored[name] = StoredTensor(path, name, shape, entry.get_dtype())
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file "
                f"({error}); copy or download it again. Pickles are never loaded."
            ) from error
    return stored


def read_tensors(
    stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Read tensors in a dtype onto a device.

    On the CPU in the dtype of the file, they stay memory-mapped. All others are read through a
    mapping each, since mapped pages count as resident memory until their mapping ends.
    """
    mapped = {path: safe_open(path, "pt") for path in {tensor.file for tensor in stored.values()}}
    tensors = {}
    for name, tensor in stored.items():
        stays = STORED_DTYPES[tensor.dtype] == dtype and device.type == "cpu"
        values = mapped[tensor.file].get_tensor(tensor.name) if stays else tensor.read()
        tensors[name] = values.to(device=device, dtype=dtype)
    return tensors


def read_json(path: Path, fields: tuple[str, ...] = ()) -> dict:
    """Content of a JSON file that must have these fields."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy or download the checkpoint again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); copy or download it again.") from error
    for field in fields:
        if field not in content:
            raise CheckpointError(f"{path} has no field {field!r}; add it or download it again.")
    return content


def locate(
    source: str | os.PathLike | None, revision: str | None, patterns: tuple[str, ...]
) -> tuple[Path, str | None]:
    """Folder of a checkpoint (None: the embedded one), and its commit if it is on the Hub.

    From the Hub only files that match `patterns` are fetched.
    """
    if source is None:
        source = str(resources.files("qvision_lab") / "scenes_checkpoint")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} needs a Hub id; {source} is a folder.")
        return folder, None
    if folder.exists():
        raise CheckpointError(f"{source} is a file; give the folder that it lies in.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise CheckpointError(f"there is no folder {source}; give one, or a Hub id (owner/name).")
    snapshot = download(str(source), revision, patterns)
    return snapshot, snapshot.name  # the cache names snapshots by their commit


def download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Fetch files of one commit from the Hub, or find them in the cache."""
    offline = constants.HF_HUB_OFFLINE  # huggingface_hub 1.x asks for a commit's files even then
    how = {"revision": revision, "allow_patterns": [*patterns], "local_files_only": offline}
    try:
        return Path(snapshot_download(repository, **how))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}; give one of its branches, tags or commits."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a repository on the Hub; check the "
            "spelling, and set HF_TOKEN if it is private or gated."
        ) from error
    except Exception as error:  # no network, a proxy, a full disk: the same remedy
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repository}{at} is not complete in the cache {constants.HF_HUB_CACHE}, and could "
            f"not be fetched from {constants.ENDPOINT}. Go online and unset HF_HUB_OFFLINE, or run "
            f"`hf download {repository}` on a machine that is, and bring its cache. ({error})"
        ) from error
