"""Cost of loading in time, reading and memory: ours, transformers', and the card's snippet."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from qvision_lab.benchmark.harness import Spread, Table, growing_table, machine, process_bytes
from qvision_lab.benchmark.latency import BATCH, GREEDY, timed_model
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.loading import published
from qvision_lab.model.loading.checkpoint import load_checkpoint
from qvision_lab.model.processor import QVisionProcessor

ROUNDS = 3
CARD, OURS = "the card's snippet", "ql.load"
NATIVE, TRANSFORMERS = "ql.load, native layout", "from_pretrained, native layout"
METHODS = (  # with the dtype; the first is the baseline
    *((CARD, "float32"), (OURS, "float32"), (OURS, "bfloat16")),
    *((TRANSFORMERS, "float32"), (NATIVE, "float32")),
    *((TRANSFORMERS, "bfloat16"), (NATIVE, "bfloat16")),
)
FILES = (*published.WEIGHT_FILES, published.THIRD_COPY)


@dataclass(frozen=True)
class Load:
    """One load in a process of its own; memory is above that before it. Linux alone counts it."""

    seconds: float  # until every weight has been read once
    gigabytes_read: float  # from the disk
    resident_gigabytes: float  # with every weight read
    peak_gigabytes: float
    captioning_gigabytes: float  # the peak after captions of a batch of 16


@dataclass(frozen=True)
class LoadingRow:
    """One method of loading, in turn with the others."""

    way: str
    dtype: str
    gigabytes_needed: float  # of the weights
    ratio_to_card: float  # how many times as fast: median over the rounds
    spread: Spread
    seconds: list[float]  # with the files in memory
    loads: list[Load]  # all of them; the first found the files on disk


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Load a checkpoint in both layouts, each time in a new process, on the CPU.

    The published layout has all its copies. The card's snippet builds CLIP and GPT-Neo with random
    weights (it downloads them), reads all three files and copies each over the model.
    """
    about = {"quick": quick, "settings": GREEDY, "machine": machine(gpu=False)}
    return growing_table("loading", _rows(captioner, quick), **about)


def _rows(captioner: Captioner, quick: bool) -> Iterator[LoadingRow]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the processes shall not download a tokenizer
    loads: dict[tuple[str, str], list[Load]] = {method: [] for method in METHODS}
    with TemporaryDirectory() as temporary:
        model, folder = timed_model(captioner, quick), Path(temporary)
        write_published(folder, model)
        model.save_pretrained(folder / "native")
        QVisionProcessor.from_config(model.config).save_pretrained(folder / "native")
        size = model.num_parameters()
        del model
        for number in range(1 if quick else 1 + ROUNDS):
            for method in METHODS:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    run = pool.submit(load_once, folder, *method, cold=number == 0)
                    loads[method].append(run.result())
    warm = {method: [load.seconds for load in loads[method]][not quick :] for method in METHODS}
    for way, dtype in METHODS:
        seconds = warm[way, dtype]
        yield LoadingRow(
            way,
            dtype,
            gigabytes_needed=size * getattr(torch, dtype).itemsize / 1e9,
            ratio_to_card=Spread.ratio(warm[METHODS[0]], seconds).median,
            spread=Spread.of(seconds),
            seconds=seconds,
            loads=loads[way, dtype],
        )


@torch.no_grad()
def load_once(folder: Path, way: str, dtype: str, cold: bool) -> Load:
    """Load, read every weight, and caption; `cold` drops the files from memory before."""
    for path in folder.rglob("*.safetensors") if cold and hasattr(os, "posix_fadvise") else ():
        with open(path, "rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read, before = process_bytes("io", "read_bytes"), process_bytes("status", "VmRSS")
    start = perf_counter()
    if way == CARD:
        model = load_the_cards_way(folder)
    elif way == TRANSFORMERS:
        model = QVisionForConditionalGeneration.from_pretrained(folder / "native", dtype=dtype)
    else:
        source = folder / "native" if way == NATIVE else folder
        model = load_checkpoint(source, dtype=dtype, device="cpu").model
    for parameter in model.parameters():
        parameter.sum()
    seconds = perf_counter() - start
    read = process_bytes("io", "read_bytes") - read
    resident = process_bytes("status", "VmRSS") - before
    peak = process_bytes("status", "VmHWM") - before
    side = model.config.vision_config.image_size
    model.generate(pixel_values=torch.randn(BATCH, 3, side, side, dtype=model.dtype), **GREEDY)
    captioning = process_bytes("status", "VmHWM") - before
    return Load(seconds, *(count / 1e9 for count in (read, resident, peak, captioning)))


def write_published(folder: Path, model: QVisionForConditionalGeneration) -> None:
    """Write a model in the published layout, with CLIP's text tower and all copies."""
    config = model.config
    weights = {published.stored_name(name): w.detach() for name, w in model.named_parameters()}
    weights["gpt_decoder.lm_head.weight"] = model.decoder.lm_head.weight.detach().clone()
    encoder, decoder, third = {}, {}, {}
    for name, weight in weights.items():
        if name.startswith(("vision.", "proj.")):
            encoder[name] = weight
            if name.startswith("vision."):
                encoder[f"clip.vision_model.{name.removeprefix('vision.')}"] = weight.clone()
            continue
        decoder[name] = weight
        if name.startswith("gpt_decoder."):
            third[name.removeprefix("gpt_decoder.")] = weight
    text = _text_tower(config.vision_config.hidden_size).state_dict()
    encoder |= {f"clip.text_model.{name}": weight for name, weight in text.items()}
    for name, part in zip(FILES, (encoder, decoder, third), strict=True):
        save_file(part, folder / name)
    sizes = {"embed_size": config.hidden_size, "vocab_size": config.vocab_size}
    sizes["num_img_tokens"] = config.num_query_tokens
    names = ("num_qformer_blocks", "start_token_id", "end_token_id", "pad_token_id")
    more = {name: getattr(config, name) for name in names}
    more["qformer_num_heads"] = config.num_attention_heads
    more |= {name: getattr(config, name).to_dict() for name in ("vision_config", "text_config")}
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "architecture.json").write_text(json.dumps(more))


def load_the_cards_way(folder: Path) -> QVisionForConditionalGeneration:
    """Build everything with weights of its own, then copy the three files over it."""
    config = published.read_config(folder)
    model = QVisionForConditionalGeneration(config)
    text = _text_tower(config.vision_config.hidden_size)
    ours = {published.stored_name(name): name for name, _ in model.named_parameters()}
    for file in FILES:
        known, words = {}, {}
        for name, weight in load_file(folder / file).items():
            name = re.sub(r"^transformer", "gpt_decoder.transformer", name)
            if name in ours:
                known[ours[name]] = weight
            words[name.removeprefix("clip.text_model.")] = weight
        model.load_state_dict(known, strict=False)
        text.load_state_dict(words, strict=False)
    return model.eval()


def _text_tower(width: int) -> CLIPTextModel:
    """CLIP's of ViT-B/32; a small one for a small model."""
    small = {} if width == 768 else {"hidden_size": 16, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(**small))
