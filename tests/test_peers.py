"""Peers are as big as their authors say, and no row shows a number that was not measured."""

import copy
import json
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest
import torch
import transformers as hf
from PIL import Image
from transformers import PreTrainedConfig

from qvision_lab.benchmark import peers
from qvision_lab.benchmark.gpt4 import EndpointError, Gpt4Captioner
from qvision_lab.benchmark.harness import Table
from qvision_lab.benchmark.peers import PEERS, Peer, gpt4_row, run_peers

SIZES = {
    "GIT base": (176_619_066, 176_619_066),
    "BLIP base": (223_971_644, 223_971_644),
    "ViT-GPT2": (239_195_904, 239_195_904),
    "BLIP-2 OPT-2.7B": (3_744_679_936, 107_130_880),
    "BLIP-2 OPT-6.7B": (7_752_738_304, 108_312_064),
    "LLaVA-1.5 7B": (7_063_427_072, 7_063_427_072 - 303_507_456),
    "LLaVA-1.5 13B": (13_351_494_656, 13_351_494_656 - 303_507_456),
}
SMALL = {
    **{"hidden_size": 32, "intermediate_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32},
    **{
        "encoder_hidden_size": 32,
        "projection_dim": 32,
        "vocab_size": 50272,
        "image_text_hidden_size": 32,
    },
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
}


@pytest.fixture(autouse=True)
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def shrink(config: PreTrainedConfig) -> None:
    """Make a configuration and all that it holds small, but for its pictures and tokens."""
    for name, value in SMALL.items():
        if hasattr(config, name) and name != "vocab_size":
            setattr(config, name, value)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            shrink(part)


def test_sizes_are_those_of_the_public_configurations():
    assert {peer.name: peer.sizes() for peer in PEERS} == SIZES


@pytest.mark.parametrize("peer", PEERS[:4] + PEERS[5:6], ids=lambda peer: peer.name)
def test_every_peer_says_exactly_so_many_tokens(peer, monkeypatch):
    config = peer.config.__class__.from_dict(peer.config.to_dict())
    shrink(config)
    model = replace(peer, config=config).build(torch.float32, "cpu")
    steps = Counter()
    head = next(m for n, m in model.named_modules() if getattr(m, "out_features", 0) > 30000)
    head.register_forward_hook(lambda *_: steps.update(n=1))
    pixels = torch.randn(1, 3, peer.image_size, peer.image_size)
    ids = peer.caption(model, pixels, tokens=5)
    assert steps["n"] == 5
    assert len(ids) == 1


def test_what_does_not_fit_says_what_it_needs(tiny, monkeypatch):
    monkeypatch.setattr(peers, "free_memory", lambda device: 4e9)
    (row,) = run_peers(tiny, PEERS[3:4], quick=True)
    assert row.seconds is row.ratio_to_qvision is None
    assert row.not_measured == "needs 8.2 GB of memory, 4.0 are free"
    assert "8.2 GB" in str(Table(name="peers", rows=(row,)))


@pytest.fixture
def large(monkeypatch):
    """BLIP-2 and LLaVA, small but taken for large on a device where transformers compiles."""
    monkeypatch.setattr(peers, "LARGE", 0)
    monkeypatch.setattr(peers, "COMPILED_ON", ("cpu",))
    found = [replace(peer, config=copy.deepcopy(peer.config)) for peer in (PEERS[3], PEERS[5])]
    for peer in found:
        shrink(peer.config)
    return found


def test_a_library_that_does_not_compile_says_so(tiny, large):
    for row in run_peers(tiny, large, quick=True):  # transformers compiles on no CPU
        assert len(row.seconds) == len(row.qvision_seconds) == 2
        assert row.ratio_to_qvision > 0
        assert row.fastest_seconds is row.fastest_ratio_to_qvision is None
        assert row.fastest_not_measured.endswith("transformers compiled no step of it")


def test_the_fastest_way_is_timed_in_the_same_rounds(tiny, large, monkeypatch):
    compile_none = hf.GenerationMixin._valid_auto_compile_criteria

    def compile_all(self, *arguments):
        self._compiled_call = self.__call__  # what it would be, were it compiled
        return compile_none(self, *arguments)

    monkeypatch.setattr(hf.GenerationMixin, "_valid_auto_compile_criteria", compile_all)
    for row in run_peers(tiny, large, quick=True):
        assert row.not_measured is row.fastest_not_measured is None
        ratios = {}
        for name in ("qvision_seconds", "qvision_compiled_seconds"):
            pairs = zip(row.fastest_seconds, getattr(row, name), strict=True)
            ratios[name] = sum(theirs / ours for theirs, ours in pairs) / 2
        assert row.fastest_ratio_to_qvision == pytest.approx(ratios["qvision_seconds"])
        assert row.fastest_ratio_to_compiled == pytest.approx(ratios["qvision_compiled_seconds"])


def test_a_peer_that_fails_leaves_the_others_measured(tiny, large, monkeypatch):
    caption = Peer.caption

    def fail(self, *arguments, **settings):
        if self.name == large[0].name or settings:
            raise RuntimeError("out of\nmemory")
        return caption(self, *arguments)

    monkeypatch.setattr(Peer, "caption", fail)
    broken, static_fails = run_peers(tiny, large, quick=True)
    assert broken.seconds is None
    assert broken.not_measured == "RuntimeError: out of memory"
    assert len(static_fails.seconds) == 2
    assert static_fails.fastest_seconds is None
    assert static_fails.fastest_not_measured == "RuntimeError: out of memory"


@pytest.fixture
def endpoint(monkeypatch):
    """A stub that speaks OpenAI's protocol and answers as the test says; None hangs."""
    asked, hang = [], Event()

    class Stub(BaseHTTPRequestHandler):
        answer: dict | int | None = None

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.answer is None:
                hang.wait(30)
                return
            status = self.answer if isinstance(self.answer, int) else 200
            body = b"{}" if status != 200 else json.dumps(self.answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    Stub.asked = asked
    yield Stub
    hang.set()
    server.shutdown()
    server.server_close()


def says(text: str | None) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def test_gpt4_captions(endpoint):
    pytest.importorskip("openai")
    endpoint.answer = says(" a red square ")
    picture = Image.new("RGB", (8, 8), "red")
    assert Gpt4Captioner().caption(picture, 7) == "a red square"
    (request,) = endpoint.asked
    assert request["max_tokens"] == 7
    _, image = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    row = gpt4_row(picture, quick=True)
    assert row.seconds_per_caption.median > 0
    assert row.parameters is None


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "no answer in 0.2 s"),
        (500, "could not be asked"),
        (says(None), "without text"),
        ({"choices": []}, "without text"),
    ],
    ids=["hangs", "fails", "no text", "no choice"],
)
def test_a_bad_endpoint_gives_no_number(endpoint, answer, told):
    pytest.importorskip("openai")
    endpoint.answer = answer
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(EndpointError, match=told):
        Gpt4Captioner(timeout=0.2 if answer is None else 60).caption(picture)
    assert len(endpoint.asked) == 1  # nothing is asked twice
    if answer is not None:
        row = gpt4_row(picture, quick=True)
        assert row.seconds is None
        assert told in row.not_measured
