"""Finding the files of a checkpoint, here or on the Hub, and reading them, headers first."""

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
    """A checkpoint that cannot be loaded or written; the message says why, and the way out."""


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says about one tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as the header has it, such as "F32"

    def read(self) -> Tensor:
        """The tensor, mapped from its file. The mapping is its own and ends with the tensor."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors in safetensors files; their data stays unread."""
    stored = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy or download the checkpoint again.")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    header = file.get_slice(name)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    stored[name] = StoredTensor(path, name, shape, dtype)
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

    What stays on the CPU in the dtype of its file stays in the file: mapped, and not copied.
    Otherwise each tensor gets a mapping of its own, which ends before the next one is read, since
    mapped pages count as resident memory for as long as the mapping lives.
    """
    mapped = {path: safe_open(path, "pt") for path in {tensor.file for tensor in stored.values()}}
    tensors = {}
    for name, tensor in stored.items():
        stays = STORED_DTYPES[tensor.dtype] == dtype and device.type == "cpu"
        found = mapped[tensor.file].get_tensor(tensor.name) if stays else tensor.read()
        tensors[name] = found.to(device=device, dtype=dtype)
    return tensors


def read_json(path: Path, fields: tuple[str, ...] = ()) -> dict:
    """Content of a JSON file that must have some fields."""
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
    """The folder of a checkpoint (None: the embedded one) and its commit where the Hub has it.

    From the Hub only files that match `patterns` are fetched.
    """
    if source is None:
        source = str(resources.files("qvision_lab") / "scenes_checkpoint")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} needs a Hub id, but {source} is a folder."
            )
        return folder, None
    if folder.exists():
        raise CheckpointError(f"{source} is a file; give the folder that it lies in.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise CheckpointError(
            f"there is no folder {source}; give an existing one, or a Hub id (owner/name)."
        )
    snapshot = download(str(source), revision, patterns)
    return snapshot, snapshot.name  # the cache names snapshots by their commit


def download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Fetch files of one commit from the Hub, or find them in the cache."""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}; give one of its branches, tags or commits."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a repository that the Hub lets you read; "
            "check the spelling, and set HF_TOKEN if it is private or gated."
        ) from error
    except Exception as error:  # no network, a proxy, a full disk: one way out
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repository}{at} is not complete in the cache {constants.HF_HUB_CACHE}, and could "
            f"not be fetched from {constants.ENDPOINT}. Go online and unset HF_HUB_OFFLINE, or run "
            f"`hf download {repository}` on a machine that is, and bring its cache. ({error})"
        ) from error
