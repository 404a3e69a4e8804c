"""Checkpoints of both layouts, from folders and from a Hub of our own, whole and broken."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.loading.checkpoint import (
    CheckpointError,
    convert,
    load_checkpoint,
    save_checkpoint,
)
from qvision_lab.model.loading.published import check_copies, read_tokenizer, stored_name

COMMIT = "c0ffee" + 34 * "0"


def write_published(folder: Path, model: QVisionForConditionalGeneration) -> None:
    """Write a model in the published layout, with its copies, leftovers and old buffers."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {stored_name(name): p.data for name, p in model.named_parameters()}
    encoder = {k: v for k, v in weights.items() if k.startswith(("vision.", "proj."))}
    decoder = {k: v for k, v in weights.items() if k not in encoder}
    decoder["gpt_decoder.lm_head.weight"] = decoder["gpt_decoder.transformer.wte.weight"].clone()
    third = {k.removeprefix("gpt_decoder."): v for k, v in decoder.items() if "gpt_decoder" in k}
    width = model.config.hidden_size
    decoder["query_proj.weight"] = torch.ones(width, width)
    decoder["query_proj.bias"] = torch.ones(width)
    decoder["gpt_decoder.transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    encoder |= {
        f"clip.vision_model.{k.removeprefix('vision.')}": v.clone()
        for k, v in encoder.items()
        if k.startswith("vision.")
    }
    encoder["clip.logit_scale"] = torch.tensor(4.6)
    encoder["vision.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(encoder, folder / "encoder.safetensors")
    save_file(decoder, folder / "decoder.safetensors")
    save_file(third, folder / "gpt_decoder.safetensors")
    config = model.config
    sizes = {
        "embed_size": width,
        "vocab_size": config.vocab_size,
        "num_img_tokens": config.num_query_tokens,
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    if config.vocab_size == 50259:
        return
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    text.pop("attention_layers")
    tokens = ("start_token_id", "end_token_id", "pad_token_id")
    architecture = {key: getattr(config, key) for key in tokens}
    architecture |= {"vision_config": vision, "text_config": text}
    (folder / "architecture.json").write_text(json.dumps(architecture))


@pytest.fixture
def published(tiny, tmp_path) -> Path:
    write_published(tmp_path / "published", tiny)
    return tmp_path / "published"


@pytest.fixture
def native(published, byte_tokenizer, tmp_path) -> Path:
    byte_tokenizer.save_pretrained(published)
    return convert(published, tmp_path / "native")


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(0, 256, (2, 7), generator=generator),
    }


# --- both layouts --------------------------------------------------------------------------------


def test_published_layout_loads(published, tiny, batch):
    checkpoint = load_checkpoint(published)
    assert torch.equal(checkpoint.model(**batch).logits, tiny(**batch).logits)
    assert not checkpoint.model.training
    assert checkpoint.processor.tokenizer is None  # no tokenizer there, and GPT-2's would not fit
    origin = checkpoint.provenance
    assert (origin.source, origin.layout, origin.revision) == (str(published), "published", None)
    assert origin.dtype == "float32"
    assert origin.files["encoder.safetensors"] == (published / "encoder.safetensors").stat().st_size
    assert "gpt_decoder.safetensors" not in origin.files


def test_third_copy_is_not_read(published):
    (published / "gpt_decoder.safetensors").write_bytes(b"rubbish")
    load_checkpoint(published)


def test_buffers_are_made_anew_and_shared(published):
    model = load_checkpoint(published).model
    fresh = QVisionForConditionalGeneration(model.config)
    for (name, ours), (_, theirs) in zip(
        model.named_buffers(remove_duplicate=False), fresh.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == theirs.dtype
    assert model.decoder.lm_head.weight is model.decoder.language_model.wte.weight


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory map")
def test_weights_in_float32_stay_in_the_file(published):
    model = load_checkpoint(published).model
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in maps
        if str(published) in line
    ]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in spans), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_is_the_one_asked_for(native, tmp_path, dtype):
    model = load_checkpoint(native, dtype=dtype).model
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in model.parameters()} == {expected}
    half = convert(native, tmp_path / "half", dtype=dtype)
    assert load_checkpoint(half, dtype="auto").model.dtype == expected
    assert load_checkpoint(half).model.dtype == torch.float32


def test_tokenizer_of_the_checkpoint_is_used(native):
    checkpoint = load_checkpoint(native)
    ids = checkpoint.processor.encode("a dog")
    assert checkpoint.processor.decode(ids) == "a dog"
    assert (ids[0], ids[-1]) == (257, 258)


