"""Peers have their published sizes, and no row shows a number that was not measured."""

import copy
import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as hf
from PIL import Image
from transformers import PreTrainedConfig

from qvision_lab.benchmark import peers
from qvision_lab.benchmark.harness import Table
from qvision_lab.benchmark.peers import PEERS, Peer, caption_by_gpt4, gpt4_row, run_peers
from qvision_lab.benchmark.tables import read_table

SIZES = {
    "GIT base": (176_619_066, 176_619_066),
    "BLIP base": (223_971_644, 223_971_644),
    "ViT-GPT2": (239_195_904, 239_195_904),
    "BLIP-2 OPT-2.7B": (3_744_679_936, 107_130_880),
    "BLIP-2 OPT-6.7B": (7_752_738_304, 108_312_064),
    "LLaVA-1.5 7B": (7_063_427_072, 7_063_427_072 - 303_507_456),
    "LLaVA-1.5 13B": (13_351_494_656, 13_351_494_656 - 303_507_456),
}
WIDTHS = ["hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "projection_dim"]
WIDTHS += ["encoder_hidden_size", "image_text_hidden_size"]
SMALL = {**dict.fromkeys(WIDTHS, 32), "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def small(peer: Peer) -> Peer:
    """A copy with a small configuration, except for image size and vocabulary."""
    config = copy.deepcopy(peer.config)
    shrink(config)
    return replace(peer, config=config)


def shrink(config: PreTrainedConfig) -> None:
    for name, value in SMALL.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            shrink(part)


def test_sizes_are_those_of_the_public_configurations():
    assert {peer.name: peer.sizes() for peer in PEERS} == SIZES


@pytest.mark.parametrize("peer", PEERS[:4] + PEERS[5:6], ids=lambda peer: peer.name)
def test_every_peer_generates_exactly_so_many_tokens(peer):
    model = small(peer).build(torch.float32, "cpu")
    steps = Counter()
    head = next(m for n, m in model.named_modules() if getattr(m, "out_features", 0) > 30000)
    head.register_forward_hook(lambda *_: steps.update(n=1))
    side = (getattr(peer.config, "vision_config", None) or peer.config.encoder).image_size
    pixels = torch.randn(1, 3, side, side)
    ids = peer.caption(model, pixels, tokens=5)
    assert steps["n"] == 5
    assert len(ids) == 1


def test_a_peer_too_large_for_the_memory_has_its_need(tiny, monkeypatch):
    monkeypatch.setattr(peers, "free_memory", lambda device: 4e9)
    (row,) = run_peers(tiny, PEERS[3:4], quick=True)
    assert "seconds" not in row
    assert row["not_measured"] == "needs 8.2 GB of memory, 4.0 are free"
    assert "8.2 GB" in str(Table(name="peers", rows=(row,)))


@pytest.fixture
def large(monkeypatch):
    """BLIP-2 and LLaVA, small but taken for large on a device where transformers compiles."""
    monkeypatch.setattr(peers, "LARGE", 0)
    monkeypatch.setattr(peers, "COMPILED_ON", ("cpu",))
    return [small(PEERS[3]), small(PEERS[5])]


def test_the_fastest_method_is_timed_in_the_same_rounds(tiny, large, monkeypatch, tmp_path):
    compile_none = hf.GenerationMixin._valid_auto_compile_criteria

    def compile_all(self, *arguments):
        self._compiled_call = self.__call__  # what it would be, were it compiled
        return compile_none(self, *arguments)

    monkeypatch.setattr(hf.GenerationMixin, "_valid_auto_compile_criteria", compile_all)
    table = Table(name="peers", quick=True, rows=(*run_peers(tiny, large, quick=True),))
    table.save(tmp_path)
    compiled = read_table("peers", tmp_path).query("method == 'compiled'")
    titles = {"": "times QVision's", "_compiled": "times QVision's, compiled"}
    for row, (_, drawn) in zip(table.rows, compiled.iterrows(), strict=True):
        for name, title in titles.items():
            pairs = zip(row["fastest_seconds"], row[f"qvision{name}_seconds"], strict=True)
            assert drawn[title] == f"{sum(theirs / ours for theirs, ours in pairs) / 2:.2f}"


def test_what_fails_is_recorded_and_the_others_are_measured(tiny, large, monkeypatch):
    caption = Peer.caption

    def fail(self, *arguments, **settings):
        if self.name == large[0].name:
            raise RuntimeError("out of\nmemory")
        return caption(self, *arguments, **settings)

    monkeypatch.setattr(Peer, "caption", fail)
    broken, measured = run_peers(tiny, large, quick=True)
    assert "seconds" not in broken
    assert broken["not_measured"] == "RuntimeError: out of memory"
    assert len(measured["seconds"]) == len(measured["qvision_seconds"]) == 2
    assert "fastest_seconds" not in measured  # transformers compiles on no CPU
    assert measured["fastest_not_measured"].endswith("transformers compiled no step of it")


@pytest.fixture
def endpoint(monkeypatch):
    """Make OpenAI's client receive an answer: a JSON body, a status, or None, a time-out."""
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
    requests = []

    def answer_with(answer: dict | int | None) -> list[dict]:
        def handle(request):
            requests.append(json.loads(request.content))
            if answer is None:
                assert request.extensions["timeout"]["read"] == 0.2
                raise httpx.ReadTimeout("no answer", request=request)
            if isinstance(answer, int):
                return httpx.Response(answer, json={})
            return httpx.Response(200, json=answer)

        client = httpx.Client(transport=httpx.MockTransport(handle))
        monkeypatch.setattr(openai, "OpenAI", partial(openai.OpenAI, http_client=client))
        monkeypatch.setenv("OPENAI_API_KEY", "a key")
        return requests

    return answer_with


def chat(text: str | None) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def test_gpt4_captions(endpoint):
    requests = endpoint(chat(" a red square "))
    picture = Image.new("RGB", (8, 8), "red")
    assert caption_by_gpt4(picture, 7) == "a red square"
    (request,) = requests
    assert request["max_tokens"] == 7
    _, image = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    row = gpt4_row(picture, quick=True)
    assert min(row["seconds"]) > 0
    assert row["parameters"] is None


BAD = [(None, "could not be asked: Request timed out"), (500, "could not be asked")]
BAD += [(answer, "without text") for answer in (chat(None), {"choices": []})]


@pytest.mark.parametrize(("answer", "message"), BAD)
def test_a_bad_endpoint_gives_no_number(endpoint, answer, message):
    requests = endpoint(answer)
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ConnectionError, match=message):
        caption_by_gpt4(picture, timeout=0.2 if answer is None else 60)
    assert len(requests) == 1  # no request is repeated
    if answer is not None:
        row = gpt4_row(picture, quick=True)
        assert "seconds" not in row
        assert message in row["not_measured"]
