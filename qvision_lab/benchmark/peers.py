"""QVision among its peers: models of public configuration with random weights, and chat models."""

import copy
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import psutil
import torch
import transformers as hf
import yaml
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from qvision_lab import scenes
from qvision_lab.benchmark.harness import ROUNDS, Table, growing_table, interleave
from qvision_lab.benchmark.latency import CHOICE, DTYPES, GREEDY, TOKENS, timed_model
from qvision_lab.captioning import Captioner
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.images import Picture, open_image
from qvision_lab.interpretation.page import data_url
from qvision_lab.model.captioner import QVisionForConditionalGeneration

ROOM = 1.1  # memory over that of the weights: activations and caches
LARGE = 10**9  # parameters: beyond, a peer is timed in bfloat16, and compiled too
COMPILED_ON = ("cuda",)  # devices for which transformers compiles a model with a static cache
FIRST = "BLIP-2 OPT-2.7B", "LLaVA-1.5 7B"  # those that a run with little time measures

GPT4, PROMPT = "gpt-4o", "Describe this picture in one short sentence."

Methods = dict[str, Callable[[], object]]  # by the field of their seconds: caption one image


@dataclass(frozen=True)
class Peer:
    """A captioner to compare with; neither time nor parameters depend on its weights' values."""

    name: str
    model: str  # class of transformers
    config: hf.PreTrainedConfig
    frozen: Sequence[str] = ()  # parts that the authors did not train
    prompt: Sequence[tuple[int, int]] = ()  # token ids, each with its number of repetitions

    def build(self, dtype: torch.dtype, device: torch.device | str) -> hf.PreTrainedModel:
        """The model with random weights."""
        with torch.device(device):
            return getattr(hf, self.model)._from_config(self.config, dtype=dtype).eval()

    def sizes(self) -> tuple[int, int]:
        """Parameters in all, and those that were trained, without allocating any."""
        model = self.build(torch.float32, "meta")
        frozen = sum(model.get_submodule(part).num_parameters() for part in self.frozen)
        return model.num_parameters(), model.num_parameters() - frozen

    @torch.no_grad()
    def caption(
        self, model: hf.PreTrainedModel, pixels: Float[Tensor, "1 3 H W"], tokens: int, **settings
    ) -> Int[Tensor, "1 T"]:
        """Ids of a greedy caption of exactly so many new tokens."""
        ids = [token for token, count in self.prompt for _ in range(count)]
        prompt = torch.tensor([ids], device=pixels.device) if ids else None
        settings |= {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        return model.generate(pixel_values=pixels, input_ids=prompt, **settings)


_PEERS = yaml.safe_load(Path(__file__).with_name("peers.yaml").read_text(encoding="utf-8"))
PEERS = tuple(
    Peer(name, **settings | {"config": hf.AutoConfig.for_model(**settings["config"])})
    for name, settings in _PEERS.items()
)


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all peers that fit the memory (`quick`: the first), and GPT-4 at an endpoint, if any.

    Those above a billion parameters are timed in bfloat16, the others in float32; QVision likewise.
    """
    settings = {**GREEDY, "batch": 1, "weights": "random", "device": captioner.model.device.type}
    model = timed_model(captioner, quick)
    ordered = sorted(PEERS, key=lambda peer: peer.name not in FIRST)
    peers = run_peers(model, PEERS[:1] if quick else ordered, quick)
    gpt4 = (gpt4_row(scene.image, quick) for scene in scenes.generate(1, split="test"))
    return growing_table("peers", chain(peers, gpt4), quick=quick, settings=settings)


def run_peers(
    model: QVisionForConditionalGeneration, peers: Sequence[Peer] = PEERS, quick: bool = False
) -> Iterator[dict]:
    """Time peers in turn with QVision, on its device: 20 tokens of one image.

    The row of a peer that needs more memory than is free, or whose library fails, says so.
    """
    ours: dict[torch.dtype, Methods] = {}  # of the last dtype
    for peer in peers:
        parameters, trained = peer.sizes()
        dtype = torch.bfloat16 if parameters > LARGE else torch.float32
        needs, free = ROOM * parameters * dtype.itemsize, free_memory(model.device)
        row = {"name": peer.name, "parameters": parameters, "trained": trained}
        row |= {"dtype": DTYPES[dtype], "gigabytes": needs / 1e9}  # of memory
        if needs > free:
            reason = f"needs {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            yield row | {"not_measured": reason}
            continue
        if dtype not in ours:
            ours = {}  # free its memory first
            ours = {dtype: _qvision_methods(copy.deepcopy(model).to(dtype))}
        methods, reason = _try_methods(peer, dtype, model.device)
        if methods:
            row |= interleave(methods | ours[dtype], ROUNDS, quick)
        yield row | {"fastest_not_measured" if methods else "not_measured": reason}
        del methods  # the next peer needs its memory
        gc.collect()
        torch.cuda.empty_cache()


def _qvision_methods(model: QVisionForConditionalGeneration) -> Methods:
    pixels = _random_pixels(model, model.config.vision_config.image_size)
    default, compiled = FastDecoding(model), FastDecoding(model, rows=1)
    return {
        "qvision_seconds": partial(default.run, CHOICE, TOKENS, pixel_values=pixels),
        "qvision_compiled_seconds": partial(compiled.run, CHOICE, TOKENS, pixel_values=pixels),
    }


def _try_methods(
    peer: Peer, dtype: torch.dtype, device: torch.device
) -> tuple[Methods, str | None]:
    """A peer's methods, a large one's also with a compiled step, and why one is missing."""
    methods: Methods = {}
    try:
        theirs = peer.build(dtype, device)
        tower = getattr(peer.config, "vision_config", None) or peer.config.encoder
        plain = partial(peer.caption, theirs, _random_pixels(theirs, tower.image_size), TOKENS)
        plain()
        methods["seconds"] = plain
        if dtype == torch.bfloat16 and device.type in COMPILED_ON:
            static = partial(plain, cache_implementation="static")
            static()
            if not any("_compiled_call" in vars(part) for part in theirs.modules()):
                raise NotImplementedError("transformers compiled no step of it")
            methods["fastest_seconds"] = static
    except Exception as error:  # of any library; the other peers are still measured
        return methods, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return methods, None


def gpt4_row(image: Image.Image, quick: bool = False) -> dict:
    """CLIP + GPT-4's row: seconds from connecting to the answer, the network included."""
    row = {"name": "CLIP + GPT-4", "parameters": None, "trained": None}  # not public
    try:
        return row | interleave({"seconds": partial(caption_by_gpt4, image, TOKENS)}, ROUNDS, quick)
    except (ConnectionError, ImportError) as error:
        return row | {"not_measured": str(error)}


def caption_by_gpt4(image: Picture, max_new_tokens: int = 20, timeout: float = 60.0) -> str:
    """Caption by a chat model, in one request; needs the extra `qvision-lab[gpt4]`.

    The key is read from `OPENAI_API_KEY`, an endpoint other than OpenAI's from `OPENAI_BASE_URL`.
    ConnectionError for no endpoint, one that fails or times out, or an answer without text.
    """
    from openai import OpenAI, OpenAIError

    if not os.environ.get("OPENAI_API_KEY"):
        raise ConnectionError("no endpoint: set OPENAI_API_KEY (and perhaps OPENAI_BASE_URL).")
    url = {"url": data_url(open_image(image))}
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": url}]
    how = {"model": GPT4, "messages": [{"role": "user", "content": parts}]}
    try:
        chat = OpenAI(timeout=timeout, max_retries=0).chat.completions
        answer = chat.create(**how, max_tokens=max_new_tokens)
    except OpenAIError as error:  # a time-out too
        raise ConnectionError(f"{GPT4} could not be asked: {error}") from error
    text = (answer.choices[0].message.content or "").strip() if answer.choices else ""
    if not text:
        raise ConnectionError(f"{GPT4} answered without text; try again.")
    return text


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    on_gpu = device.type == "cuda"
    return torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available


def _random_pixels(model: hf.PreTrainedModel, side: int) -> Float[Tensor, "1 3 H W"]:
    return torch.randn(1, 3, side, side, device=model.device).to(model.dtype)
