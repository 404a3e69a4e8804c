"""QVision among its peers: models of public configuration, with random weights or their own."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
import transformers as hf
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from qvision_lab import scenes
from qvision_lab.benchmark.gpt4 import EndpointError, Gpt4Captioner
from qvision_lab.benchmark.harness import Spread, Table, growing_table, take_turns
from qvision_lab.benchmark.latency import CHOICE, DTYPES, GREEDY, ROUNDS, TOKENS, timed_model
from qvision_lab.benchmark.parameters import count_parameters
from qvision_lab.captioning import Captioner
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.model.captioner import QVisionForConditionalGeneration

ROOM = 1.1  # memory over that of the weights: activations and caches
LARGE = 10**9  # parameters: beyond, a peer is timed in bfloat16, and compiled too
COMPILED_ON = ("cuda",)  # devices for which transformers compiles a model with a static cache
QVISION = "QVision"
COMPILED = "QVision, compiled"
FASTEST = "the peer's fastest"
FIRST = "LLaVA-1.5 7B", "BLIP-2 OPT-2.7B"  # those that a run with little time measures


@dataclass(frozen=True)
class Peer:
    """A captioner to compare with; neither time nor parameters depend on its weights' values."""

    name: str
    hub_id: str
    model_class: type[hf.PreTrainedModel]
    config: hf.PreTrainedConfig
    frozen: tuple[str, ...] = ()  # parts that its authors did not train
    prompt: tuple[int, ...] = ()  # token ids before the caption, besides the model's own start

    def build(
        self, dtype: torch.dtype, device: torch.device | str, pretrained: bool = False
    ) -> hf.PreTrainedModel:
        """The model on a device, with random weights unless the Hub's are asked for."""
        if pretrained:
            return self.model_class.from_pretrained(self.hub_id, dtype=dtype).to(device).eval()
        with torch.device(device):
            return self.model_class._from_config(self.config, dtype=dtype).eval()

    def sizes(self) -> tuple[int, int]:
        """Parameters in all, and those that were trained, without allocating any."""
        model = self.build(torch.float32, "meta")
        frozen = sum(count_parameters(model.get_submodule(part)) for part in self.frozen)
        return count_parameters(model), count_parameters(model) - frozen

    @property
    def image_size(self) -> int:
        """Pixels of each side of its pictures."""
        vision = getattr(self.config, "vision_config", None) or self.config.encoder
        return vision.image_size

    @torch.no_grad()
    def caption(
        self, model: hf.PreTrainedModel, pixels: Float[Tensor, "1 3 H W"], tokens: int, **settings
    ) -> Int[Tensor, "1 T"]:
        """Ids of a greedy caption of exactly so many new tokens."""
        prompt = torch.tensor([self.prompt], device=pixels.device) if self.prompt else None
        return model.generate(
            pixel_values=pixels,
            input_ids=prompt,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            **settings,
        )


def _blip2(width: int) -> hf.Blip2Config:
    text = {"vocab_size": 50272, "num_hidden_layers": 32, "num_attention_heads": 32}
    return hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(),
        qformer_config=hf.Blip2QFormerConfig(),
        text_config=hf.OPTConfig(
            hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, **text
        ),
        image_token_index=50265,
    )


def _llava(**text: int) -> hf.LlavaConfig:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    return hf.LlavaConfig(  # CLIP ViT-L/14 at 336 and Vicuna, which is Llama
        vision_config=hf.CLIPVisionConfig(**vision, projection_dim=768),
        text_config=hf.LlamaConfig(vocab_size=32064, **text),
    )


def _vit_gpt2() -> hf.VisionEncoderDecoderConfig:
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(), hf.GPT2Config()
    )
    config.decoder_start_token_id = config.pad_token_id = config.decoder.eos_token_id
    return config