@pytest.mark.parametrize("name", ["published_a", "published_b"])
def test_conversion_changes_no_bit_of_the_original(shared, name, tmp_path):
    source = shared / "reference" / name
    before = load_checkpoint(source)
    after = load_checkpoint(convert(source, tmp_path / "native"))
    assert (before.provenance.layout, after.provenance.layout) == ("published", "native")
    pixels = load_file(source / "expected.safetensors")["pixel_values"]
    generated = []
    for checkpoint in (before, after):
        torch.manual_seed(0)
        generated.append(checkpoint.model.generate(pixel_values=pixels, max_new_tokens=8))
    assert torch.equal(*generated)
    logits = [c.model(pixel_values=pixels, input_ids=generated[0]).logits for c in (before, after)]
    assert torch.equal(*logits)
    assert after.model.generation_config.to_dict() == before.model.generation_config.to_dict()


def test_sharded_native_weights_load(native, tiny, batch, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(native, shards, ignore=lambda *_: ["model.safetensors"])
    tiny.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_checkpoint(shards).model(**batch).logits, tiny(**batch).logits)
    next(shards.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*is missing"):
        load_checkpoint(shards)


def test_saving_replaces_a_checkpoint_and_nothing_else(native, tiny, batch, tmp_path):
    checkpoint = load_checkpoint(native)
    save_checkpoint(checkpoint, native)  # over its own mapped files
    card = (native / "README.md").read_text()
    assert "`published`" not in card
    assert "from `native` (native layout, float32)" in card
    assert torch.equal(load_checkpoint(native).model(**batch).logits, tiny(**batch).logits)
    (native / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds thesis.tex, so it is more than a checkpoint"):
        save_checkpoint(checkpoint, native)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        save_checkpoint(checkpoint, tmp_path / "file")
    save_checkpoint(checkpoint, tmp_path / "new" / "deep", {"README.md": "mine"})
    assert (tmp_path / "new" / "deep" / "README.md").read_text() == "mine"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deep"]


def test_weights_are_as_readable_as_what_lies_beside_them(native):
    assert len({path.stat().st_mode for path in native.iterdir()}) == 1


def test_conversion_takes_companions_along_and_spares_other_checkpoints(native, tmp_path):
    (native / "scores.json").write_text('{"test": 1}')
    (native / "README.md").write_text("how it was trained")
    other = convert(native, tmp_path / "other", dtype="bfloat16")
    for name in ("scores.json", "README.md"):
        assert (other / name).read_bytes() == (native / name).read_bytes()
    with pytest.raises(CheckpointError, match=r"other holds another checkpoint.*give another"):
        convert(native, other)
    convert(other, other, dtype="float16")  # itself may be rewritten
    assert load_checkpoint(other, dtype="auto").provenance.dtype == "float16"
    assert (other / "scores.json").exists()
    save_checkpoint(load_checkpoint(native), other)  # other weights have no such scores
    assert not (other / "scores.json").exists()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("encoder", "clip.vision_model.post_layernorm.bias"),
        ("decoder", "gpt_decoder.lm_head.weight"),
        ("gpt_decoder", "transformer.h.1.mlp.c_fc.weight"),
    ],
)
def test_copies_that_differ_are_refused(published, tmp_path, file, name):
    check_copies(published)
    path = published / f"{file}.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name].view(-1)[-1] += 1e-3
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"two copies of one weight differ: {name} in {file}"):
        convert(published, tmp_path / "native")
    assert not (tmp_path / "native").exists()


# --- what is wrong, and the way out --------------------------------------------------------------


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {k: v.clone() for k, v in load_file(path).items()} | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


