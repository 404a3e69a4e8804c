"""Hostile checkpoints: no code of theirs runs, nothing outside is read, errors name the remedy.

Every sixth case (--slow: all) runs in a process with limits, which answers all questions with "y".
"""

import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from qvision_lab.benchmark.loading import write_published
from qvision_lab.model.loading.checkpoint import CheckpointError, convert, load_checkpoint
from qvision_lab.model.parameters import fingerprint_weights

SECONDS, BYTES = 10, 2**31  # that a case may take
LOADS = "loads like the intact one"
REMEDY = r"copy|download|choose|set |take|give|delete|add |write|correct|load "
SECRET = "nobody may read this"
EVIL = "from pathlib import Path\nPath({!r}).touch()\nraise SystemExit('code was run')\n"
NODES = {"FIFO": stat.S_IFIFO, "socket": stat.S_IFSOCK}
PLACES = (*NODES, "directory", "/dev/zero", "circle", "dangling", "..", "outside")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
TOKENS, PIXELS, SETTINGS = (f"{x}_config.json" for x in ("tokenizer", "preprocessor", "generation"))
LAYOUTS = {  # file of the architecture, weights, the queries there, fields of sizes, text files
    "native": (
        *("config.json", WEIGHTS, "qformer.query_tokens"),
        ("text_config.hidden_size", "text_config.vocab_size", "num_query_tokens"),
        ("config.json", PIXELS, "tokenizer.json", TOKENS, SETTINGS),
    ),
    "published": (
        *("architecture.json", "decoder.safetensors", "query_tokens"),
        ("embed_size", "vocab_size", "num_img_tokens"),
        ("config.json", "architecture.json", "tokenizer.json", TOKENS),
    ),
}
CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {}  # layout, damage, expected


def case(layout: str, expected: str, damage: Callable, file: str, *how: object) -> None:
    """A case: a function of a file and `how`, and the pattern of the error."""
    name = f"{len(CASES)} {layout}: {damage.__name__} {file} {how}"
    CASES[name[:300]] = layout, lambda folder: damage(folder / file, *how), expected


def edit(path: Path, changes: dict) -> None:
    """Change tensors (None deletes one), or fields of a JSON file; a dot leads into a part."""
    if path.suffix == ".safetensors":
        tensors = load_file(path) | changes
        return save_file({name: x for name, x in tensors.items() if x is not None}, path)
    content = json.loads(path.read_text()) if path.exists() else {}
    for name, value in changes.items():
        *parts, last = name.split(".")
        reduce(dict.__getitem__, parts, content)[last] = value
    path.write_text(json.dumps(content))


def instead(path: Path, what: str) -> None:
    """Put something else in place of a file: no regular file, or a link."""
    outside = path.parents[1] / f"outside_{path.name}"
    outside.write_text(SECRET)
    if path.exists():
        path.replace(outside)
    if what in NODES:
        os.mknod(path, NODES[what] | 0o755)
    elif what == "directory":
        path.mkdir()
    elif what == "pickle":
        shutil.move(outside, path.with_name("pytorch_model.bin"))
    else:
        path.symlink_to({"outside": outside, "circle": path.name}.get(what, what))


