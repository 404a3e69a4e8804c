"""The published layout: three safetensors files with most weights two or three times."""

import os
import re
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from qvision_lab.model.config import PUBLISHED_TEXT_CONFIG, QVisionConfig
from qvision_lab.model.loading import storage
from qvision_lab.model.loading.storage import CheckpointError, download, read_headers, read_json
from qvision_lab.model.processor import holds_tokenizer

WEIGHT_FILES = ("encoder.safetensors", "decoder.safetensors")
THIRD_COPY = "gpt_decoder.safetensors"  # of GPT-Neo; only `convert` reads it

# Stored, but not needed: a copy of all of CLIP, an unused layer, the tied copy of the token
# embedding, and buffers of older versions of transformers.
KNOWN_LEFTOVERS = re.compile(
    r"(clip|query_proj)\..+|.+\.(position_ids|num_batches_tracked)|.+\.attn\.attention\.(bias|masked_bias)"
    r"|gpt_decoder\.lm_head\.weight"
)

GPT2_REPOSITORY = "openai-community/gpt2"
SPECIAL_TOKENS = {"bos_token": "<START>", "eos_token": "<END>", "pad_token": "<|endoftext|>"}


def read_fields(folder: Path) -> dict:
    """Sizes from `config.json`; all others are the published ones or in `architecture.json`."""
    sizes = read_json(folder / "config.json", ("embed_size", "vocab_size", "num_img_tokens"))
    architecture = folder / "architecture.json"
    more = read_json(architecture) if os.path.lexists(architecture) else {}
    given = {"hidden_size": sizes["embed_size"], "vocab_size": sizes["vocab_size"]}
    text = more.get("text_config", PUBLISHED_TEXT_CONFIG)
    more["text_config"] = {**text, **given} if isinstance(text, dict) else text
    more["num_attention_heads"] = more.pop("qformer_num_heads", 8)
    return {**more, "num_query_tokens": sizes["num_img_tokens"]}


def stored_name(name: str) -> str:
    """Name in the published files of a parameter of `QVisionForConditionalGeneration`."""
    if block := re.fullmatch(r"qformer\.blocks\.(\d+)\.(self|cross)_(\w+)\.(.+)", name):
        kind, layer, rest = block[2], block[3], block[4]
        ffn = 2 * int(block[1]) + (kind == "cross")  # each has two norms
        return {
            "attention": f"{kind}_attention_layers.{block[1]}.{rest}",
            "attention_norm": f"layer_norms.{2 * ffn}.{rest}",
            "ffn_norm": f"layer_norms.{2 * ffn + 1}.{rest}",
            "ffn": f"ffn_layers.{ffn}.{rest}",
        }[layer]
    renamed = {
        "vision.tower.": "vision.",
        "vision.projection.": "proj.",
        "qformer.global_token": "img_context",
        "qformer.": "",
        "decoder.bridge.attention.": "decoder_cross_attn.",
        "decoder.bridge.attention_norm.": "decoder_cross_attn_norm.",
        "decoder.bridge.ffn.": "decoder_cross_attn_ffn.",
        "decoder.bridge.ffn_norm.": "decoder_cross_attn_norm2.",
        "decoder.bridge.scale": "cross_scale",
        "decoder.language_model.": "gpt_decoder.transformer.",
    }
    ours = next(prefix for prefix in renamed if name.startswith(prefix))
    return renamed[ours] + name.removeprefix(ours)


def read_tokenizer(folder: Path, config: QVisionConfig) -> PreTrainedTokenizerFast | None:
    """GPT-2's tokenizer with `<START>` and `<END>`: the checkpoint's own, else the Hub's.

    None for other vocabularies than GPT-2's, and, with a warning, where the Hub is out of reach.
    """
    if not holds_tokenizer(folder):
        if config.vocab_size != PUBLISHED_TEXT_CONFIG["vocab_size"]:
            return None
        try:
            folder = download(GPT2_REPOSITORY, None, ("tokenizer.json",))
        except CheckpointError as error:
            warnings.warn(f"loaded without a tokenizer, for ids only: {error}", stacklevel=3)
            return None
    tokenizer = storage.read_tokenizer(folder)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def check_copies(folder: Path) -> None:
    """CheckpointError if two copies of a weight differ: the original code may use either one."""
    third = (THIRD_COPY,) if os.path.lexists(folder / THIRD_COPY) else ()
    stored = read_headers(folder / name for name in (*WEIGHT_FILES, *third))
    for name, copy in stored.items():
        name = name.replace("clip.vision_model.", "vision.")
        name = re.sub(r"^(gpt_decoder\.)?lm_head", "transformer.wte", name)
        name = re.sub(r"^transformer\.", "gpt_decoder.transformer.", name)
        original = stored.get(name, copy)
        if copy != original and not torch.equal(copy.read(), original.read()):
            raise CheckpointError(
                f"two copies of one weight differ: {copy.name} in {copy.file.name} and "
                f"{original.name} in {original.file.name}. Find out which one is right, and "
                "write it to both."
            )
