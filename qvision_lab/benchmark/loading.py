"""Cost of loading in time, reading and memory: ours, transformers', and the card's snippet."""

import gc
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from qvision_lab.benchmark.harness import ROUNDS, Spread, Table, growing_table, machine
from qvision_lab.benchmark.latency import BATCH, GREEDY, timed_model
from qvision_lab.captioning import Captioner
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading import published
from qvision_lab.model.loading.checkpoint import load_checkpoint
from qvision_lab.model.processor import QVisionProcessor

CARD, OURS = "the card's snippet", "ql.load"
NATIVE, TRANSFORMERS = "ql.load, native layout", "from_pretrained, native layout"
DTYPES = "float32", "bfloat16"
METHODS = ((CARD, "float32"), *product((OURS, TRANSFORMERS, NATIVE), DTYPES))  # first the baseline
FILES = (*published.WEIGHT_FILES, published.THIRD_COPY)


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Load a checkpoint in both layouts, each time in a new process, on the CPU.

    The card's snippet builds CLIP and GPT-Neo with random weights (it downloads them), reads all
    three files of the published layout and copies each over the model.
    """
    about = {"quick": quick, "settings": GREEDY, "machine": machine(gpu=False)}
    return growing_table("loading", _rows(captioner, quick), **about)


def _rows(captioner: Captioner, quick: bool) -> Iterator[dict]:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the processes shall not download a tokenizer
    loads: dict[tuple[str, str], list[dict]] = {method: [] for method in METHODS}
    context = get_context("forkserver" if hasattr(os, "fork") else "spawn")
    context.set_forkserver_preload([__name__])  # processes start with everything imported
    with TemporaryDirectory() as temporary:
        model, folder = timed_model(captioner, quick), Path(temporary)
        write_published(folder, model)
        model.save_pretrained(folder / "native")
        QVisionProcessor.from_config(model.config).save_pretrained(folder / "native")
        size = model.num_parameters()
        del model
        for number in range(1 if quick else 1 + ROUNDS):
            for method in METHODS:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    run = pool.submit(load_once, folder, *method, cold=number == 0)
                    loads[method].append(run.result())
    for way, dtype in METHODS:
        seconds = [load["seconds"] for load in loads[way, dtype]][not quick :]
        yield {
            **{"way": way, "dtype": dtype},
            "gigabytes_needed": size * getattr(torch, dtype).itemsize / 1e9,  # of the weights
            "spread": Spread.of(seconds),
            "seconds": seconds,  # with the files in memory
            "loads": loads[way, dtype],  # all of them; the first found the files on disk
        }


@torch.no_grad()
def load_once(folder: Path, way: str, dtype: str, cold: bool) -> dict[str, float]:
    """Load and read every weight; `cold` drops the files from memory before, and captions after."""
    for path in folder.rglob("*.safetensors") if cold and hasattr(os, "posix_fadvise") else ():
        with open(path, "rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read, before = process_bytes("io", "read_bytes"), process_bytes("status", "VmRSS")
    gc.disable()  # as timeit does: it may pass over all that the imports made
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
    load = {
        "seconds": perf_counter() - start,  # until every weight has been read once
        "gigabytes_read": (process_bytes("io", "read_bytes") - read) / 1e9,  # from the disk
        "resident_gigabytes": (process_bytes("status", "VmRSS") - before) / 1e9,
        "peak_gigabytes": (process_bytes("status", "VmHWM") - before) / 1e9,
    }
    if not cold:
        return load  # captions in bfloat16 take minutes where the CPU emulates it
    side = model.config.vision_config.image_size
    model.generate(pixel_values=torch.randn(BATCH, 3, side, side, dtype=model.dtype), **GREEDY)
    return load | {"captioning_gigabytes": (process_bytes("status", "VmHWM") - before) / 1e9}


def write_published(folder: Path, model: QVisionForConditionalGeneration) -> None:
    """Write a model in the published layout, with CLIP's text tower and all copies."""
    config = model.config
    weights = {published.stored_name(name): w.detach() for name, w in model.named_parameters()}
    weights["gpt_decoder.lm_head.weight"] = model.decoder.lm_head.weight.detach().clone()
    encoder = {n: w for n, w in weights.items() if n.startswith(("vision.", "proj."))}
    decoder = {n: w for n, w in weights.items() if n not in encoder}
    text = _text_tower(config.vision_config.hidden_size).state_dict()
    vision, third = (  # both are copies
        {n.removeprefix(part): w.clone() for n, w in weights.items() if n.startswith(part)}
        for part in ("vision.", "gpt_decoder.")
    )
    encoder |= {f"clip.vision_model.{n}": w for n, w in vision.items()}
    encoder |= {f"clip.text_model.{n}": w for n, w in text.items()}
    for name, part in zip(FILES, (encoder, decoder, third), strict=True):
        save_file(part, folder / name)
    more = config.to_dict() | {"qformer_num_heads": config.num_attention_heads}
    sizes = {"embed_size": config.hidden_size, "vocab_size": config.vocab_size}
    sizes["num_img_tokens"] = more.pop("num_query_tokens")
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "architecture.json").write_text(json.dumps(more))


def load_the_cards_way(folder: Path) -> QVisionForConditionalGeneration:
    """Build everything with weights of its own, then copy the three files over it."""
    config = QVisionConfig(**published.read_fields(folder))
    model = QVisionForConditionalGeneration(config)
    text = _text_tower(config.vision_config.hidden_size)
    ours = {published.stored_name(name): name for name, _ in model.named_parameters()}
    for file in FILES:
        weights = load_file(folder / file)
        names = [re.sub(r"^transformer", "gpt_decoder.transformer", name) for name in weights]
        renamed = (ours.get(name, name.removeprefix("clip.text_model.")) for name in names)
        known = dict(zip(renamed, weights.values(), strict=True))
        for part in (model, text):
            part.load_state_dict(known, strict=False)
    return model.eval()


def _text_tower(width: int) -> CLIPTextModel:
    """CLIP's of ViT-B/32; a small one for a small model."""
    small = {} if width == 768 else {"hidden_size": 16, "num_hidden_layers": 1}
    return CLIPTextModel(CLIPTextConfig(**small))


def process_bytes(file: str, field: str) -> int:
    """A count of bytes that Linux keeps of this process in /proc/self; elsewhere 0."""
    path = Path("/proc/self") / file
    found = re.search(rf"{field}:\s+(\d+)( kB)?", path.read_text()) if path.exists() else None
    return int(found[1]) * (1024 if found[2] else 1) if found else 0