def header(path: Path, change: dict | bytes) -> None:
    """Change an entry in the header of a safetensors file, or replace it."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if isinstance(change, dict):
        entries = json.loads(content[8 : 8 + size])
        change = {name: x and entries[name] | x for name, x in change.items()}
        change = json.dumps(entries | change).encode()
    path.write_bytes(struct.pack("<Q", len(change)) + change + content[8 + size :])


def shard(path: Path, what: str, changes: dict) -> None:
    """Split native weights into two shards and their index, in which fields are changed."""
    tensors, names = load_file(path), sorted(load_file(path))
    path.unlink()
    for file, part in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        part = [*part, names[0]] if what == "twice" else part
        save_file({name: tensors[name] for name in part}, path.with_name(file))
    index = {"weight_map": {name: SHARDS[i % 2] for i, name in enumerate(names)}} | changes
    path.with_name(INDEX).write_text(json.dumps(index))
    if what == "outside":
        instead(path.with_name(SHARDS[0]), what)


PARTS = {"t": "text_config.", "v": "vision_config."}
SIZES = (10**9, 10**30, 0, -1, 4.0, True, "4", [4])
WRONG = {  # values of fields; "t." is text_config, "v." vision_config
    **{"t.num_layers": (10**6, 0, -1, "2", True, 2.0, None, [2]), "t.num_heads": (0, 3, -4, None)},
    **{"t.max_position_embeddings": (400_000, 0, 10**30), "t.window_size": (-5, 10**30)},
    "t.attention_types": ([[["global"], 10**9]], "abc", [[["weird"], 2]], {"a": 1}, 7),
    **{"t.activation_function": ("evil", 5), "t.intermediate_size": (10**9, [32], -1)},
    **{"t.layer_norm_epsilon": (-1.0, "1e-5"), "t.embed_dropout": (2.0, "0")},
    **{"v.num_hidden_layers": (10**6, 0, 2.5), "v.image_size": (10**9, [32, 32], 0, 2**63)},
    **{"v.patch_size": (0, 64, 2**31), "v.num_channels": (4, 0), "v.layer_norm_eps": (-1.0,)},
    **{"v.num_attention_heads": (0, 3), "v.hidden_act": ("evil", None)},
    **{"num_qformer_blocks": (10**6, 0, -1, True, "2"), "num_attention_heads": (0, 5, -8)},
    **{"dropout": (-0.5, "0.1"), "global_token": ("evil",), "bridge": (["prefix"],)},
    **{"start_token_id": (-1, 10**6, "257"), "text_config": ([1], 7), "vision_config": ("x", 7)},
}
FOREIGN = {"to_dict": 5, "hidden_size": 7, "dtype": "float8", "custom_generate": "evil.py"}
FOREIGN |= {"auto_map": {"AutoConfig": "evil.C"}, "_attn_implementation": "evil/kernel"}
FOREIGN |= {"quantization_config": {"a": 1}, "tie_word_embeddings": False, "text_config.to_dict": 5}
JSON = (  # what may be in a JSON file
    *(b"{", b"", b"[1]", b'"model_type vision_config"', b'{"a":' * 10**5, b"[" * 10**6),
    *(b'{"a": "\xff\xfe"}', b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"a": NaN}'),
    *(b'{"a": 1e999}', b'{"a": 1, "a": 2}', b'{"a": ' + b"9" * 10_000 + b"}"),
)
for layout, (config, file, tensor, sizes, texts) in LAYOUTS.items():
    for field, value in [(field, value) for field, values in WRONG.items() for value in values]:
        field = re.sub(r"^([tv])\.", lambda m: PARTS[m[1]], field)
        field = re.sub("^num_att.*", "qformer_num_heads" if config[0] == "a" else r"\g<0>", field)
        case(layout, field.split(".")[-1] + "|heads|dropout", edit, config, {field: value})
    for field, value in product(sizes, SIZES):
        case(layout, "hidden_size|vocab_size|num_query", edit, "config.json", {field: value})
    for field, value in FOREIGN.items():
        case(layout, LOADS, edit, config, {field: value})
    for name, what in product([*texts, file], PLACES):
        case(layout, name, instead, name, what)
    for name, content in product(texts, (*JSON, 6 * 2**30)):  # the last one is a size
        damage = os.truncate if isinstance(content, int) else Path.write_bytes
        case(layout, name, damage, name, content)
    changes = [{"data_offsets": [0, 512]}, {"data_offsets": [2**40, 2**40 + 512]}, {"dtype": "F9"}]
    changes += [{"data_offsets": [-512, 0]}, {"shape": [2**62, 2**62]}, {"shape": [1, 5, 32]}, []]
    for change in [{tensor: fields} for fields in changes] + [b'{"a":' * 10**5, b"{\xff}", b"[]"]:
        case(layout, file, header, file, change)
    for size in (0, 5, 8, 100, 10_000):
        case(layout, file, os.truncate, file, size)
    case(layout, file, Path.write_bytes, file, struct.pack("<Q", 2**62) + b"{}")
    ones, mixed = torch.ones(1, 4, 32), torch.tensor([torch.inf, -torch.inf]).repeat(1, 4, 16)
    wrong = [ones[0], ones[:, :0], ones.long(), ones.double(), mixed, mixed.half(), mixed - mixed]
    for value in (None, *wrong):
        case(layout, tensor, edit, file, {tensor: value})
    case(layout, "surprise", edit, file, {"surprise": ones})
    case(layout, "safetensors", instead, file, "pickle")
names = ("../x.safetensors", "/etc/passwd", "config.json", "model-x/../../x", "model-7.safetensors")
for weight_map in (*({"a": name} for name in (*names, "model-\0", 7)), SHARDS, {}, "model", None):
    case("native", "weight_map|model-7", shard, WEIGHTS, "", {"weight_map": weight_map})
for what, pattern in {"": LOADS, "twice": SHARDS[1], "outside": SHARDS[0]}.items():
    case("native", pattern, shard, WEIGHTS, what, {})
for file, changes in (
    (TOKENS, {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}),
    (TOKENS, {"tokenizer_class": "BertTokenizer", "vocab": "/etc/passwd", "gguf_file": "../x"}),
    (TOKENS, {"fast_tokenizer_files": ["../x"], "added_tokens_decoder": 5, "chat_template": "{{"}),
    (PIXELS, {"auto_map": {"AutoProcessor": "evil.P"}, "image_processor_type": "Evil"}),
    (SETTINGS, {"auto_map": {"AutoModel": "evil.M"}, "validate": 5, "custom_generate": "evil"}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}, "size": 9}),
    ("special_tokens_map.json", {"bos_token": "<END>"}),
):
    case("native", LOADS, edit, file, changes)
for file, field, *values in (
    (TOKENS, "bos_token", "<MISSING>", "<END>", 5, [], {"content": []}),
    (TOKENS, "pad_token", None, ["x"]),
    ("tokenizer.json", "model.vocab.a", 10**9, -1, "a"),
    ("tokenizer.json", "model", 7, {"vocab": {}}, {"type": "Evil"}),
    *(("tokenizer.json", field, [["a", "evil"]]) for field in ("padding", "model.merges")),
    (PIXELS, "size", "large", {"height": 10**9}, {"shortest_edge": 32}, {"height": 9, "width": 9}),
    (PIXELS, "image_std", [0.0, 0.2, 0.2], [0.2], ["a"] * 3, "abc"),
    *((PIXELS, field, 10**9, [0.5, 0.5]) for field in ("image_mean", "patch_size")),
    (SETTINGS, "max_new_tokens", "x", 10**9, -1, 1.5),
    *((SETTINGS, field, 10**9, [1]) for field in ("num_beams", "pad_token_id")),
    (SETTINGS, "temperature", "hot", [1], -1),
    ("config.json", "model_type", "bert", ["qvision"], None),
):
    for value in values:
        case("native", f"{field}|tokenizer.json|_token_id|vocab_size", edit, file, {field: value})
for file in ("added_tokens.json", "chat_template.jinja", "special_tokens_map.json"):
    case("native", LOADS, instead, file, "FIFO")
for file, what in product(("README.md", "scores.json", "run.yaml"), PLACES):
    case("native converted", file, instead, file, what)
case("native converted", "run.yaml", Path.write_bytes, "run.yaml", b"\xff")
for damage, values in {instead: PLACES, Path.write_bytes: (*JSON, b"{}")}.items():
    for value in values:
        case("native", "confidence.json", damage, "confidence.json", value)
case("published converted", "gpt_decoder", instead, "gpt_decoder.safetensors", "outside")


def limit() -> None:
    sys.stdin = io.StringIO("y\n" * 10**5)
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))


def describe(folder: Path, converts: bool) -> tuple[str, str]:
    """What became of a load, and the error or all that captions depend on."""
    try:
        if converts:
            convert(folder, folder.parent / "converted")
        loaded = load_checkpoint(folder, device="cpu")
        parts = loaded.processor.image_processor, loaded.model.generation_config
        texts = [part.to_json_string() for part in (*parts, loaded.model.config)]
        texts += [fingerprint_weights(loaded.model), loaded.processor.encode("a dog").tolist()]
        return "loaded", str(texts)
    except BaseException as error:
        kind = "refused" if type(error) is CheckpointError else "raised"
        return kind, f"{type(error).__name__}: {error}"


@pytest.fixture
def load_apart() -> Iterator[Callable[..., tuple[str, str]]]:
    """Describes a folder in a process with limits, which is replaced only where it hung or died."""
    pools = []

    def load(folder: Path, converts: bool = False) -> tuple[str, str]:
        seconds = SECONDS if pools else 300  # imports take long
        pools[:] = pools or [multiprocessing.get_context("spawn").Pool(1, limit)]
        try:
            return pools[0].apply_async(describe, (folder, converts)).get(seconds)
        except multiprocessing.TimeoutError:
            pools.pop().terminate()
            return "hung or died", ""

    yield load
    for pool in pools:
        pool.terminate()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's memory sizes")
def test_hostile_checkpoints_are_refused(tmp_path, load_apart, monkeypatch, request):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    canary, whole = tmp_path / "canary", {name: tmp_path / f"whole_{name}" for name in LAYOUTS}
    whole["published"].mkdir()
    write_published(whole["published"], tiny_model())
    tiny_tokenizer().save_pretrained(whole["published"])
    convert(whole["published"], whole["native"])
    for folder, file in product(whole.values(), ("evil.py", "custom_generate/generate.py")):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(EVIL.format(str(canary)))
    intact = {layout: load_apart(folder) for layout, folder in whole.items()}
    assert {kind for kind, _ in intact.values()} == {"loaded"}, intact
    wrong, chosen = [], list(CASES)[:: 1 if request.config.getoption("--slow") else 6]
    for name in chosen:
        layout, damage, expected = CASES[name]
        folder = shutil.copytree(whole[layout.split()[0]], tmp_path / "case" / "damaged")
        damage(folder)
        kind, message = load_apart(folder, "converted" in layout)
        named = re.search(expected, message) and re.search(REMEDY, message)
        right = kind == "refused" and named and SECRET not in message
        if expected == LOADS:
            right = (kind, message) == intact[layout]
        if not right or canary.exists():
            wrong.append(f"{name}: {kind} {message:.300}, canary: {canary.exists()}")
        canary.unlink(missing_ok=True)
        shutil.rmtree(folder.parent)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(chosen)} cases:", *wrong])
