"""Shared fixtures; switches on the checks of shapes in the model's annotations."""

import copy
import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if os.environ.get("QVISION_GPU_TESTS") != "1":  # `make test-gpu` sets it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for subprocesses: these tests expect a CPU

import matplotlib.pyplot as plt
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

import qvision_lab as ql  # noqa: E402
from qvision_lab.model.attention import MultiHeadAttention  # noqa: E402
from qvision_lab.model.loading import checkpoint  # noqa: E402
from qvision_lab.model.loading.published import SPECIAL_TOKENS  # noqa: E402

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHARED = Path(os.environ.get("QVISION_SHARED") or Path(__file__).parents[2] / "shared")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests that take minutes or gigabytes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
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
    model, facts = checkpoint.load_checkpoint(folder).model, (folder / "expected.json").read_text()
    expected = load_file(folder / "expected.safetensors", device=str(model.device))
    return model, expected, json.loads(facts)


@pytest.fixture(scope="session")
def tiny() -> ql.QVisionForConditionalGeneration:
    return tiny_model()


def tiny_model() -> ql.QVisionForConditionalGeneration:
    """A random model with every part: 4 patches, 4 queries, the 256 bytes as vocabulary."""
    torch.manual_seed(5)  # one where captions differ between images
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    text |= {"vocab_size": 259, "attention_types": [[["global", "local"], 1]], "window_size": 4}
    tokens = {"start_token_id": 257, "end_token_id": 258, "pad_token_id": 256}
    config = ql.QVisionConfig(vision_config=vision, text_config=text, num_query_tokens=4, **tokens)
    return with_noise(ql.QVisionForConditionalGeneration(config).eval())


@torch.no_grad()
def with_noise(model: ql.QVisionForConditionalGeneration) -> ql.QVisionForConditionalGeneration:
    """Add noise to all weights, biases too, so that images change words."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def undropped(model: ql.QVisionForConditionalGeneration) -> ql.QVisionForConditionalGeneration:
    """A copy in training mode that draws nothing."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, MultiHeadAttention):
            module.dropout = 0.0
    return model


@pytest.fixture
def byte_tokenizer() -> GPT2Tokenizer:
    return tiny_tokenizer()


def tiny_tokenizer() -> GPT2Tokenizer:
    """The tokenizer of `tiny`: GPT-2's, with no merges."""
    entries = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<START>", "<END>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, **SPECIAL_TOKENS)


def tiny_captioner(model: ql.QVisionForConditionalGeneration | None = None) -> ql.Captioner:
    """A model with the vocabulary of `tiny`, by default one like it, and its processor."""
    model = model or tiny_model()
    return ql.Captioner(model, ql.QVisionProcessor.from_config(model.config, tiny_tokenizer()))


@pytest.fixture(scope="session")
def embedded() -> ql.Captioner:
    """The shipped captioner of scenes; no test changes its weights."""
    return ql.load("scenes", device="cpu")


def save_captioner(captioner: ql.Captioner, folder: Path) -> Path:
    """A checkpoint in the native layout."""
    origin = checkpoint.Provenance("a test", "native", None, {}, "float32")
    parts = captioner.model, captioner.processor, origin, captioner.familiarity
    return checkpoint.save_checkpoint(checkpoint.Checkpoint(*parts), folder)


@pytest.fixture
def byte_captioner(tiny) -> ql.Captioner:
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
    return random_images(3)


def random_images(n: int, width: int = 60, height: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(n)]


@contextmanager
def interrupted(step: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Training stops with an error at a step, counted over all stages; which is expected."""
    from qvision_lab.training.trainer import StageTrainer

    training_step, taken = StageTrainer.training_step, []

    def interruptible(trainer, *args, **kwargs):
        taken.append(trainer)
        if len(taken) > step:
            raise error
        return training_step(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", interruptible)
        with pytest.raises(error):
            yield


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let a file grow past a size, as it does on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def run_notebook(
    number: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch, skipped: str = "$"
) -> None:
    """Run a notebook's cells here, with one line of its parameter cell changed.

    `skipped` is a pattern of the beginning of cell ids.
    """
    pytest.importorskip("ipywidgets")
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith(number))
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changed, names = 0, {"__name__": "__main__", "display": print}
    with plt.rc_context({"backend": "agg"}), torch.enable_grad():  # a notebook may switch it off
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and not re.match(skipped, cell["id"]):
                source, found = re.subn(f"(?m)^{old}", new, "".join(cell["source"]))
                changed += found
                exec(compile(source, f"{path.name}, cell {cell['id']}", "exec"), names)
                plt.close("all")
    assert changed == 1
