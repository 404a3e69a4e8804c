"""What training does on a GPU, as far as a CPU can show it: the same numbers, and nothing left."""

# ruff: noqa: F401, F811 - fixtures that other files have

import copy
import json
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import interrupted, undropped
from test_training import home, losses, quick, run, weights, without_dropout
from torch.utils._python_dispatch import TorchDispatchMode

import qvision_lab as ql
from qvision_lab.model.captioner import IGNORED_LABEL
from qvision_lab.training import features, freezing, gpu
from qvision_lab.training.optimizers import BatchedMuon, MuonAdamW
from qvision_lab.training.samples import CaptionCollator, CaptionSamples
from qvision_lab.training.trainer import StageTrainer

pytestmark = pytest.mark.usefixtures("quick")


def caption_batch(model, seed: int = 0, longest: int = 11) -> dict[str, torch.Tensor]:
    """A packed batch of 2 images with 3 captions each, one of which has no targets."""
    draw, config = torch.Generator().manual_seed(seed), model.config
    lengths = torch.randint(2, longest + 1, (6,), generator=draw).tolist()
    lengths[0] = longest
    captions = [torch.randint(3, 256, (length,), generator=draw) for length in lengths]
    states = torch.randn(2, 4, config.vision_config.hidden_size, generator=draw)
    samples = [
        {"vision_states": states[image], "captions": captions[3 * image : 3 * image + 3]}
        for image in range(2)
    ]
    batch = CaptionCollator(config.pad_token_id, packed=True)(samples)
    batch["labels"][3] = IGNORED_LABEL
    return batch


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-5 of the largest."""
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert {name for name, gradient in found.items() if gradient is not None} == expected.keys()
    close = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=close, rtol=0)


class Backend(list):
    """A backend of `torch.compile` that changes no graph and keeps them all."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward


def test_products_are_precise_again_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError, match="high"), gpu.tf32_products():
        raise KeyError(torch.get_float32_matmul_precision())
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("count", [None, torch.tensor(50)], ids=["captions", "a larger batch"])
def test_text_states_and_head_loss_are_the_models_loss_and_gradients(tiny, count):
    """Of captions longer than the window of a local layer, in a step without dropout."""
    batch = caption_batch(tiny)
    assert tiny.config.text_config.window_size < 11
    found = []
    for fast in (False, True):
        model = undropped(tiny)
        freezing.apply(model, "published")
        if fast:
            inputs = (batch[name] for name in ("vision_states", "input_ids", "places"))
            words = gpu.TextStates(model)(*inputs)
            loss = gpu.head_loss(model, words, batch["labels"], batch["places"], count)
        else:
            loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        assert "_attn" not in vars(model.decoder.language_model.h[1].attn.attention)
    (expected, gradients), (loss, fast_gradients) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    check_gradients(fast_gradients, gradients)


def test_frozen_matrices_in_bfloat16_change_nothing_that_is_saved(home, monkeypatch):
    monkeypatch.setattr("qvision_lab.training.trainer.has_bfloat16", lambda: True)
    changes = "training.precision=bfloat16", "training.phases.1.policy=0.5"  # of two blocks
    plain = run(home, "plain", *changes)
    init, step, taken = StageTrainer.__init__, StageTrainer.training_step, []

    def hold(self, *args, **kwargs):  # as on a GPU
        init(self, *args, **kwargs)
        self.frozen = gpu.frozen_matrices(self.model)
        assert self.model.decoder.language_model.wte.weight not in set(self.frozen)
        self.originals = [weight.data for weight in self.frozen]

    def recorded(self, *args, **kwargs):
        taken.append(self.frozen[0].dtype)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "__init__", hold)
    monkeypatch.setattr(StageTrainer, "training_step", recorded)
    with interrupted(10):  # in the second phase, after its first checkpoint
        run(home, "held", *changes)
    resumed = run(home, "held", *changes)
    assert set(taken) == {torch.bfloat16}
    assert weights(resumed) == weights(plain)
    for checkpoint in (home / "held/phase-2").glob("checkpoint-*"):
        assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "float32"
    model, base = ql.load(resumed).model, ql.load(home / "base").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    for name, frozen in base.vision.named_parameters():
        assert torch.equal(frozen, model.vision.get_parameter(name))


