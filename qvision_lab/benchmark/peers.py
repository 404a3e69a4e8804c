"""QVision among its peers: models of public configuration, with random weights or their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
import transformers as hf
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from qvision_lab.benchmark.gpt4 import EndpointError, Gpt4Captioner
from qvision_lab.benchmark.harness import Spread, Table, growing_table, take_turns
from qvision_lab.benchmark.latency import DTYPES, GREEDY, TOKENS, timed_model
from qvision_lab.benchmark.parameters import count_parameters
from qvision_lab.captioning import Captioner
from qvision_lab.data import scenes
from qvision_lab.model.captioner import QVisionForConditionalGeneration

ROOM = 1.1  # memory over that of the weights: activations and caches
LARGE = 10**9  # parameters: beyond, a peer is timed in bfloat16, twice, and not warmed up


@dataclass(frozen=True)
class Peer:
    """A captioner to compare with; neither time nor parameters hang on its weights' values."""

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
        self, model: hf.PreTrainedModel, pixels: Float[Tensor, "1 3 H W"], tokens: int
    ) -> Int[Tensor, "1 T"]:
        """Ids of a greedy caption of exactly so many new tokens."""
        prompt = torch.tensor([self.prompt], device=pixels.device) if self.prompt else None
        return model.generate(
            pixel_values=pixels,
            input_ids=prompt,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
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
    """A peer beside QVision: its size, and its time where it could be measured."""

    name: str
    parameters: int | None  # None: not public
    trained: int | None
    dtype: str | None = None
    gigabytes: float | None = None  # memory that it needs
    seconds_per_caption: Spread | None = None
    ratio_to_qvision: float | None = None  # its seconds over QVision's: below 1 the peer is faster
    not_measured: str | None = None  # why
    seconds: list[float] | None = None
    qvision_seconds: list[float] | None = None  # in the same rounds

    def timed(self, seconds: dict[str, list[float]]) -> PeerRow:
        """The row with what was measured in turns."""
        theirs, ours = seconds[self.name], seconds.get("QVision")
        ratio = Spread.ratio(theirs, ours).median if ours else None
        return replace(
            self,
            seconds_per_caption=Spread.of(theirs),
            ratio_to_qvision=ratio,
            seconds=theirs,
            qvision_seconds=ours,
        )


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all peers that fit the memory, and GPT-4 where there is an endpoint.

    Those above a billion parameters are timed in bfloat16, the others in float32; QVision likewise.
    Quickly, only the first is.
    """
    settings = {**GREEDY, "batch": 1, "weights": "random", "device": captioner.model.device.type}
    model = timed_model(captioner, quick)

    def rows() -> Iterator[PeerRow]:
        yield from run_peers(model, PEERS[:1] if quick else PEERS, quick=quick)
        yield gpt4_row(next(scenes.generate(1, split="test")).image, quick=quick)

    return growing_table("peers", rows(), quick=quick, settings=settings)


def run_peers(
    model: QVisionForConditionalGeneration,
    peers: Sequence[Peer] = PEERS,
    *,
    pretrained: bool = False,
    quick: bool = False,
) -> Iterator[PeerRow]:
    """Time peers in turn with QVision, on its device: 20 tokens of one picture.

    A peer that does not fit the free memory is not tried; its row says what it needs.

    Args:
        pretrained: use the peers' own weights from the Hub, or its cache, instead of random ones.
    """
    for peer in peers:
        parameters, trained = peer.sizes()
        large = parameters > LARGE
        dtype = torch.bfloat16 if large else torch.float32
        needs, free = ROOM * parameters * dtype.itemsize, free_memory(model.device)
        row = PeerRow(peer.name, parameters, trained, DTYPES[dtype], needs / 1e9)
        if needs > free:
            reason = f"needs {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            yield replace(row, not_measured=reason)
            continue
        ours = copy.deepcopy(model).to(dtype)
        theirs = peer.build(dtype, model.device, pretrained)
        our_pixels = _pixels(ours, ours.config.vision_config.image_size)
        ways = {
            peer.name: partial(peer.caption, theirs, _pixels(theirs, peer.image_size), TOKENS),
            "QVision": partial(ours.generate, pixel_values=our_pixels, **GREEDY),
        }
        seconds = take_turns(ways, 2 if large else 5, quick, warm_up=not large)
        del theirs, ways  # its memory is the next one's
        yield row.timed(seconds)


def gpt4_row(picture: Image.Image, *, quick: bool = False) -> PeerRow:
    """CLIP + GPT-4's row: seconds between a question and its answer, the network included."""
    row = PeerRow("CLIP + GPT-4", None, None)
    try:
        captioner = Gpt4Captioner()
        asking = partial(captioner.caption, picture, TOKENS)
        return row.timed(take_turns({row.name: asking}, 5, quick))
    except (EndpointError, ImportError) as error:
        return replace(row, not_measured=str(error))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _pixels(model: hf.PreTrainedModel, side: int) -> Float[Tensor, "1 3 H W"]:
    return torch.randn(1, 3, side, side, device=model.device).to(model.dtype)
