"""Loading and saving: a folder or Hub id in either layout -> a model and its matching processor."""

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import BatchNorm2d, Parameter
from torch.overrides import TorchFunctionMode
from transformers import CLIPImageProcessorPil, GenerationConfig, GPTNeoConfig
from transformers.activations import ACT2FN

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.confidence import Calibration, Confidence
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.familiarity import Familiarity
from qvision_lab.model.loading import published, storage
from qvision_lab.model.loading.storage import STORED_DTYPES, CheckpointError, read_json
from qvision_lab.model.processor import QVisionProcessor, holds_tokenizer
from qvision_lab.model.towers import arrange, tower_defaults

WEIGHTS, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILIARITY, CONFIDENCE = "familiarity.safetensors", "confidence.json"
NEEDED_FILES = (
    *("config.json", "architecture.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *(WEIGHTS, SHARD_INDEX, "model-*.safetensors", FAMILIARITY, CONFIDENCE),
    *published.WEIGHT_FILES,
)
MOST = {"num_channels": 3, "max_position_embeddings": 2**14}  # GPT-Neo's masks have its square
POSITIVE, COLOUR = r"[0.]*[1-9][\d.e-]*", r"[\d.e-]+"
RULES = {  # patterns of values that are no sizes
    "attention_types": r"\[(\[\[('(global|local)'(, )?){1,99}\], \d{1,3}\](, )?){1,99}\]|None",
    "intermediate_size": r"[1-9]\d{,6}|None",
    "size": r"\{'(height|width)': \d+, '(height|width)': \d+\}",
    "image_mean": rf"\[{COLOUR}, {COLOUR}, {COLOUR}\]",
    "image_std": rf"\[{POSITIVE}, {POSITIVE}, {POSITIVE}\]",
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "temperature"), POSITIVE),
    **dict.fromkeys(("hidden_act", "activation_function"), "|".join(map(repr, ACT2FN))),
}
CONFIGS = {"vision_config": None, "text_config": GPTNeoConfig, "config": QVisionConfig}
# Files that a recipe adds: card, settings, scores and the curves of its stages.
COMPANIONS = ("README.md", "run.yaml", "scores.json", "vision.csv", "captioner.csv")
EMBEDDED = "scenes"  # the checkpoint that is loaded by default; it ships inside the package
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_DTYPES.values()}


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint came from."""

    source: str
    layout: str  # "published" or "native"
    revision: str | None  # the commit on the Hub
    files: dict[str, int]  # names and bytes
    dtype: str  # of the loaded weights


@dataclass(eq=False)
class Checkpoint:
    """A model in evaluation mode, the processor that matches it, and what is known of them."""

    model: QVisionForConditionalGeneration
    processor: QVisionProcessor
    provenance: Provenance | None = None
    familiarity: Familiarity | None = None  # of images; None: what it learned from is not known
    confidence: Confidence | None = None  # in the claims of captions; None: not calibrated


def load_checkpoint(
    source: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Checkpoint:
    """Load a captioner, in either layout, with its processor; the arguments are those of `ql.load`.

    Only safetensors are read, and no code is run. CheckpointError names the file, tensor or value
    that is wrong, and the remedy.
    """
    known = {**DTYPES, None: torch.float32, "auto": None}
    device, dtype = _find_device(device), known.get(dtype, dtype)
    if dtype not in known.values():
        raise CheckpointError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)} or auto.")
    source = EMBEDDED if source is None else source
    folder, commit = storage.locate(source, revision, NEEDED_FILES)
    layout, weight_files = _layout(folder)
    headers = storage.read_headers(weight_files)
    stored = {n: x for n, x in headers.items() if not published.KNOWN_LEFTOVERS.fullmatch(n)}
    if dtype is None:  # auto
        found = {tensor.dtype for tensor in stored.values()} & STORED_DTYPES.keys()
        if len(found) > 1:
            raise CheckpointError(f"dtype='auto', but the files have {len(found)}; choose one.")
        dtype = STORED_DTYPES[found.pop()] if found else torch.float32  # `_match` refuses others
    reader = storage.WeightReader(stored.values(), dtype, device)
    try:
        model, processor = _build(folder, layout, stored)
    except CheckpointError:
        raise
    except ImportError as error:  # it says what to install
        raise CheckpointError(f"{folder}: {error!s}") from error
    except Exception as error:  # of many kinds, since the libraries check settings too
        raise CheckpointError(f"{folder}: {error!s}; correct it or download it again.") from error
    _assign(model, reader.read(_match(model, stored, layout)))
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if _is_needed(p)}
    origin = Provenance(str(source), layout, commit, files, str(dtype).removeprefix("torch."))
    knowledge = _read_familiarity(folder, model), _read_confidence(folder, processor)
    return Checkpoint(model.eval(), processor, origin, *knowledge)


def save_checkpoint(
    checkpoint: Checkpoint,
    dest: str | os.PathLike,
    companions: Mapping[str, str] | None = None,
    push_to: str | None = None,
) -> Path:
    """Write the native layout, which `ql.load` and transformers' `from_pretrained` read.

    The write is atomic. An older checkpoint in `dest` is replaced together with its companions,
    texts by file name that belong to its weights, such as scores (README.md has the provenance by
    default); any other folder that is not empty is refused. `push_to` is a Hub id to upload it to.
    """
    dest = Path(dest)
    if dest.exists() and not dest.is_dir():
        raise CheckpointError(f"{dest} is a file; give a folder to write to.")
    present = {path.name for path in dest.iterdir()} if dest.exists() else set()
    foreign = {name for name in present if name not in COMPANIONS and not _is_needed(dest / name)}
    if foreign or (present and "config.json" not in present):
        raise CheckpointError(
            f"{dest} holds {min(foreign or present)}, so it is no checkpoint; give another folder."
        )
    new, old = (dest.with_name(f".{dest.name}.{age}-{os.getpid()}") for age in ("new", "old"))
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    origin = checkpoint.provenance or Provenance("a model in memory", "native", None, {}, dtype)
    texts = {"README.md": _model_card(origin), **(companions or {})}
    try:
        new.mkdir(parents=True)
        checkpoint.model.save_pretrained(new)
        checkpoint.processor.save_pretrained(new)
        if checkpoint.familiarity is not None:
            save_file(vars(checkpoint.familiarity), new / FAMILIARITY)
        if checkpoint.confidence is not None:
            texts[CONFIDENCE] = checkpoint.confidence.calibration.model_dump_json(indent=1)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        for path in new.iterdir():
            shutil.copymode(new / "README.md", path)  # safetensors makes its files private
            with path.open("rb+") as file:  # on the disk before older weights are deleted
                os.fsync(file.fileno())
        if present:
            dest.rename(old)
        new.replace(dest)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if push_to is not None:
        HfApi().create_repo(push_to, exist_ok=True)
        HfApi().upload_folder(repo_id=push_to, folder_path=dest)
    return dest


def convert(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    push_to: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint of either layout in the native one; its outputs stay bitwise the same.

    `dest` is a new or empty folder, or `source` itself; `dtype` is as stored by default. Copies of
    a weight that differ are refused. Companions (card, scores, curves) are copied.
    """
    wanted = (*NEEDED_FILES, *COMPANIONS, published.THIRD_COPY)
    folder, commit = storage.locate(source, revision, wanted)
    if (Path(dest) / "config.json").exists() and not folder.samefile(dest):
        raise CheckpointError(f"{dest} holds another checkpoint; give another folder or delete it.")
    companions = {}
    if _layout(folder)[0] == "published":
        published.check_copies(folder)
    else:
        present = [name for name in COMPANIONS if os.path.lexists(folder / name)]
        companions = {name: storage.read_text(folder / name) for name in present}
    checkpoint = load_checkpoint(source, commit, dtype or "auto", device="cpu")
    return save_checkpoint(checkpoint, dest, companions, push_to)


