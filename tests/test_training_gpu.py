"""What training does on a GPU, as far as a CPU can show it: the same numbers, and nothing left."""

# ruff: noqa: F401, F811 - fixtures that other files have

import copy
import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_training import home, losses, new_model, quick, run, weights

import qvision_lab as ql
from qvision_lab.data.coco import open_dataset
from qvision_lab.model.attention import MultiHeadAttention
from qvision_lab.model.captioner import IGNORED_LABEL, QVisionForConditionalGeneration
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training import features, freezing, gpu, trainer
from qvision_lab.training.optimizers import BatchedMuon, MuonAdamW
from qvision_lab.training.samples import CaptionCollator, CaptionSamples
from qvision_lab.training.trainer import StageTrainer, Validation

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def held(monkeypatch) -> None:
    """Trainers hold frozen matrices in bfloat16 on the CPU too."""
    init = StageTrainer.__init__

    def holds(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.frozen = gpu.frozen_matrices(self.model)
        self.originals = [weight.data for weight in self.frozen]
        assert self.frozen

    monkeypatch.setattr(StageTrainer, "__init__", holds)


def undropped(model: QVisionForConditionalGeneration) -> QVisionForConditionalGeneration:
    """A copy in training mode that draws nothing."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, MultiHeadAttention):
            module.dropout = 0.0
    return model


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
    assert {n for n, g in found.items() if g is None} == {
        n for n, g in expected.items() if g is None
    }
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is not None:
            difference = (found[name] - gradient).abs().max() / largest
            assert difference < 1e-5, (name, difference)


def compile_with(backend, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "compiled_blocks", partial(gpu.compiled_blocks, backend=backend))


def without_dropout(home) -> None:
    config = json.loads((home / "base/config.json").read_text())
    (home / "base/config.json").write_text(json.dumps(config | {"dropout": 0.0}))


def test_products_are_precise_again_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()

    def fails():
        with gpu.tf32_products():
            raise KeyError(torch.get_float32_matmul_precision())

    with pytest.raises(KeyError, match="high"):
        fails()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("labels_are", ["captions", "some of a larger batch"])
def test_text_states_and_head_loss_are_the_models_loss_and_gradients(tiny, labels_are):
    """Of captions longer than the window of a local layer, in a step without dropout."""
    batch = caption_batch(tiny)
    assert tiny.config.text_config.window_size < 11
    count = {"captions": None, "some of a larger batch": torch.tensor(50)}[labels_are]
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


@pytest.mark.parametrize("policy", ["phase2", "qformer", "bridge"])
def test_frozen_matrices_in_bfloat16_are_what_autocast_casts_them_to(tiny, policy):
    model = copy.deepcopy(tiny).train()
    freezing.apply(model, policy)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(0)
        ids = torch.randint(0, 256, (4, 7))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=torch.randn(2, 3, 32, 32), input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    once = step()
    frozen = gpu.frozen_matrices(model)
    assert model.decoder.language_model.wte.weight not in set(frozen)
    with gpu.holding(frozen, [weight.data.bfloat16() for weight in frozen]):
        assert model.decoder.language_model.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
        again = step()
    assert all(map(torch.equal, once, again))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_run_that_holds_them_saves_what_one_without_does(home, monkeypatch, request):
    changes = "training.precision=bfloat16", "training.phases.1.policy=0.5"  # of two blocks
    plain = run(home, "plain", *changes)
    request.getfixturevalue("held")
    step, taken = StageTrainer.training_step, []

    def stops_once(self, *args, **kwargs):
        taken.append(self.frozen[0].dtype)
        if len(taken) == 11:  # in the second phase, behind its first checkpoint
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stops_once)
    with pytest.raises(KeyboardInterrupt):
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
    compiled = []

    def works(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def fails(graph, inputs):
        raise OSError("there is no compiler")

    with monkeypatch.context() as patched:
        compile_with(works, patched)
        run(home, "compiled", "training.compile=true")
    assert compiled
    compile_with(fails, monkeypatch)
    with pytest.warns(UserWarning, match="there is no compiler") as warned:
        run(home, "failed", "training.compile=true")
    assert sum("not compiled" in str(each.message) for each in warned) == 2  # once per phase
    for name in ("compiled", "failed"):
        assert losses(home / name) == pytest.approx(losses(home / "plain"), abs=1e-5)


def test_blocks_compile_completely_and_share_their_code(tiny):
    """GPT-Neo's, which are transformers': a new length or frozen weights, and no new code a layer.

    Ours are checked for their shapes in tests, which a compiler cannot read.
    """
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = copy.deepcopy(tiny).train()
    freezing.apply(model, "published")
    blocks = model.decoder.language_model.h
    plain = blocks[0](torch.ones(2, 8, 32))[0]
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    for length in (8, 16, 24, 32):
        for block in blocks:  # one attends to all positions, one to a window
            block(torch.ones(2, length, 32, requires_grad=True))
    assert len(compiled) == 2  # of the first length, and of all others
    torch.testing.assert_close(blocks[0](torch.ones(2, 8, 32))[0], plain)
    gpu.uncompile(model)
    assert blocks[0]._compiled_call_impl is None


def test_batched_matrices_are_stepped_as_torch_does_one_by_one(new_model):
    models = [copy.deepcopy(new_model) for _ in range(2)]
    optimizers = [MuonAdamW(model, 1e-3, 0.02, 0.03).muon for model in models]
    assert type(optimizers[1]) is BatchedMuon
    for step in range(3):
        for model, optimizer, batched in zip(models, optimizers, (False, True), strict=True):
            torch.manual_seed(step)
            alike: dict = {}
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.randn_like(weight)
                    alike.setdefault((0, weight.shape), []).append(weight)
            optimizer.step_batched(alike) if batched else optimizer.step()
            assert max(map(len, alike.values())) > 2
            assert model.qformer.key_proj.weight.isfinite().all()
    before = new_model.qformer.key_proj.weight
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # of steps of up to 0.06
    assert (models[1].qformer.key_proj.weight - before).abs().max() > 0.02
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, state in states[0].items():
        torch.testing.assert_close(state, states[1][number])


@pytest.mark.parametrize("longest", [1, 7, 8, 15])
def test_packed_batches_say_where_words_are(longest):
    captions = [torch.arange(1, 1 + length) for length in (longest, 1, longest // 2 + 1)]
    count = sum(map(len, captions))
    samples = [{"vision_states": torch.zeros(1, 2), "captions": captions}]
    batch, plain = CaptionCollator(0, packed=True)(samples), CaptionCollator(0)(samples)
    ids, places = batch["input_ids"], batch["places"]
    assert ids.shape == (3, 8 if longest < 8 else 16)
    assert torch.equal(ids[:, :longest], plain["input_ids"])
    assert (batch["labels"][:, longest:] == IGNORED_LABEL).all()
    assert len(places) == 64
    assert torch.equal(ids.flatten()[places[:count]], torch.cat(captions))
    assert (places[count:] == ids.numel() - 1).all()
    packing = gpu.Packing(ids.shape, places)
    words = torch.arange(64)
    assert torch.equal(packing.pack(packing.unpack(words))[:count], words[:count])


def test_a_loss_that_is_checked_later_still_has_its_step():
    stage = StageTrainer.__new__(StageTrainer)
    stage.args = SimpleNamespace(output_dir="run")
    stage.losses = [(3, torch.tensor(1.0)), (4, torch.tensor(torch.nan)), (5, torch.tensor(2.0))]
    with pytest.raises(ValueError, match="the loss is nan at step 4 of run"):
        stage._check_losses()
    assert not stage.losses


def test_all_evaluations_of_a_run_share_a_captioner(home, monkeypatch):
    made = []
    captioner = trainer.Captioner
    monkeypatch.setattr(trainer, "Captioner", lambda *args: made.append(args) or captioner(*args))
    run(home, "run", "training.phases=[{policy: bridge, epochs: 2}]")
    assert len(made) == 1


def test_captions_are_encoded_and_files_opened_once(home, tiny, byte_tokenizer, monkeypatch):
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    images = open_dataset(home / "pictures/train.jsonl")
    cache = features.FeatureCache(home / "cache", tiny, "float32")
    cached = cache.encode(images, tiny, processor)
    encoded, opened = [], []
    encode, safe_open = processor.encode, features.safe_open
    monkeypatch.setattr(processor, "encode", lambda *how: encoded.append(how) or encode(*how))
    monkeypatch.setattr(features, "safe_open", lambda *how: opened.append(how) or safe_open(*how))
    samples = CaptionSamples(images, processor, 5, 40, 0, cached)
    first = samples[3]
    assert all(torch.equal(samples[3][name], first[name]) for name in ("vision_states",))
    samples.epoch = 1
    others = samples[3]["captions"]
    assert {tuple(ids.tolist()) for ids in others} == {tuple(c.tolist()) for c in first["captions"]}
    assert len(encoded) == len(images[3].references)
    assert len(opened) == 1


@pytest.mark.parametrize(("cores", "workers"), [(2, 0), (16, 8), (6, 6)])
def test_images_are_read_by_as_many_processes_as_fit(
    home, tiny, byte_tokenizer, monkeypatch, cores, workers
):
    asked = []

    class Reader(torch.utils.data.DataLoader):
        def __init__(self, *args, num_workers, **how):
            asked.append(num_workers)
            super().__init__(*args, **how)

    monkeypatch.setattr(features, "DataLoader", Reader)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    images = open_dataset(home / "pictures/val.jsonl")
    cache = features.FeatureCache(home / "cache", tiny, "float32")
    cache.encode(images, tiny, processor, workers=None)
    assert asked == [workers]


def test_validation_takes_the_captioners_own_size_on_a_gpu(tiny, home, byte_tokenizer):
    asked = []

    class Recorder(SimpleNamespace):
        def caption(self, pictures, **how):
            asked.append(how["batch_size"])
            return [SimpleNamespace(text=str(i)) for i, _ in enumerate(pictures)]

    processor = QVisionProcessor.from_config(tiny.config, byte_tokenizer)
    validation = Validation(open_dataset(home / "pictures/val.jsonl"), processor, 3)
    for kind in ("cpu", "cuda"):
        model = SimpleNamespace(device=torch.device(kind))
        validation.captioner = Recorder(model=model)
        validation.captions(model)
    assert asked == [3, None]