WRONG = {
    "missing tensor": (
        lambda f: edit_tensors(f / "decoder.safetensors", query_tokens=None),
        r"tensor query_tokens is missing from the published weights",
    ),
    "misshapen tensor": (
        lambda f: edit_tensors(f / "decoder.safetensors", query_tokens=torch.ones(1, 5, 32)),
        r"query_tokens in .*decoder.safetensors has shape \[1, 5, 32\].*asks for \[1, 4, 32\]",
    ),
    "tensor of integers": (
        lambda f: edit_tensors(f / "decoder.safetensors", img_context=torch.ones(1, 1, 32).long()),
        r"tensor img_context .* has shape \[1, 1, 32\] in I64, .*in F32 or F16 or BF16",
    ),
    "unknown tensor": (
        lambda f: edit_tensors(f / "encoder.safetensors", surprise=torch.ones(1)),
        r"1 tensors have no place in this model, surprise first",
    ),
    "missing file": (
        lambda f: (f / "encoder.safetensors").unlink(),
        r"encoder.safetensors is missing; copy or download",
    ),
    "truncated file": (
        lambda f: (f / "decoder.safetensors").write_bytes(
            (f / "decoder.safetensors").read_bytes()[:-100]
        ),
        r"decoder.safetensors \([\d,]+ bytes\) is truncated or no safetensors file",
    ),
    "empty file": (
        lambda f: (f / "decoder.safetensors").write_bytes(b""),
        r"decoder.safetensors \(0 bytes\) is truncated or no safetensors file",
    ),
    "pickle under a false name": (
        lambda f: torch.save({"a": torch.ones(9)}, f / "decoder.safetensors"),
        r"no safetensors file .* Pickles are never loaded",
    ),
    "no field": (
        lambda f: edit_json(f / "config.json", num_img_tokens=None),
        r"config.json has no field 'num_img_tokens'",
    ),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config.json is no JSON",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"config.json is missing",
    ),
    "sizes that do not fit": (
        lambda f: edit_json(f / "architecture.json", qformer_num_heads=5),
        r"num_attention_heads=5 does not divide the width",
    ),
    "start token outside the vocabulary": (
        lambda f: edit_json(f / "architecture.json", start_token_id=400),
        r"start_token_id=400 is outside the vocabulary of 259",
    ),
    "another vocabulary": (
        lambda f: edit_json(f / "config.json", vocab_size=260),
        r"wte.weight .* has shape \[259, 32\] .*but config.json asks for \[260, 32\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_raise_and_name_what_is_wrong(published, case):
    spoil, message = WRONG[case]
    spoil(published)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(published)


def test_a_tokenizer_that_does_not_fit_raises(native, published, byte_tokenizer):
    byte_tokenizer.add_tokens(["dog"])
    for folder in (native, published):
        byte_tokenizer.save_pretrained(folder)
        with pytest.raises(CheckpointError, match="vocab_size=260, but the model 259"):
            load_checkpoint(folder)


def test_wrong_native_config_raises(native):
    edit_json(native / "config.json", text_config=None)
    with pytest.raises(CheckpointError, match=r"config.json has no field 'text_config'"):
        load_checkpoint(native)
    (native / "preprocessor_config.json").unlink()
    edit_json(native / "config.json", text_config={}, model_type="bert")
    with pytest.raises(CheckpointError, match="model_type='bert' is not a QVision model"):
        load_checkpoint(native)


def test_pickles_are_never_loaded(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Pickles .* are never loaded.*save_file"):
        load_checkpoint(tmp_path)


def test_wrong_arguments_raise(native):
    with pytest.raises(CheckpointError, match=r"there is no folder no/such/folder"):
        load_checkpoint("no/such/folder")
    with pytest.raises(CheckpointError, match=r"is a file; give the folder"):
        load_checkpoint(native / "config.json")
    with pytest.raises(CheckpointError, match=r"revision='main' needs a Hub id"):
        load_checkpoint(native, revision="main")
    for dtype in ("float33", torch.int8, "int8"):
        with pytest.raises(CheckpointError, match=r"dtype=.*does not exist here; use float32"):
            load_checkpoint(native, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"device='gpu' is not available .*; use cpu"):
        load_checkpoint(native, device="gpu")
    with pytest.raises(CheckpointError, match=r"device='cuda:64' is not available .*; use cpu"):
        load_checkpoint(native, device="cuda:64")


# --- the Hub -------------------------------------------------------------------------------------


@dataclass
class Hub:
    """As much of the Hub's HTTP interface as downloads need; remembers what was asked for."""

    folders: dict[str, Path]
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path, _, _ = path.partition("?")
        if api := path.startswith("/api/models/"):
            repository, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            repository, _, tree = repository.partition("/tree/")
            revision = tree or rest or "main"
        else:
            repository, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
        if repository not in self.folders:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        folder = self.folders[repository]
        if api and tree:
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in folder.iterdir()
            ]
            return 200, {}, json.dumps(files).encode()
        if api:
            return 200, {}, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode()
        self.asked.append(name)
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}, (folder / name).read_bytes()


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A Hub on this machine that holds `someone/tiny`, and an empty cache."""
    (published / "qformer.py").write_text("raise SystemExit('never import this')")
    (published / "pytorch_model.bin").touch()
    state = Hub({"someone/tiny": published})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = state.answer(self.path)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield state
        server.shutdown()


def test_only_needed_files_are_downloaded_and_the_commit_is_recorded(hub, tiny, batch):
    checkpoint = load_checkpoint("someone/tiny", revision="v1")
    assert checkpoint.provenance.revision == COMMIT
    assert checkpoint.provenance.source == "someone/tiny"
    needed = {"config.json", "architecture.json", "encoder.safetensors", "decoder.safetensors"}
    assert set(hub.asked) == needed
    assert torch.equal(checkpoint.model(**batch).logits, tiny(**batch).logits)


def test_converting_from_the_hub_reads_the_third_copy_too(hub, tmp_path):
    native = convert("someone/tiny", tmp_path / "native")
    assert "gpt_decoder.safetensors" in hub.asked
    assert f"from `someone/tiny` at commit `{COMMIT}`" in (native / "README.md").read_text()


def test_converting_may_upload_the_result(published, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **settings: calls.append(name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **settings: calls.append(settings))
    native = convert(published, tmp_path / "native", push_to="me/tiny")
    assert calls == ["me/tiny", {"repo_id": "me/tiny", "folder_path": native}]


@pytest.mark.parametrize("offline", ["switched off", "unreachable"])
def test_the_cache_works_without_network(hub, monkeypatch, offline):
    load_checkpoint("someone/tiny")
    asked = len(hub.asked)
    if offline == "switched off":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_checkpoint("someone/tiny").provenance.revision == COMMIT
    assert len(hub.asked) == asked
    with pytest.raises(
        CheckpointError, match=r"someone/other is not complete in the cache .*hf download"
    ):
        load_checkpoint("someone/other")
    with pytest.raises(CheckpointError, match="someone/tiny at revision 'v2' is not complete"):
        load_checkpoint("someone/tiny", revision="v2")


def test_unknown_repositories_and_revisions_raise(hub):
    with pytest.raises(CheckpointError, match="someone/tiny has no revision 'v2'; give one of"):
        load_checkpoint("someone/tiny", revision="v2")
    with pytest.raises(CheckpointError, match="someone/typo is neither a folder here nor"):
        load_checkpoint("someone/typo")


def test_gpt2_tokenizer_comes_from_the_hub_or_a_warning_does(hub, byte_tokenizer, tmp_path):
    config = QVisionConfig()
    with pytest.warns(UserWarning, match=r"without a tokenizer.*openai-community/gpt2"):
        assert read_tokenizer(tmp_path, config) is None
    gpt2 = tmp_path / "gpt2"
    vocabulary = {
        entry: i for i, entry in enumerate(byte_tokenizer.convert_ids_to_tokens(range(256)))
    }
    vocabulary |= {f"entry {i}": i for i in range(256, 50256)} | {"<|endoftext|>": 50256}
    type(byte_tokenizer)(vocab=vocabulary, merges=[]).save_pretrained(gpt2)
    hub.folders["openai-community/gpt2"] = gpt2
    tokenizer = read_tokenizer(tmp_path, config)
    assert len(tokenizer) == 50259
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (50257, 50258, 50256)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import re
import sys
from pathlib import Path
from qvision_lab.model.loading.checkpoint import load_checkpoint

def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", status)[1])

load_checkpoint(sys.argv[1])  # all imports
before = resident("VmRSS")
model = load_checkpoint(sys.argv[2], dtype=sys.argv[3]).model
loaded = resident("VmHWM")  # the peak, also during the load
for parameter in model.parameters():
    parameter.sum()  # brings mapped pages in
needed = 4 * sum(p.numel() for p in model.parameters())
assert needed == 4 * 509_190_401
print((loaded - before) / needed, (resident("VmHWM") - before) / needed)
"""


@pytest.mark.slow
def test_memory_of_a_full_size_load(published, tmp_path):
    """A random checkpoint of the published sizes with all copies: 4.2 GB on disk."""
    write_published(tmp_path / "full", QVisionForConditionalGeneration(QVisionConfig()))
    for dtype, limit in (("float32", 1.1), ("bfloat16", 0.75)):
        script = [sys.executable, "-W", "ignore", "-c", MEASURE]
        result = subprocess.run(
            [*script, published, tmp_path / "full", dtype],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        loaded, used = (float(number) for number in result.stdout.split())
        print(f"{dtype}: {loaded:.2f}x the fp32 weights once loaded, {used:.2f}x once all are used")
        assert max(loaded, used) <= limit
    shutil.rmtree(tmp_path / "full")  # pytest would keep it for days
