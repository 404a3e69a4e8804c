"""QVision among its peers: models of public configuration, with random weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from qvision_lab.benchmark.gpt4 import EndpointError, Gpt4Captioner
from qvision_lab.benchmark.harness import Spread, Table, growing_table, interleave
from qvision_lab.benchmark.latency import CHOICE, DTYPES, GREEDY, ROUNDS, TOKENS, timed_model
from qvision_lab.captioning import Captioner
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.model.captioner import QVisionForConditionalGeneration

ROOM = 1.1  # memory over that of the weights: activations and caches
LARGE = 10**9  # parameters: beyond, a peer is timed in bfloat16, and compiled too
COMPILED_ON = ("cuda",)  # devices for which transformers compiles a model with a static cache
QVISION, COMPILED = "QVision", "QVision, compiled"
FASTEST = "the peer's fastest"
FIRST = "LLaVA-1.5 7B", "BLIP-2 OPT-2.7B"  # those that a run with little time measures

Methods = dict[str, Callable[[], object]]  # by name: caption one image


@dataclass(frozen=True)
class Peer:
    """A captioner to compare with; neither time nor parameters depend on its weights' values."""

    name: str
    model_class: type[hf.PreTrainedModel]
    config: hf.PreTrainedConfig
    frozen: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()

    @classmethod
    def read(cls, name: str, settings: dict) -> Peer:
        """A peer of `peers.yaml`."""
        config = hf.AutoConfig.for_model(**settings["config"])
        prompt = [[token] * count for token, count in settings.get("prompt", ())]
        frozen = tuple(settings.get("frozen", ()))
        return cls(name, getattr(hf, settings["model"]), config, frozen, tuple(chain(*prompt)))

    def build(self, dtype: torch.dtype, device: torch.device | str) -> hf.PreTrainedModel:
        """The model with random weights."""
        with torch.device(device):
            return self.model_class._from_config(self.config, dtype=dtype).eval()

    def sizes(self) -> tuple[int, int]:
        """Parameters in all, and those that were trained, without allocating any."""
        model = self.build(torch.float32, "meta")
        frozen = sum(model.get_submodule(part).num_parameters() for part in self.frozen)
        return model.num_parameters(), model.num_parameters() - frozen

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        return (getattr(self.config, "vision_config", None) or self.config.encoder).image_size

    @torch.no_grad()
    def caption(
        self, model: hf.PreTrainedModel, pixels: Float[Tensor, "1 3 H W"], tokens: int, **settings
    ) -> Int[Tensor, "1 T"]:
        """Ids of a greedy caption of exactly so many new tokens."""
        prompt = torch.tensor([self.prompt], device=pixels.device) if self.prompt else None
        settings |= {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        return model.generate(pixel_values=pixels, input_ids=prompt, **settings)


_PEERS = yaml.safe_load(Path(__file__).with_name("peers.yaml").read_text(encoding="utf-8"))
PEERS = tuple(Peer.read(name, settings) for name, settings in _PEERS.items())


@dataclass(frozen=True)
class PeerRow:
    """A peer's size, and its time next to QVision's where it could be measured.

    Ratios are its seconds over QVision's, median over the rounds: below 1 the peer is faster.
    """

    name: str
    parameters: int | None  # None: not public
    trained: int | None
    dtype: str | None = None
    gigabytes: float | None = None  # memory that it needs
    seconds_per_caption: Spread | None = None
    ratio_to_qvision: float | None = None
    ratio_to_compiled: float | None = None  # to QVision's, compiled
    not_measured: str | None = None  # why
    fastest_seconds_per_caption: Spread | None = None  # the fastest method of the peer's library
    fastest_ratio_to_qvision: float | None = None
    fastest_ratio_to_compiled: float | None = None
    fastest_not_measured: str | None = None  # why, where it was tried
    seconds: list[float] | None = None  # these four were taken in the same rounds
    fastest_seconds: list[float] | None = None
    qvision_seconds: list[float] | None = None
    qvision_compiled_seconds: list[float] | None = None

    def with_times(self, seconds: dict[str, list[float]]) -> PeerRow:
        """The row with what was measured in turn."""
        ours = {"qvision": seconds.get(QVISION), "compiled": seconds.get(COMPILED)}
        more = {"qvision_seconds": ours["qvision"], "qvision_compiled_seconds": ours["compiled"]}
        for prefix, name in (("", self.name), ("fastest_", FASTEST)):
            if theirs := seconds.get(name):
                more |= {f"{prefix}seconds": theirs}
                more |= {f"{prefix}seconds_per_caption": Spread.of(theirs)}
                for method, own in ours.items():
                    ratio = Spread.ratio(theirs, own).median if own else None
                    more[f"{prefix}ratio_to_{method}"] = ratio
        return replace(self, **more)


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all peers that fit the memory, and GPT-4 where there is an endpoint.

    Those above a billion parameters are timed in bfloat16, the others in float32; QVision likewise.
    `quick` times the first peer only.
    """
    settings = {**GREEDY, "batch": 1, "weights": "random", "device": captioner.model.device.type}
    model = timed_model(captioner, quick)
    names = [*FIRST, *(peer.name for peer in PEERS)]
    ordered = sorted(PEERS, key=lambda peer: names.index(peer.name))

    def rows() -> Iterator[PeerRow]:
        yield from run_peers(model, PEERS[:1] if quick else ordered, quick)
        yield gpt4_row(next(scenes.generate(1, split="test")).image, quick)

    return growing_table("peers", rows(), quick=quick, settings=settings)


def run_peers(
    model: QVisionForConditionalGeneration, peers: Sequence[Peer] = PEERS, quick: bool = False
) -> Iterator[PeerRow]:
    """Time peers in turn with QVision, on its device: 20 tokens of one image.

    A peer that does not fit the free memory is not tried; its row says what it needs. Where a
    peer's library fails, the row has its error.
    """
    ours: dict[torch.dtype, Methods] = {}  # of the last dtype
    for peer in peers:
        parameters, trained = peer.sizes()
        dtype = torch.bfloat16 if parameters > LARGE else torch.float32
        needs, free = ROOM * parameters * dtype.itemsize, free_memory(model.device)
        row = PeerRow(peer.name, parameters, trained, DTYPES[dtype], needs / 1e9)
        if needs > free:
            reason = f"needs {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            yield replace(row, not_measured=reason)
            continue
        if dtype not in ours:
            ours = {}  # free its memory first
            ours = {dtype: _qvision_methods(copy.deepcopy(model).to(dtype))}
        methods, reason = _try_methods(peer, dtype, model.device)
        if methods:
            row = replace(row, fastest_not_measured=reason)
            yield row.with_times(interleave(methods | ours[dtype], ROUNDS, quick))
        else:
            yield replace(row, not_measured=reason)
        del methods  # the next peer needs its memory
        gc.collect()
        torch.cuda.empty_cache()


def _qvision_methods(model: QVisionForConditionalGeneration) -> Methods:
    pixels = _random_pixels(model, model.config.vision_config.image_size)
    decodings = {QVISION: FastDecoding(model), COMPILED: FastDecoding(model, rows=1)}
    return {
        name: partial(decoding.run, CHOICE, TOKENS, pixel_values=pixels)
        for name, decoding in decodings.items()
    }


def _try_methods(
    peer: Peer, dtype: torch.dtype, device: torch.device
) -> tuple[Methods, str | None]:
    """A peer's methods, each tried once, and why one is missing.

    Large peers have a second, the fastest of their own library: transformers compiles the step
    where the cache is static.
    """
    methods: Methods = {}
    try:
        theirs = peer.build(dtype, device)
        plain = partial(peer.caption, theirs, _random_pixels(theirs, peer.image_size), TOKENS)
        plain()
        methods[peer.name] = plain
        if dtype == torch.bfloat16 and device.type in COMPILED_ON:
            static = partial(plain, cache_implementation="static")
            static()
            if not any("_compiled_call" in vars(part) for part in theirs.modules()):
                raise NotImplementedError("transformers compiled no step of it")
            methods[FASTEST] = static
    except Exception as error:  # of any library; the other peers are still measured
        return methods, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return methods, None


def gpt4_row(image: Image.Image, quick: bool = False) -> PeerRow:
    """CLIP + GPT-4's row: seconds from request to answer, the network included."""
    row = PeerRow("CLIP + GPT-4", None, None)
    try:
        request = partial(Gpt4Captioner().caption, image, TOKENS)
        return row.with_times(interleave({row.name: request}, ROUNDS, quick))
    except (EndpointError, ImportError) as error:
        return replace(row, not_measured=str(error))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _random_pixels(model: hf.PreTrainedModel, side: int) -> Float[Tensor, "1 3 H W"]:
    return torch.randn(1, 3, side, side, device=model.device).to(model.dtype)