def _find_device(device: str | torch.device | None) -> torch.device:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=device).device  # raises where the device is missing
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise CheckpointError(
            f"device={str(device)!r} is not available ({str(error).splitlines()[0]}); use cpu, or "
            "cuda, cuda:N or mps with a PyTorch that was built for it."
        ) from error


def _layout(folder: Path) -> tuple[str, list[Path]]:
    """Layout of a folder, and its weight files."""
    if any(os.path.lexists(folder / name) for name in published.WEIGHT_FILES):
        return "published", [folder / name for name in published.WEIGHT_FILES]
    if os.path.lexists(folder / WEIGHTS):
        return "native", [folder / WEIGHTS]
    if os.path.lexists(folder / SHARD_INDEX):
        shards = read_json(folder / SHARD_INDEX, ("weight_map",))["weight_map"]
        names = sorted({*map(str, shards.values())}) if isinstance(shards, dict) else []
        if not names or not all(re.fullmatch(r"model-[\w-]+\.safetensors", name) for name in names):
            raise CheckpointError(f"{folder / SHARD_INDEX}: wrong weight_map; download it again.")
        return "native", [folder / name for name in names]
    raise CheckpointError(
        f"{folder} holds neither {' and '.join(published.WEIGHT_FILES)} nor {WEIGHTS}. Pickles "
        "(.bin, .pt, .pth) are never loaded, since they can run code: where you trust one, write "
        "its state dict with safetensors.torch.save_file."
    )


