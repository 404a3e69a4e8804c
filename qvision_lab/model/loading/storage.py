"""Files of a checkpoint: found in a folder or on the Hub, and read, headers first."""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Checkpoints that ship inside the package, and what they learned from.
SHIPPED = {"scenes": "drawn scenes", "photos": "photographs"}
TEXT_BYTES = 2**25  # at most, of a text file; GPT-2's tokenizer has 1.4 million
TOKEN_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token", "clean_up_tokenization_spaces")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or written; the message has the reason and a remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """Entry of a safetensors header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # such as "F32"
    start: int  # of its bytes in the file
    stop: int

    def read(self) -> Tensor:
        """The tensor, in a separate memory mapping, which is closed with the tensor."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)

    def view(self, mapped: dict[Path, UntypedStorage]) -> Tensor:
        """The tensor in a mapping of its file that it shares."""
        values = torch.empty(0, dtype=STORED_DTYPES[self.dtype])
        return values.set_(mapped[self.file][self.start : self.stop], 0, self.shape)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Entries of all tensors in safetensors files, by name; their data is not read."""
    stored = {}
    for path in files:
        require_file(path)
        try:
            with safe_open(path, "pt"), path.open("rb") as file:  # the former checks the header
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name in stored:
                    raise CheckpointError(f"{path}: {name} is in another file too; delete one.")
                if name != "__metadata__":
                    ends = (8 + length + offset for offset in entry["data_offsets"])
                    shape = tuple(entry["shape"])
                    stored[name] = StoredTensor(path, name, shape, entry["dtype"], *ends)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size:,} bytes) is truncated or no safetensors file "
                f"({error}); copy or download it again. Pickles are never loaded."
            ) from error
    return stored


class WeightReader:
    """Reads tensors in a dtype onto a device; CheckpointError unless all values are finite.

    On the CPU in the dtype of the file, tensors stay memory-mapped, and a thread begins to check
    them at once, while a model is built. All others are read through a mapping each, since mapped
    pages count as resident memory until their mapping ends.
    """

    def __init__(self, stored: Iterable[StoredTensor], dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        staying = [tensor for tensor in stored if self._stays(tensor)]
        self.mapped = {
            file: UntypedStorage.from_file(str(file), False, file.stat().st_size)
            for file in {tensor.file for tensor in staying}
        }
        pool = ThreadPoolExecutor(1)
        self.sums = pool.submit(lambda: [run.view(self.mapped).sum() for run in _runs(staying)])
        pool.shutdown(wait=False)

    def read(self, stored: dict[str, StoredTensor]) -> dict[str, Tensor]:
        """The tensors by name; they are some of those that the reader was made for."""
        tensors = {
            name: tensor.view(self.mapped) if self._stays(tensor) else self._convert(tensor)
            for name, tensor in stored.items()
        }
        converted = [tensors[name] for name, tensor in stored.items() if not self._stays(tensor)]
        sums = torch.stack([*self.sums.result(), *(x.sum() for x in converted)])  # in float32
        if not sums.isfinite().all():  # rarely, so that a load takes the time of sums
            for tensor in [stored[name] for name, x in tensors.items() if not x.isfinite().all()]:
                where = f"tensor {tensor.name} in {tensor.file}"
                raise CheckpointError(
                    f"{where} is not finite in {self.dtype}; copy it, or load float32."
                )
        return tensors

    def _stays(self, tensor: StoredTensor) -> bool:
        return self.device.type == "cpu" and STORED_DTYPES.get(tensor.dtype) == self.dtype

    def _convert(self, tensor: StoredTensor) -> Tensor:
        return tensor.read().to(device=self.device, dtype=self.dtype)


def _runs(stored: list[StoredTensor]) -> list[StoredTensor]:
    """Neighbours in a file as one flat tensor: few long sums, which leave Python to the model."""
    runs: list[StoredTensor] = []
    for tensor in sorted(stored, key=lambda tensor: (str(tensor.file), tensor.start)):
        if runs and (runs[-1].file, runs[-1].stop) == (tensor.file, tensor.start):
            tensor = replace(runs.pop(), stop=tensor.stop)
        size = (tensor.stop - tensor.start) // STORED_DTYPES[tensor.dtype].itemsize
        runs.append(replace(tensor, shape=(size,)))
    return runs


def require_file(path: Path) -> None:
    """Raise CheckpointError unless a path is a regular file inside its checkpoint."""
    if not path.is_file():
        state = "is no regular file" if os.path.lexists(path) else "is missing"
        raise CheckpointError(f"{path} {state}; copy or download the checkpoint again.")
    inside = [folder := path.parent.resolve()]
    if folder.parent.name == "snapshots":  # of the Hub's cache, where links lead to blobs
        inside += [parent / "blobs" for parent in folder.parents[1:3]]
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise CheckpointError(f"{path} is a link that leaves the checkpoint; copy the file itself.")


def read_text(path: Path) -> str:
    """Content of a text file of a checkpoint."""
    require_file(path)
    try:
        if path.stat().st_size > TEXT_BYTES:
            raise ValueError(f"more than {TEXT_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no text ({error}); copy or download it again.") from error


def read_json(path: Path, fields: tuple[str, ...] = ()) -> dict:
    """Content of a JSON file: an object that must have these fields; none occurs twice."""
    text = read_text(path)
    try:
        if not isinstance(content := json.loads(text, object_pairs_hook=_unique), dict):
            raise ValueError(f"a {type(content).__name__} in place of fields")
        json.dumps(content, allow_nan=False)  # raises
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); copy or download it again.") from error
    for field in fields:
        if field not in content:
            raise CheckpointError(f"{path} has no field {field!r}; add it or download it again.")
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError("a field occurs twice")
    return content


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of a folder, of one class whatever its files say."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    fields = read_json(settings) if os.path.lexists(settings) else {}
    known = {name: fields[name] for name in TOKEN_FIELDS if fields.get(name) is not None}
    known |= {name: x.get("content") for name, x in known.items() if isinstance(x, dict)}
    try:
        if os.path.lexists(path):
            content, kind = read_json(path), PreTrainedTokenizerFast
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
            ids, source = {**content["model"]["vocab"], **added}, {"tokenizer_file": str(path)}
        else:
            ids, kind = read_json(path := folder / "vocab.json"), GPT2Tokenizer
            require_file(merges := folder / "merges.txt")
            source = {"vocab": ids, "merges": str(merges)}
        if max(ids.values()) >= len(ids):  # the library allocates as many
            raise ValueError("ids beyond its size")
        return kind(**source, **known)
    except Exception as error:  # the library has no narrower one
        raise CheckpointError(f"{path}, or its settings: {error}; download both.") from error


def locate(
    source: str | os.PathLike, revision: str | None, patterns: tuple[str, ...]
) -> tuple[Path, str | None]:
    """Folder of a checkpoint, embedded or not, and its commit if it is on the Hub."""
    if source in SHIPPED:
        source = str(resources.files("qvision_lab") / f"{source}_checkpoint")
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
