"""The published layout: three safetensors files that hold most weights two or three times."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from transformers import GPT2Tokenizer

from qvision_lab.model.config import PUBLISHED_TEXT_CONFIG, QVisionConfig
from qvision_lab.model.loading.storage import CheckpointError, download, read_headers, read_json
from qvision_lab.model.processor import holds_tokenizer

WEIGHT_FILES = ("encoder.safetensors", "decoder.safetensors")
THIRD_COPY = "gpt_decoder.safetensors"  # GPT-Neo once more; nothing but `convert` reads it

# Beside the weights of a captioner: all of CLIP once more, an unused layer, the tied copy of the
# token embedding, and buffers that older versions of transformers stored.
KNOWN_LEFTOVERS = re.compile(
    r"(clip|query_proj)\..+|.+\.position_ids|.+\.attn\.attention\.(bias|masked_bias)"
    r"|gpt_decoder\.lm_head\.weight"
)

GPT2_REPOSITORY = "openai-community/gpt2"
SPECIAL_TOKENS = {"bos_token": "<START>", "eos_token": "<END>", "pad_token": "<|endoftext|>"}


def read_config(folder: Path) -> QVisionConfig:
    """Sizes from `config.json`, and from `architecture.json` where they are not ViT-B/32's."""
    fields = ("embed_size", "vocab_size", "num_img_tokens")
    sizes = read_json(folder / "config.json", fields)
    width, vocabulary, queries = (sizes[field] for field in fields)
    architecture = folder / "architecture.json"
    more = read_json(architecture) if architecture.exists() else {}
    text = more.pop("text_config", PUBLISHED_TEXT_CONFIG)
    more["text_config"] = {**text, "hidden_size": width, "vocab_size": vocabulary}
    more["num_attention_heads"] = more.pop("qformer_num_heads", 8)
    return QVisionConfig(num_query_tokens=queries, **more)


def stored_name(name: str) -> str:
    """What the published files call a parameter of `QVisionForConditionalGeneration`."""
    block = re.fullmatch(r"qformer\.blocks\.(\d+)\.(self|cross)_(\w+)\.(.+)", name)
    if block:
        index, is_cross = int(block[1]), block[2] == "cross"
        return {
            "attention": f"{block[2]}_attention_layers.{index}.{block[4]}",
            "attention_norm": f"layer_norms.{4 * index + 2 * is_cross}.{block[4]}",
            "ffn_norm": f"layer_norms.{4 * index + 2 * is_cross + 1}.{block[4]}",
            "ffn": f"ffn_layers.{2 * index + is_cross}.{block[4]}",
        }[block[3]]
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


def read_tokenizer(folder: Path, config: QVisionConfig) -> GPT2Tokenizer | None:
    """GPT-2's tokenizer with `<START>` and `<END>`: the checkpoint's own, else the Hub's.

    None where none can fit, as with vocabularies other than GPT-2's; where one would fit but cannot
    be had, a warning says so, since the model works on ids without it.
    """
    if not holds_tokenizer(folder):
        if config.vocab_size != PUBLISHED_TEXT_CONFIG["vocab_size"]:
            return None
        try:
            folder = download(GPT2_REPOSITORY, None, ("tokenizer.json",))
        except CheckpointError as error:
            warnings.warn(f"loaded without a tokenizer, so without words: {error}", stacklevel=3)
            return None
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def check_copies(folder: Path) -> None:
    """Raise CheckpointError if two copies of a weight differ, naming the tensor.

    The original code loads all of them over each other, so it may have used either one.
    """
    third = (THIRD_COPY,) if (folder / THIRD_COPY).exists() else ()
    stored = read_headers(folder / name for name in (*WEIGHT_FILES, *third))
    for name, copy in stored.items():
        name = name.replace("clip.vision_model.", "vision.")
        name = re.sub(r"^(gpt_decoder\.)?lm_head", "transformer.wte", name)
        name = re.sub(r"^transformer\.", "gpt_decoder.transformer.", name)
        original = stored.get(name, copy)
        if copy != original and not torch.equal(copy.read(), original.read()):
            raise CheckpointError(
                f"two copies of one weight differ: {copy.name} in {copy.file.name} and "
                f"{original.name} in {original.file.name}. Find out which one the model was meant "
                "to have, and make both that."
            )