class _WithoutValues(TorchFunctionMode):
    """Skips what would give values to tensors on the meta device, half of the time to build."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tril or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _build(
    folder: Path, layout: str, stored: dict[str, storage.StoredTensor]
) -> tuple[QVisionForConditionalGeneration, QVisionProcessor]:
    """Model on the meta device and processor, checked to fit together."""
    if layout == "published":
        fields = published.read_fields(folder)
    else:
        fields = read_json(folder / "config.json", ("model_type", "vision_config", "text_config"))
        if fields["model_type"] != QVisionConfig.model_type:
            raise ValueError(f"model_type={fields['model_type']!r:.60} is not a QVision model")
    weights = sum(math.prod(tensor.shape) for tensor in stored.values())
    for part, kind in CONFIGS.items():  # the last one has the others
        found = fields.get(part, fields)
        if kind is None:
            usual = tower_defaults(found)
        else:
            usual = {name: getattr(kind, name, None) for name in kind.__annotations__}
        fields[part] = known_fields(part, found, usual, weights, len(stored) // 8)
    config = QVisionConfig(**fields["config"] | {"tie_word_embeddings": True})
    with torch.device("meta"), _WithoutValues():
        model = QVisionForConditionalGeneration(config)
    if os.path.lexists(path := folder / "generation_config.json"):
        fields = known_fields(path.name, read_json(path), vars(model.generation_config), weights)
        model.generation_config = GenerationConfig(**fields)
    if layout == "published":
        tokenizer = published.read_tokenizer(folder, config)
        return model, QVisionProcessor.from_config(config, tokenizer)
    tokenizer = storage.read_tokenizer(folder) if holds_tokenizer(folder) else None
    processor = QVisionProcessor.from_config(config, tokenizer)
    path, usual = folder / "preprocessor_config.json", processor.image_processor.to_dict()
    fields = known_fields(path.name, read_json(path), usual, weights)
    processor.image_processor = CLIPImageProcessorPil(**fields)
    processor.check_fits(config)
    return model, processor


def known_fields(source: str, fields: dict, usual: dict, most: int, blocks: int = 0) -> dict:
    """Fields that `usual` has too (transformers would keep any other), with plausible values."""
    if not isinstance(fields, dict):
        raise ValueError(f"{source}={fields!s:.60} has no fields")
    known = {name: x for name, x in fields.items() if name in usual and (x is not None or blocks)}
    for name, value in known.items():
        limit = blocks if name.endswith(("_layers", "_blocks")) else MOST.get(name, most)
        right = re.fullmatch(RULES.get(name, "(?s:.*)"), repr(value))
        if type(usual[name]) is int and name != "eos_token_id":  # of which there may be several
            least = 1 if blocks and not name.endswith("_id") else 0
            right = type(value) is int and least <= value <= limit
        if not right:
            raise ValueError(f"{source}: {name}={value!s:.60} cannot be (numbers: up to {limit:,})")
    return known


def _match(
    model: QVisionForConditionalGeneration, stored: dict[str, storage.StoredTensor], layout: str
) -> dict[str, storage.StoredTensor]:
    """The stored tensor of each parameter; missing, misshapen and unknown ones are refused."""
    matched = {}
    ends = "running_mean", "running_var"  # of a tower's batch normalisation
    statistics = {name: x for name, x in model.named_buffers() if name.endswith(ends)}
    # Of parameters without the tied output layer.
    for name, parameter in (dict(model.named_parameters()) | statistics).items():
        key = published.stored_name(name) if layout == "published" else name
        if (tensor := stored.pop(key, None)) is None:
            raise CheckpointError(f"tensor {key} is missing from the {layout} weights: copy them.")
        if tensor.shape != parameter.shape or tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"tensor {key} in {tensor.file} has shape {list(tensor.shape)} in {tensor.dtype}, "
                f"but config.json asks for {list(parameter.shape)}, in {' or '.join(STORED_DTYPES)}"
                "; one of the two files belongs to another model: download both again."
            )
        matched[name] = tensor
    if stored:
        raise CheckpointError(
            f"{len(stored)} tensors have no place in this model, {min(stored)} first; copy it again"
        )
    return matched


def _assign(model: QVisionForConditionalGeneration, weights: dict[str, Tensor]) -> None:
    """Give a model on the meta device its weights, and recompute its buffers."""
    modules = dict(model.named_modules())  # `load_state_dict` takes three times as long
    for place, values in weights.items():  # all but the tied head
        owner, _, name = place.rpartition(".")
        if name in (parameters := modules[owner]._parameters):
            parameters[name] = Parameter(values)
        else:
            modules[owner]._buffers[name] = values
    model.tie_weights()
    model.config.dtype, device = model.dtype, model.device
    for module in arrange(model.vision.tower).modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.num_positions, device=device)[None]
        elif isinstance(module, BatchNorm2d):
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=device)
    # GPT-Neo has a mask of 4 MB in every layer, but only two different ones: they are shared.
    text = model.config.text_config
    square = (1, 1, text.max_position_embeddings, text.max_position_embeddings)
    causal = torch.ones(square, dtype=torch.bool, device=device).tril()
    masks = {"global": causal, "local": causal.triu(1 - text.window_size)}
    for block in model.decoder.language_model.h:
        block.attn.attention.bias = masks[block.attn.attention_type]


def _read_familiarity(folder: Path, model: QVisionForConditionalGeneration) -> Familiarity | None:
    """What a checkpoint knows of its images; CheckpointError where it does not fit the model."""
    path, width = folder / FAMILIARITY, model.config.vision_config.hidden_size
    if not os.path.lexists(path):
        return None
    stored = storage.read_headers([path])
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    found = shapes.pop("components", ())
    fits = len(found) == 2 and found[0] <= found[1] == width
    if not fits or shapes != {"mean": (width,), "limit": ()}:
        raise CheckpointError(f"{path} does not fit width {width}; delete or download it again.")
    reader = storage.WeightReader(stored.values(), torch.float32, torch.device("cpu"))
    return Familiarity(**reader.read(stored))


def _read_confidence(folder: Path, processor: QVisionProcessor) -> Confidence | None:
    """Calibrated confidence in claims; CheckpointError where it does not fit the tokenizer."""
    if not os.path.lexists(path := folder / CONFIDENCE) or processor.tokenizer is None:
        return None
    stored = read_json(path)
    try:
        return Confidence(Calibration.model_validate(stored), processor.tokenizer)
    except ValueError as error:
        problem = " ".join(str(error).split()).partition(" [type=")[0]
        raise CheckpointError(f"{path} does not fit: {problem}; delete or download it.") from error


def _is_needed(path: Path) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in NEEDED_FILES)


def _model_card(origin: Provenance) -> str:
    source = Path(origin.source).name if Path(origin.source).exists() else origin.source
    commit = f" at commit `{origin.revision}`" if origin.revision else ""
    return f"""---
library_name: qvision_lab
pipeline_tag: image-to-text
---
# QVision captioner

Written by `qvision_lab` from `{source}`{commit} ({origin.layout} layout, {origin.dtype}).
Its terms of use, training data and limits are those of that checkpoint. To load it:
`captioner = qvision_lab.load("this folder")`.
"""