LLAVA_PROMPT = (1, *[32000] * 576, *range(100, 116))  # <s>, 576 patches, a question of 16 tokens
BLIP2_FROZEN = ("vision_model", "language_model")
PEERS = (
    Peer("GIT base", "microsoft/git-base-coco", hf.GitForCausalLM, hf.GitConfig()),
    Peer(
        "BLIP base",
        "Salesforce/blip-image-captioning-base",
        hf.BlipForConditionalGeneration,
        hf.BlipConfig(
            text_config=hf.BlipTextConfig(vocab_size=30524),
            vision_config=hf.BlipVisionConfig(),
        ),
    ),
    Peer(
        "ViT-GPT2",
        "nlpconnect/vit-gpt2-image-captioning",
        hf.VisionEncoderDecoderModel,
        _vit_gpt2(),
    ),
    Peer(
        "BLIP-2 OPT-2.7B",
        "Salesforce/blip2-opt-2.7b",
        hf.Blip2ForConditionalGeneration,
        _blip2(2560),
        BLIP2_FROZEN,
    ),
    Peer(
        "BLIP-2 OPT-6.7B",
        "Salesforce/blip2-opt-6.7b",
        hf.Blip2ForConditionalGeneration,
        _blip2(4096),
        BLIP2_FROZEN,
    ),
    Peer(
        "LLaVA-1.5 7B",
        "llava-hf/llava-1.5-7b-hf",
        hf.LlavaForConditionalGeneration,
        _llava(),
        ("model.vision_tower",),
        LLAVA_PROMPT,
    ),
    Peer(
        "LLaVA-1.5 13B",
        "llava-hf/llava-1.5-13b-hf",
        hf.LlavaForConditionalGeneration,
        _llava(
            hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
        ("model.vision_tower",),
        LLAVA_PROMPT,
    ),
)


@dataclass(frozen=True)
class PeerRow:
    """A peer beside QVision: its size, and its time where it could be measured.

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
    fastest_seconds_per_caption: Spread | None = None  # the fastest way of the peer's own library
    fastest_ratio_to_qvision: float | None = None
    fastest_ratio_to_compiled: float | None = None
    fastest_not_measured: str | None = None  # why, where it was tried
    seconds: list[float] | None = None  # these four were taken in the same rounds
    fastest_seconds: list[float] | None = None
    qvision_seconds: list[float] | None = None
    qvision_compiled_seconds: list[float] | None = None

    def timed(self, seconds: dict[str, list[float]]) -> PeerRow:
        """The row with what was measured in turns."""
        ours = {"qvision": seconds.get(QVISION), "compiled": seconds.get(COMPILED)}
        measured: dict = {"qvision_seconds": ours["qvision"]}
        measured["qvision_compiled_seconds"] = ours["compiled"]
        for prefix, name in (("", self.name), ("fastest_", FASTEST)):
            theirs = seconds.get(name)
            measured[f"{prefix}seconds"] = theirs
            measured[f"{prefix}seconds_per_caption"] = Spread.of(theirs) if theirs else None
            for way, own in ours.items():
                ratio = Spread.ratio(theirs, own).median if theirs and own else None
                measured[f"{prefix}ratio_to_{way}"] = ratio
        return replace(self, **measured)


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all peers that fit the memory, and GPT-4 where there is an endpoint.

    Those above a billion parameters are timed in bfloat16, the others in float32; QVision likewise.
    Quickly, only the first is.
    """
    settings = {**GREEDY, "batch": 1, "weights": "random", "device": captioner.model.device.type}
    model = timed_model(captioner, quick)
    names = [*FIRST, *(peer.name for peer in PEERS)]
    ordered = sorted(PEERS, key=lambda peer: names.index(peer.name))

    def rows() -> Iterator[PeerRow]:
        yield from run_peers(model, PEERS[:1] if quick else ordered, quick=quick)
        yield gpt4_row(next(scenes.generate(1, split="test")).image, quick=quick)

    return growing_table("peers", rows(), quick=quick, settings=settings)


def qvision_ways(model: QVisionForConditionalGeneration) -> dict[str, Callable[[], object]]:
    """QVision's own ways to caption a picture, by name."""
    pixels = _pixels(model, model.config.vision_config.image_size)
    ways = {QVISION: FastDecoding(model), COMPILED: FastDecoding(model, rows=1)}
    return {
        name: partial(decoding.run, CHOICE, TOKENS, pixel_values=pixels)
        for name, decoding in ways.items()
    }


def run_peers(
    model: QVisionForConditionalGeneration,
    peers: Sequence[Peer] = PEERS,
    *,
    pretrained: bool = False,
    quick: bool = False,
) -> Iterator[PeerRow]:
    """Time peers in turn with QVision, on its device: 20 tokens of one picture.

    A peer that does not fit the free memory is not tried; its row says what it needs. Where a
    peer's library fails, the row says how.

    Args:
        pretrained: use the peers' own weights from the Hub, or its cache, instead of random ones.
    """
    ours: dict[torch.dtype, dict[str, Callable[[], object]]] = {}  # of the last dtype
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
            ours = {}  # its memory first
            ours = {dtype: qvision_ways(copy.deepcopy(model).to(dtype))}
        ways, reason = _tried_ways(peer, dtype, model.device, pretrained)
        if ways:
            row = replace(row, fastest_not_measured=reason)
            row = row.timed(take_turns(ways | ours[dtype], ROUNDS, quick))
        else:
            row = replace(row, not_measured=reason)
        del ways  # its memory is the next one's
        gc.collect()
        torch.cuda.empty_cache()
        yield row


def _tried_ways(
    peer: Peer, dtype: torch.dtype, device: torch.device, pretrained: bool
) -> tuple[dict[str, Callable[[], object]], str | None]:
    """A peer's ways to caption, each tried once, and why one is not among them.

    Large ones have a second, the fastest of their own library: transformers compiles the step where
    the cache is static.
    """
    ways: dict[str, Callable[[], object]] = {}
    try:
        theirs = peer.build(dtype, device, pretrained)
        plain = partial(peer.caption, theirs, _pixels(theirs, peer.image_size), TOKENS)
        plain()
        ways[peer.name] = plain
        if dtype == torch.bfloat16 and device.type in COMPILED_ON:
            static = partial(plain, cache_implementation="static")
            static()
            if not any("_compiled_call" in vars(part) for part in theirs.modules()):
                raise NotImplementedError("transformers compiled no step of it")
            ways[FASTEST] = static
    except Exception as error:  # whatever a library raises: the other peers go on
        return ways, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ways, None


def gpt4_row(picture: Image.Image, *, quick: bool = False) -> PeerRow:
    """CLIP + GPT-4's row: seconds between a question and its answer, the network included."""
    row = PeerRow("CLIP + GPT-4", None, None)
    try:
        captioner = Gpt4Captioner()
        asking = partial(captioner.caption, picture, TOKENS)
        return row.timed(take_turns({row.name: asking}, ROUNDS, quick))
    except (EndpointError, ImportError) as error:
        return replace(row, not_measured=str(error))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _pixels(model: hf.PreTrainedModel, side: int) -> Float[Tensor, "1 3 H W"]:
    return torch.randn(1, 3, side, side, device=model.device).to(model.dtype)
