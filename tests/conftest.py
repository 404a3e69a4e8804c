"""Shared fixtures; switches on the checks of shapes in the model's annotations."""

import json
import os
from pathlib import Path

if os.environ.get("QVISION_GPU_TESTS") != "1":  # `make test-gpu` sets it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for subprocesses: these tests expect a CPU

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

# Not `config`: the hook misreads the constructor of transformers' strict dataclasses.
STAGES = ("attention", "vision", "qformer", "decoder", "variants", "captioner")
if os.environ.get("QVISION_GPU_TESTS") != "1":  # a compiler cannot read the checks
    install_import_hook([f"qvision_lab.model.{stage}" for stage in STAGES], "beartype.beartype")

from qvision_lab.captioning import Captioner  # noqa: E402
from qvision_lab.model.captioner import QVisionForConditionalGeneration  # noqa: E402
from qvision_lab.model.config import QVisionConfig  # noqa: E402
from qvision_lab.model.loading.checkpoint import load_checkpoint  # noqa: E402
from qvision_lab.model.loading.published import SPECIAL_TOKENS  # noqa: E402
from qvision_lab.model.processor import QVisionProcessor  # noqa: E402

SHARED = Path(os.environ.get("QVISION_SHARED") or Path(__file__).parents[2] / "shared")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests that take minutes or gigabytes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The original code's numbers and COCO images, next to the repository or elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}; set QVISION_SHARED to its place")
    return SHARED


@pytest.fixture(scope="module", params=["published_a", "published_b"])
def reference(request, shared):
    """Model, tensors and facts of one small checkpoint of the original code; on CUDA if visible."""
    folder = shared / "reference" / request.param
    model, facts = load_checkpoint(folder).model, (folder / "expected.json").read_text()
    expected = load_file(folder / "expected.safetensors", device=str(model.device))
    return model, expected, json.loads(facts)


@pytest.fixture(scope="session")
def tiny() -> QVisionForConditionalGeneration:
    return tiny_model()


def tiny_model() -> QVisionForConditionalGeneration:
    """A random model with every part: 4 patches, 4 queries, the 256 bytes as vocabulary."""
    torch.manual_seed(5)  # one where captions differ between images
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    text |= {"vocab_size": 259, "attention_types": [[["global", "local"], 1]], "window_size": 4}
    tokens = {"start_token_id": 257, "end_token_id": 258, "pad_token_id": 256}
    config = QVisionConfig(vision_config=vision, text_config=text, num_query_tokens=4, **tokens)
    return with_noise(QVisionForConditionalGeneration(config).eval())


@torch.no_grad()
def with_noise(model: QVisionForConditionalGeneration) -> QVisionForConditionalGeneration:
    """Add noise to all weights, biases too, so that images change words."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def byte_tokenizer() -> GPT2Tokenizer:
    return tiny_tokenizer()


def tiny_tokenizer() -> GPT2Tokenizer:
    """The tokenizer of `tiny`: GPT-2's, with no merges."""
    entries = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<START>", "<END>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, **SPECIAL_TOKENS)


def tiny_captioner(model: QVisionForConditionalGeneration | None = None) -> Captioner:
    """A model with the vocabulary of `tiny`, by default one like it, and its processor."""
    model = model or tiny_model()
    return Captioner(model, QVisionProcessor.from_config(model.config, tiny_tokenizer()))


@pytest.fixture
def byte_captioner(tiny) -> Captioner:
    """`tiny` with its processor."""
    return tiny_captioner(tiny)


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """Pixel values of four images for `tiny`."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def captions() -> torch.Tensor:
    """Ids of four captions [4,9] for `tiny`, two of them padded."""
    ids = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[1, 5], ids[1, 6:], ids[3, 3], ids[3, 4:] = 257, 258, 256, 258, 256
    return ids


@pytest.fixture
def noise() -> list[Image.Image]:
    """Three images of random pixels, 60 wide and 40 high."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(3)]
