"""Checkpoints of both layouts, from folders and from a local Hub, complete and damaged."""

import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load, load_file, save

import qvision_lab as ql
from qvision_lab.benchmark.loading import OURS, load_once, write_published
from qvision_lab.model.loading.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from qvision_lab.model.loading.published import check_copies, read_tokenizer

COMMIT = "c0ffee" + 34 * "0"


def edit(path: Path, **changes: object) -> None:
    """Change tensors or fields of a file; None deletes one."""
    is_json = path.suffix == ".json"
    content = (json.loads(path.read_text()) if is_json else load(path.read_bytes())) | changes
    content = {name: value for name, value in content.items() if value is not None}
    path.write_bytes(json.dumps(content).encode() if is_json else save(content))


@pytest.fixture
def published(tiny, tmp_path) -> Path:
    """The published layout of `tiny`, with unused tensors and the buffers of older versions."""
    folder = tmp_path / "published"
    folder.mkdir()
    write_published(folder, tiny)
    encoder = {"clip.logit_scale": torch.tensor(4.6)}
    encoder["vision.embeddings.position_ids"] = torch.arange(5)[None]
    decoder = {"query_proj.weight": torch.ones(32, 32), "query_proj.bias": torch.ones(32)}
    decoder["gpt_decoder.transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    edit(folder / "encoder.safetensors", **encoder)
    edit(folder / "decoder.safetensors", **decoder)
    return folder


@pytest.fixture
def native(published, byte_tokenizer, tmp_path) -> Path:
    byte_tokenizer.save_pretrained(published)
    return ql.convert(published, tmp_path / "native")


@pytest.fixture
def logits(tiny, pixels, captions):
    """The logits of a model, compared with those of `tiny`."""

    def check(model: ql.QVisionForConditionalGeneration) -> bool:
        batch = {"pixel_values": pixels, "input_ids": captions}
        return torch.equal(model(**batch).logits, tiny(**batch).logits)

    return check


def test_published_layout_loads(published, logits):
    (published / "gpt_decoder.safetensors").write_bytes(b"not read")
    checkpoint = load_checkpoint(published)
    assert logits(checkpoint.model)
    assert not checkpoint.model.training
    assert checkpoint.processor.tokenizer is None  # no tokenizer there, and GPT-2's would not fit
    origin = checkpoint.provenance
    assert (origin.source, origin.layout, origin.revision) == (str(published), "published", None)
    assert origin.dtype == "float32"
    assert origin.files["encoder.safetensors"] == (published / "encoder.safetensors").stat().st_size
    assert "gpt_decoder.safetensors" not in origin.files
    model = checkpoint.model
    assert model.decoder.lm_head.weight is model.decoder.language_model.wte.weight
    buffers = model.named_buffers(remove_duplicate=False)
    fresh = dict(ql.QVisionForConditionalGeneration(model.config).named_buffers())
    for name, buffer in buffers:  # recomputed, though some are in the files
        torch.testing.assert_close(buffer, fresh.pop(name), rtol=0, atol=0)
    assert not fresh


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory map")
def test_weights_in_float32_stay_in_the_file(published):
    model = load_checkpoint(published).model
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(published) in line]
    for name, parameter in model.named_parameters():
        place = parameter.data_ptr()
        assert any(int(start, 16) <= place < int(end, 16) for start, end in ranges), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_is_the_one_asked_for(native, tmp_path, dtype):
    model = load_checkpoint(native, dtype=dtype).model
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in model.parameters()} == {expected}
    half = ql.convert(native, tmp_path / "half", dtype=dtype)
    assert load_checkpoint(half, dtype="auto").model.dtype == expected
    assert load_checkpoint(half).model.dtype == torch.float32
    edit(half / "model.safetensors", **{"decoder.bridge.scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match="dtype='auto', but the files have 2"):
        load_checkpoint(half, dtype="auto")


@pytest.mark.parametrize("name", ["published_a", "published_b"])
def test_conversion_changes_no_bit_of_the_original(shared, name, tmp_path):
    source = shared / "reference" / name
    before = load_checkpoint(source)
    after = load_checkpoint(ql.convert(source, tmp_path / "native"))
    assert (before.provenance.layout, after.provenance.layout) == ("published", "native")
    expected = load_file(source / "expected.safetensors")
    batch = {name: expected[name] for name in ("input_ids", "pixel_values")}
    assert torch.equal(before.model(**batch).logits, after.model(**batch).logits)
    assert after.model.generation_config.to_dict() == before.model.generation_config.to_dict()


def test_sharded_native_weights_load(native, tiny, logits):
    (native / "model.safetensors").unlink()
    tiny.save_pretrained(native, max_shard_size="100KB")
    assert len(list(native.glob("model-*.safetensors"))) > 1
    assert logits(load_checkpoint(native).model)
    next(native.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*is missing"):
        load_checkpoint(native)


def test_saving_replaces_a_checkpoint_and_nothing_else(native, logits, tmp_path):
    assert len({path.stat().st_mode for path in native.iterdir()}) == 1  # all equally readable
    checkpoint = load_checkpoint(native)
    ids = checkpoint.processor.encode("a dog")  # by the tokenizer of the checkpoint
    assert (ids[0], ids[-1]) == (257, 258)
    assert checkpoint.processor.decode(ids) == "a dog"
    save_checkpoint(checkpoint, native)  # over its own mapped files
    card = (native / "README.md").read_text()
    assert "`published`" not in card
    assert "from `native` (native layout, float32)" in card
    assert logits(load_checkpoint(native).model)
    (native / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds thesis.tex, so it is no checkpoint"):
        save_checkpoint(checkpoint, native)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        save_checkpoint(checkpoint, tmp_path / "file")
    save_checkpoint(checkpoint, tmp_path / "new" / "deep", {"README.md": "mine"})
    assert (tmp_path / "new" / "deep" / "README.md").read_text() == "mine"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deep"]


def test_conversion_copies_companions_and_spares_other_checkpoints(native, tmp_path):
    (native / "scores.json").write_text('{"test": 1}')
    (native / "README.md").write_text("how it was trained")
    other = ql.convert(native, tmp_path / "other", dtype="bfloat16")
    for name in ("scores.json", "README.md"):
        assert (other / name).read_bytes() == (native / name).read_bytes()
    with pytest.raises(CheckpointError, match=r"other holds another checkpoint; give another"):
        ql.convert(native, other)
    ql.convert(other, other, dtype="float16")  # itself may be rewritten
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
    edit(path, **{name: load_file(path)[name] + 1e-3})
    with pytest.raises(CheckpointError, match=f"two copies of one weight differ: {name} in {file}"):
        ql.convert(published, tmp_path / "native")
    assert not (tmp_path / "native").exists()


ONES = torch.ones(1, 1, 32)
WRONG = [  # a file, how it is changed, and the error
    ("decoder.safetensors", {"query_tokens": None}, "query_tokens is missing from the published"),
    ("decoder.safetensors", {"query_tokens": ONES}, r"shape \[1, 1, 32\].*asks for \[1, 4, 32\]"),
    ("decoder.safetensors", {"img_context": ONES.long()}, "img_context .* in I64.* F16 or BF16"),
    ("encoder.safetensors", {"surprise": ONES}, "1 tensors have no place in.*, surprise first"),
    ("encoder.safetensors", None, "encoder.safetensors is missing; copy or download"),
    ("decoder.safetensors", -100, r"decoder.safetensors \([\d,]+ bytes\) is truncated or no"),
    ("decoder.safetensors", b"", r"decoder.safetensors \(0 bytes\) is truncated or no"),
    ("decoder.safetensors", pickle.dumps([1] * 9), "no safetensors file .* Pickles are never"),
    ("config.json", {"num_img_tokens": None}, "config.json has no field 'num_img_tokens'"),
    ("config.json", {"vocab_size": 260}, r"wte.* \[259, 32\] .*config.json asks for \[260, 32\]"),
    ("config.json", b"{", "config.json is no JSON"),
    ("config.json", None, "config.json is missing"),
    ("architecture.json", {"qformer_num_heads": 5}, "num_attention_heads=5 does not divide the"),
    ("architecture.json", {"start_token_id": 400}, "start_token_id=400 is outside the .* of 259"),
]


@pytest.mark.parametrize(("file", "change", "message"), WRONG)
def test_wrong_files_raise_and_name_what_is_wrong(published, file, change, message):
    path = published / file
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        edit(path, **change)
    else:
        path.write_bytes(path.read_bytes()[:change] if isinstance(change, int) else change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(published)


def test_pickles_are_not_loaded(published):
    (published / "encoder.safetensors").unlink()
    (published / "decoder.safetensors").rename(published / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Pickles .* are never loaded.*save_file"):
        load_checkpoint(published)


def test_parts_that_do_not_fit_raise(native, published, byte_tokenizer):
    byte_tokenizer.add_tokens(["dog"])
    for folder in (native, published):
        byte_tokenizer.save_pretrained(folder)
        with pytest.raises(CheckpointError, match="vocab_size=260, but the model 259"):
            load_checkpoint(folder)
    edit(native / "config.json", text_config=None)
    with pytest.raises(CheckpointError, match=r"config.json has no field 'text_config'"):
        load_checkpoint(native)
    (native / "preprocessor_config.json").unlink()
    edit(native / "config.json", text_config={}, model_type="bert")
    with pytest.raises(CheckpointError, match="model_type='bert' is not a QVision model"):
        load_checkpoint(native)


def test_wrong_arguments_raise(native):
    wrong = {
        r"there is no folder no/such/folder": ["no/such/folder"],
        r"is a file; give the folder": [native / "config.json"],
        r"revision='main' needs a Hub id": [native, "main"],
        r"dtype='float33' is unknown; use float32": [native, None, "float33"],
        r"dtype='int8' is unknown": [native, None, "int8"],
        r"dtype=torch.int8 is unknown": [native, None, torch.int8],
        r"device='gpu' is not available .*; use cpu": [native, None, None, "gpu"],
        r"device='cuda:64' is not available .*; use cpu": [native, None, None, "cuda:64"],
    }
    for message, arguments in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(*arguments)


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A Hub on this machine that holds `someone/tiny`, and an empty cache.

    It has the part of the HTTP interface that downloads need, and records the requested files.
    """
    (published / "qformer.py").write_text("raise SystemExit('never import this')")
    (published / "pytorch_model.bin").touch()
    state = SimpleNamespace(folders={"someone/tiny": published}, requested=[])

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0].removeprefix("/api/models")
        owner, name, *rest = path.strip("/").split("/")
        kind, revision, *file = rest or ["revision", "main"]
        if (folder := state.folders.get(f"{owner}/{name}")) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if kind == "revision":
            return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()
        if kind == "tree":
            about = {"type": "file", "oid": "0" * 40}
            files = [{"path": p.name, "size": p.stat().st_size, **about} for p in folder.iterdir()]
            return 200, {}, json.dumps(files).encode()
        state.requested += file
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file[0]}"'}
        return 200, headers, (folder / file[0]).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        log_message = Mock()

        def do_GET(self):
            status, headers, body = answer(self.path)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield state
        server.shutdown()


def test_only_needed_files_are_downloaded_and_the_commit_is_recorded(hub, logits, tmp_path):
    with pytest.raises(CheckpointError, match="someone/tiny has no revision 'v2'; give one of"):
        load_checkpoint("someone/tiny", revision="v2")
    with pytest.raises(CheckpointError, match="someone/typo is neither a folder here nor"):
        load_checkpoint("someone/typo")
    checkpoint = load_checkpoint("someone/tiny", revision="v1")
    assert checkpoint.provenance.revision == COMMIT
    assert checkpoint.provenance.source == "someone/tiny"
    needed = {"config.json", "architecture.json", "encoder.safetensors", "decoder.safetensors"}
    assert set(hub.requested) == needed
    assert logits(checkpoint.model)
    native = ql.convert("someone/tiny", tmp_path / "native")
    assert "gpt_decoder.safetensors" in hub.requested  # its copies are compared
    assert f"from `someone/tiny` at commit `{COMMIT}`" in (native / "README.md").read_text()


def test_converting_may_upload_the_result(published, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **settings: calls.append(name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **settings: calls.append(settings))
    native = ql.convert(published, tmp_path / "native", push_to="me/tiny")
    assert calls == ["me/tiny", {"repo_id": "me/tiny", "folder_path": native}]


@pytest.mark.parametrize("offline", ["switched off", "unreachable"])
def test_the_cache_works_without_network(hub, monkeypatch, offline):
    load_checkpoint("someone/tiny")
    requested = len(hub.requested)
    if offline == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_checkpoint("someone/tiny").provenance.revision == COMMIT
    assert len(hub.requested) == requested
    with pytest.raises(CheckpointError, match=r"someone/typo is not complete .*hf download"):
        load_checkpoint("someone/typo")
    with pytest.raises(CheckpointError, match="someone/tiny at revision 'v2' is not complete"):
        load_checkpoint("someone/tiny", revision="v2")


def test_gpt2_tokenizer_comes_from_the_hub_or_a_warning_does(hub, byte_tokenizer, tmp_path):
    config = ql.QVisionConfig()
    with pytest.warns(UserWarning, match=r"without a tokenizer.*openai-community/gpt2"):
        assert read_tokenizer(tmp_path, config) is None
    gpt2 = tmp_path / "gpt2"
    entries = [*(f"entry {i}" for i in range(50256)), "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    type(byte_tokenizer)(vocab=vocabulary, merges=[]).save_pretrained(gpt2)
    hub.folders["openai-community/gpt2"] = gpt2
    tokenizer = read_tokenizer(tmp_path, config)
    assert len(tokenizer) == 50259
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (50257, 50258, 50256)


@pytest.mark.slow
def test_memory_of_a_full_size_load(published, tmp_path, monkeypatch):
    """A random checkpoint of the published sizes with all copies: 4.5 GB on disk."""
    (tmp_path / "full").mkdir()
    write_published(tmp_path / "full", ql.QVisionForConditionalGeneration(ql.QVisionConfig()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for dtype, limit in (("float32", 1.1), ("bfloat16", 0.75)):  # times the weights in float32
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            folders = published, tmp_path / "full"  # the first load does all imports
            _, load = (pool.submit(load_once, f, OURS, dtype, cold=False).result() for f in folders)
        resident, peak = load["resident_gigabytes"], load["peak_gigabytes"]
        assert resident <= peak <= limit * 4 * 509_190_401 / 1e9, load
    shutil.rmtree(tmp_path / "full")  # pytest would keep it for days