def test_compiled_steps_train_as_plain_ones_do_also_where_compiling_fails(home, monkeypatch):
    without_dropout(home)
    run(home, "plain")
    works, fails = Backend(), Mock(side_effect=OSError("there is no compiler"))
    compiled = gpu.compiled_blocks
    monkeypatch.setattr(gpu, "compiled_blocks", partial(compiled, backend=works))
    run(home, "compiled", "training.compile=true")
    assert works
    monkeypatch.setattr(gpu, "compiled_blocks", partial(compiled, backend=fails))
    with pytest.warns(UserWarning, match="there is no compiler") as warned:
        run(home, "failed", "training.compile=true")
    assert sum("not compiled" in str(each.message) for each in warned) == 2  # once per phase
    for name in ("compiled", "failed"):
        assert losses(home / name) == pytest.approx(losses(home / "plain"), abs=1e-5)


def test_blocks_compile_completely_and_share_their_code(tiny):
    """GPT-Neo's, which are transformers': a new length or frozen weights, and no new code a layer.

    Ours are checked for their shapes in tests, which a compiler cannot read.
    """
    backend, model = Backend(), copy.deepcopy(tiny).train()
    freezing.apply(model, "published")
    blocks = model.decoder.language_model.h
    plain = blocks[0](torch.ones(2, 8, 32))[0]
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    for length in (8, 16, 24, 32):
        for block in blocks:  # one attends to all positions, one to a window
            block(torch.ones(2, length, 32, requires_grad=True))
    assert len(backend) == 2  # of the first length, and of all others
    torch.testing.assert_close(blocks[0](torch.ones(2, 8, 32))[0], plain)
    gpu.uncompile(model)
    assert blocks[0]._compiled_call_impl is None


def test_batched_matrices_are_stepped_as_torch_does_one_by_one(tiny):
    models = [copy.deepcopy(tiny) for _ in range(2)]
    optimizers = [MuonAdamW(model, 1e-3, 0.02, 0.03).muon for model in models]
    for step in range(3):
        for optimizer, method in zip(
            optimizers, (torch.optim.Muon.step, BatchedMuon.step), strict=True
        ):
            torch.manual_seed(step)
            for weight in optimizer.param_groups[0]["params"]:
                weight.grad = torch.randn_like(weight)
            method(optimizer)
    before = tiny.qformer.key_proj.weight
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # of steps of up to 0.06
    assert (models[1].qformer.key_proj.weight - before).abs().max() > 0.02
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, state in states[0].items():
        torch.testing.assert_close(state, states[1][number])


def test_on_a_cpu_muon_multiplies_in_float32(tiny):  # bfloat16 is slow where it is emulated
    optimizer = MuonAdamW(copy.deepcopy(tiny), 1e-3, 0.02, 0.03).muon
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.randn_like(weight)
    dtypes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm"):
                dtypes.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Products():
        optimizer.step()
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("longest", [1, 7, 8, 15])
def test_packed_batches_say_where_words_are(longest):
    captions = [torch.arange(1, 1 + length) for length in (longest, 1, longest // 2 + 1)]
    count = sum(map(len, captions))
    samples = [{"vision_states": torch.zeros(1, 2), "captions": captions}]
    batch, plain = CaptionCollator(0, packed=True)(samples), CaptionCollator(0)(samples)
    ids, places = batch["input_ids"], batch["places"]
    assert ids.shape == (3, 8 if longest < 8 else 16)
    assert torch.equal(ids[:, :longest], plain["input_ids"])
    targets = ids.masked_fill(ids == 0, IGNORED_LABEL)
    targets[:, 0] = IGNORED_LABEL
    assert torch.equal(batch["labels"], targets)
    assert torch.equal(plain["labels"], targets[:, :longest])
    assert len(places) == 64
    assert torch.equal(ids.flatten()[places[:count]], torch.cat(captions))
    assert (places[count:] == ids.numel() - 1).all()
    packing = gpu.Packing(ids.shape, places)
    words = torch.arange(64)
    assert torch.equal(packing.pack(packing.unpack(words))[:count], words[:count])


def test_captions_are_encoded_and_files_opened_once(home, byte_captioner, monkeypatch):
    processor = byte_captioner.processor
    images = ql.coco.open_dataset(home / "pictures/train.jsonl")
    cache = features.FeatureCache(home / "cache", byte_captioner.model, "float32")
    cached = cache.encode(images, byte_captioner.model, processor)
    encode, safe_open = Mock(wraps=processor.encode), Mock(wraps=features.safe_open)
    monkeypatch.setattr(processor, "encode", encode)
    monkeypatch.setattr(features, "safe_open", safe_open)
    samples = CaptionSamples(images, processor, 5, 40, 0, cached)
    first = samples[3]
    assert torch.equal(samples[3]["vision_states"], first["vision_states"])
    samples.epoch = 1
    others = samples[3]["captions"]
    assert {tuple(ids.tolist()) for ids in others} == {tuple(c.tolist()) for c in first["captions"]}
    assert encode.call_count == len(images[3].references)
    assert safe_open.call_count == 1
