"""What all tests share. Shapes in annotations are checked in the model, since this comes first."""

import os
from pathlib import Path

if os.environ.get("QVISION_GPU_TESTS") != "1":  # `make test-gpu` sets it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for subprocesses: these tests expect a CPU

import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

# Not `config`: the hook misreads the constructor of transformers' strict dataclasses.
STAGES = ("attention", "vision", "qformer", "decoder", "captioner")
if os.environ.get("QVISION_GPU_TESTS") != "1":  # a compiler cannot read the checks
    install_import_hook([f"qvision_lab.model.{stage}" for stage in STAGES], "beartype.beartype")

from qvision_lab.model.captioner import QVisionForConditionalGeneration  # noqa: E402
from qvision_lab.model.config import QVisionConfig  # noqa: E402

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
    """The original code's numbers and COCO pictures, beside the repository or elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}; QVISION_SHARED says where it is")
    return SHARED


@pytest.fixture(scope="session")
def tiny() -> QVisionForConditionalGeneration:
    """A random model with every part: 4 patches, 4 queries, the 256 bytes as vocabulary."""
    torch.manual_seed(5)  # one where captions differ between pictures
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    config = QVisionConfig(
        vision_config={**vision, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        text_config={
            **text,
            "vocab_size": 259,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        num_query_tokens=4,
        start_token_id=257,
        end_token_id=258,
        pad_token_id=256,
    )
    model = QVisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # enough that pictures change words
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def byte_tokenizer() -> GPT2Tokenizer:
    """The tokenizer of `tiny`: GPT-2's, with no merges."""
    entries = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<START>", "<END>"]
    return GPT2Tokenizer(
        vocab={entry: i for i, entry in enumerate(entries)},
        merges=[],
        unk_token=None,
        bos_token="<START>",
        eos_token="<END>",
        pad_token="<|endoftext|>",
    )
