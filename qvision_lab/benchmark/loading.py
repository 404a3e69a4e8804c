"""What loading costs in time, reading and memory: ours, and the way of the card's snippet."""

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

import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from qvision_lab.benchmark.harness import Spread, Table, growing_table
from qvision_lab.benchmark.latency import BATCH, GREEDY, timed_model
from qvision_lab.captioning import Captioner
from qvision_lab.model import published
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.checkpoint import load_checkpoint

ROUNDS = 3
CARD = "the card's way"
WAYS = ((CARD, "float32"), ("ql.load", "float32"), ("ql.load", "bfloat16"))
FILES = (*published.WEIGHT_FILES, published.THIRD_COPY)


@dataclass(frozen=True)
class Load:
    """One load in a process of its own; bytes are above those before it."""

    seconds: float  # until every weight has been read once
    bytes_read: int | None  # from the disk, where it was not in memory (on Linux)
    resident: int  # with every weight read
    peak: int | None  # on Linux
    captioning_peak: int | None  # after captions of 16 pictures at once


@dataclass(frozen=True)
class LoadingRow:
    """One way to load, in turn with the others; gigabytes above those before loading."""

    way: str
    dtype: str
    seconds: list[float]  # with the files in memory
    spread: Spread
    ratio_to_card: float  # how many times as fast: median over the rounds
    gigabytes_needed: float  # of the loaded weights
    cold: Load  # with the files on disk
    resident_gigabytes: float
    peak_gigabytes: float | None

    def __str__(self) -> str:
        return (
            f"{self.way}, {self.dtype}: {self.spread} s, {self.ratio_to_card:.3g} times as fast as "
            f"the card's way; {self.resident_gigabytes:.2f} GB for {self.gigabytes_needed:.2f}"
        )


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Load a checkpoint in the published layout, with all its copies, every time in a new process.

    The card's way builds CLIP and GPT-Neo with random weights (its snippet downloads them), reads
    all three files and copies each over the model.
    """
    return growing_table("loading", _rows(captioner, quick), quick=quick, settings=GREEDY)


def _rows(captioner: Captioner, quick: bool) -> Iterator[LoadingRow]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the processes shall not look for a tokenizer
    with TemporaryDirectory() as temporary:
        model = timed_model(captioner, quick)
        write_published(Path(temporary), model)
        parameters = model.num_parameters()
        del model
        cold = {way: _measure(temporary, *way, cold=True) for way in WAYS}
        rounds = [cold] if quick else []
        for _ in range(0 if quick else ROUNDS):
            rounds.append({way: _measure(temporary, *way, cold=False) for way in WAYS})
    card = [loads[WAYS[0]].seconds for loads in rounds]
    for way, dtype in WAYS:
        loads = [loads[way, dtype] for loads in rounds]
        seconds = [load.seconds for load in loads]
        yield LoadingRow(
            way,
            dtype,
            seconds,
            Spread.of(seconds),
            ratio_to_card=Spread.ratio(card, seconds).median,
            gigabytes_needed=parameters * getattr(torch, dtype).itemsize / 1e9,
            cold=cold[way, dtype],
            resident_gigabytes=max(load.resident for load in loads) / 1e9,
            peak_gigabytes=max(load.peak or 0 for load in loads) / 1e9 or None,
        )


def _measure(folder: str, way: str, dtype: str, cold: bool) -> Load:
    """Load in a new process."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(load_once, Path(folder), way, dtype, cold).result()


@torch.no_grad()
def load_once(folder: Path, way: str, dtype: str, cold: bool) -> Load:
    """Load and read every weight; `cold` first has the files leave memory, and captions after."""
    if cold and hasattr(os, "posix_fadvise"):
        for name in FILES:
            with open(folder / name, "rb") as file:
                os.fsync(file)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    process = psutil.Process()
    read, resident = _bytes_read(process), process.memory_info().rss
    start = perf_counter()
    if way == CARD:
        model = load_the_cards_way(folder)
    else:
        model = load_checkpoint(folder, dtype=dtype, device="cpu").model
    for parameter in model.parameters():
        parameter.sum()
    seconds = perf_counter() - start
    read = _bytes_read(process) - read if cold and read is not None else None
    growth, peak = process.memory_info().rss - resident, _peak(resident)
    if cold:
        side = model.config.vision_config.image_size
        pixels = torch.randn(BATCH, 3, side, side, dtype=model.dtype)
        model.generate(pixel_values=pixels, **GREEDY)
    return Load(seconds, read, growth, peak, _peak(resident) if cold else None)


def _bytes_read(process: psutil.Process) -> int | None:
    return process.io_counters().read_bytes if hasattr(process, "io_counters") else None


def _peak(before: int) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before


def write_published(folder: Path, model: QVisionForConditionalGeneration) -> None:
    """Write a model in the published layout, with CLIP's text tower and all copies."""
    config = model.config
    stored = {published.stored_name(name): w.detach() for name, w in model.named_parameters()}
    encoder = {name: w for name, w in stored.items() if name.startswith(("vision.", "proj."))}
    decoder = {name: w for name, w in stored.items() if name not in encoder}
    decoder["gpt_decoder.lm_head.weight"] = stored["gpt_decoder.transformer.wte.weight"].clone()
    third = {
        name.removeprefix("gpt_decoder."): w.clone()
        for name, w in decoder.items()
        if name.startswith("gpt_decoder.")
    }
    text = CLIPTextModel(_text_config(config.vision_config.hidden_size)).state_dict()
    encoder |= {f"clip.{n}": w.clone() for n, w in encoder.items() if n.startswith("vision.")}
    encoder |= {f"clip.text_model.{name}": w for name, w in text.items()}
    encoder = {re.sub(r"^clip\.vision\.", "clip.vision_model.", n): w for n, w in encoder.items()}
    for name, weights in zip(FILES, (encoder, decoder, third), strict=True):
        save_file(weights, folder / name)
    sizes = {"embed_size": config.hidden_size, "vocab_size": config.vocab_size}
    sizes["num_img_tokens"] = config.num_query_tokens
    names = ("num_qformer_blocks", "start_token_id", "end_token_id", "pad_token_id")
    more = {name: getattr(config, name) for name in names}
    more["qformer_num_heads"] = config.num_attention_heads
    more |= {n: getattr(config, n).to_dict() for n in ("vision_config", "text_config")}
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "architecture.json").write_text(json.dumps(more))


def load_the_cards_way(folder: Path) -> QVisionForConditionalGeneration:
    """Build everything with weights of its own, then copy the three files over it."""
    config = published.read_config(folder)
    model = QVisionForConditionalGeneration(config)
    text = CLIPTextModel(_text_config(config.vision_config.hidden_size))
    ours = {published.stored_name(name): name for name, _ in model.named_parameters()}
    for name in FILES:
        state = load_file(folder / name)
        words = {k.removeprefix("clip.text_model."): w for k, w in state.items() if "text_" in k}
        text.load_state_dict(words, strict=False)
        as_ours = {
            re.sub(r"^transformer", "gpt_decoder.transformer", k): w for k, w in state.items()
        }
        found = {ours[key]: w for key, w in as_ours.items() if key in ours}
        model.load_state_dict(found, strict=False)
    return model.eval()


def _text_config(width: int) -> CLIPTextConfig:
    """CLIP's text tower of ViT-B/32; a small one for a small model."""
    return CLIPTextConfig() if width == 768 else CLIPTextConfig(hidden_size=16, num_hidden_layers=1)
