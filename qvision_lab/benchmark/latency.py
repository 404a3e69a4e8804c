"""Time per caption: the original's method, transformers', ours, compiled, in batches."""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._inductor import config as inductor

from qvision_lab.benchmark.harness import ROUNDS, Spread, Table, growing_table, interleave
from qvision_lab.captioning import Captioner
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.decoding_step import Int8Decoder, copy_sharing_weights
from qvision_lab.captioning.sampling import Choice
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import EMBEDDED

TOKENS = 20  # generated for every image, whatever it shows
BATCH = 16
BATCHES = {"cpu": (1, BATCH), "cuda": (1, BATCH, 64, 256)}
COMPILED = {"cpu": (1,), "cuda": (1, 256)}  # on CUDA in bfloat16 alone
CHECKED = 4  # images whose tokens are compared with the original's
LENGTH = {"max_new_tokens": TOKENS, "min_length": TOKENS + 1}  # and <START>
GREEDY = {**LENGTH, "do_sample": False, "repetition_penalty": 1.0}
CHOICE = Choice(repetition_penalty=1.0, min_length=LENGTH["min_length"], sampling=None)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time all methods in both precisions, 20 new tokens each, on random pixels."""
    model = timed_model(captioner, quick)
    gigabyte = torch.ones(2**20 if quick else 2**28, device=model.device)
    bandwidth = gigabyte.nbytes / min(interleave({"sum": gigabyte.sum}, 5)["sum"])  # best of five
    settings = {**GREEDY, "rounds": ROUNDS, "parameters": model.num_parameters()}
    settings |= {"device": model.device.type, "read_gigabytes_per_second": bandwidth / 1e9}
    copies = (copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float32))
    rows = chain.from_iterable(race(each, bandwidth, quick) for each in copies)
    return growing_table("latency", rows, quick=quick, settings=settings)


def timed_model(captioner: Captioner, quick: bool) -> QVisionForConditionalGeneration:
    """The captioner's model; for the embedded one, random weights of the published sizes."""
    if quick or captioner.provenance.source != EMBEDDED:
        return captioner.model
    with torch.device(captioner.model.device):
        return QVisionForConditionalGeneration._from_config(QVisionConfig()).eval()


def race(
    model: QVisionForConditionalGeneration, bandwidth: float, quick: bool = False
) -> Iterator[dict]:
    """A row for each method, timed in turn with the original's, in the dtype of the model."""
    device, dtype = model.device.type, DTYPES[model.dtype]
    place = "cpu" if quick else device
    size = model.config.vision_config.image_size
    pixels = torch.randn(max(BATCHES[place]), 3, size, size).to(model.device, model.dtype)
    original = partial(generate_the_original_way, model, **LENGTH)
    expected = torch.cat([original(image[None]) for image in pixels[:CHECKED]])[:, 1:]  # [4,20]
    default = FastDecoding(model)
    decodings = {("default", dtype, batch): default for batch in BATCHES[place]}
    with inductor.patch(force_disable_caches=True):  # so that compiling takes its full time
        for batch in COMPILED[place] if device == "cpu" or dtype == "bf16" else ():
            decodings["compiled", dtype, batch] = FastDecoding(model, batch)
        if device == "cpu" and dtype == "bf16":
            rounded = copy_sharing_weights(model)
            rounded.decoder = Int8Decoder(model.decoder)
            decodings["compiled", "int8", 1] = FastDecoding(rounded, 1)
    methods = {
        ("original", dtype, 1): lambda: original(pixels[:1])[:, 1:].cpu(),
        ("generate", dtype, 1): lambda: model.generate(pixel_values=pixels[:1], **GREEDY)[:, 1:],
    }
    for key, decoding in decodings.items():
        methods[key] = lambda run=decoding.run, pixel_values=pixels[: key[2]]: run(
            CHOICE, TOKENS, pixel_values=pixel_values
        )[0]
    seconds = interleave(methods, ROUNDS, quick)
    for key, samples in seconds.items():
        mode, weights, batch = key
        decoding = decodings.get(key, default)
        same = methods[key]()[:CHECKED].cpu() == expected[:batch].cpu()
        per_image = [taken / batch for taken in samples]
        spread, compiling = Spread.of(per_image), decoding.compile_seconds
        text, bridge = (decoder := decoding.model.decoder).language_model, decoder.bridge
        read = (text.h, text.ln_f, bridge, decoder.lm_head)  # each step: all but embedding tables
        limit = TOKENS * sum(w.nbytes for part in read for w in part.parameters()) / bandwidth
        uncompiled = seconds.get(("default", dtype, batch), samples)
        saved = Spread.of(uncompiled).median / batch - spread.median
        yield {
            **{"mode": mode, "dtype": weights, "batch": batch},
            "seconds_per_image": spread,
            "ratio": Spread.ratio(seconds["original", dtype, 1], per_image),  # speed-up per image
            "times_the_limit": spread.median * batch / limit,  # over reading weights for each token
            "images_per_second": 1 / spread.median,
            "same_tokens": same.float().mean().item(),  # share equal to the original's
            "compile_seconds": compiling,
            "pays_after": compiling / saved if compiling and saved > 0 else None,  # captions
            "seconds": samples,  # per batch, round by round
        }


@torch.no_grad()
def generate_the_original_way(
    model: QVisionForConditionalGeneration,
    pixel_values: Float[Tensor, "1 3 H W"],
    *,
    max_new_tokens: int = 30,
    min_length: int = 5,
) -> Int[Tensor, "1 T"]:
    """Greedy ids of one image as the published code generates: no cache, the image encoded once."""
    image_tokens = model.vision(pixel_values)  # [1,P,D]
    ids = torch.full((1, 1), model.config.start_token_id, device=image_tokens.device)
    for length in range(1, 1 + max_new_tokens):
        logits = model(ids, image_tokens=image_tokens).logits[:, -1]  # [1,V]
        if length < min_length:
            logits[:, model.config.end_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == model.config.end_token_id:
            break
    return ids
