"""The original's way gives the original's ids, and every faster way gives the same ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qvision_lab.benchmark.latency import race
from qvision_lab.benchmark.original import generate_the_original_way
from qvision_lab.compiled import CompiledQVision, StreamedLinear
from qvision_lab.model.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["published_a", "published_b"])
def test_the_original_way_gives_the_reference_ids(shared, name):
    folder = shared / "reference" / name
    model = load_checkpoint(folder).model
    pixel_values = load_file(folder / "expected.safetensors")["pixel_values"]
    cases = json.loads((folder / "expected.json").read_text())["generate"]
    greedy = [case for case in cases if case["name"] == "greedy"]
    assert len(greedy) == 6
    for case in greedy:
        ids = generate_the_original_way(model, pixel_values[[case["image"]]])
        assert ids[0].tolist() == case["ids"]


def test_faster_ways_give_the_same_ids(tiny, pixels):
    length = {"min_length": 5, "max_new_tokens": 20}
    slow = [generate_the_original_way(tiny, image[None], **length)[0].tolist() for image in pixels]
    compiled = CompiledQVision(tiny, length=32)
    assert compiled.compile_seconds > 0
    greedy = {**length, "do_sample": False, "repetition_penalty": 1.0}
    one = compiled.generate(pixel_values=pixels[:1], **greedy)  # the one that really compiles
    assert one[0].tolist() == slow[0]
    rounded = CompiledQVision(tiny, length=32, int8=True)  # a second one, and not the first's code
    said = rounded.generate(pixel_values=pixels[:1], **greedy)
    assert compiled.generate(pixel_values=pixels[:1], **greedy).equal(one)
    with torch.compiler.set_stance("force_eager"):
        assert rounded.generate(pixel_values=pixels[:1], **greedy).equal(said)
    assert not rounded.decoder.lm_head.weight.is_floating_point()
    with torch.compiler.set_stance("force_eager"):
        compiled_for_three = CompiledQVision(tiny, rows=3, length=32)
        for way in (tiny, compiled, compiled_for_three):  # the second goes the eager way
            rows = way.generate(pixel_values=pixels, **greedy)
            for ids, expected in zip(rows, slow, strict=True):
                assert ids[: len(expected)].tolist() == expected
                assert (ids[len(expected) :] == tiny.config.pad_token_id).all()
        beams = {**greedy, "num_beams": 3, "num_return_sequences": 3, "pixel_values": pixels[:1]}
        assert compiled_for_three.generate(**beams).equal(tiny.generate(**beams))
        prompt = {**greedy, "pixel_values": pixels[:1], "input_ids": torch.tensor([[257, 3, 4, 5]])}
        assert compiled.generate(**prompt).equal(tiny.generate(**prompt))
        with pytest.raises(ValueError, match="outgrew its cache of 32 positions"):
            compiled.generate(pixel_values=pixels[:1], max_new_tokens=40, min_length=41)


def test_compiled_shares_weights_and_scores_alike(tiny, pixels):
    with torch.compiler.set_stance("force_eager"):
        compiled = CompiledQVision(tiny)
    names = dict(tiny.named_parameters())
    assert all(names[name] is weight for name, weight in compiled.named_parameters())
    ids = torch.tensor([[257, 1, 2]])
    scores = [model(ids, pixel_values=pixels[:1]).logits for model in (tiny, compiled)]
    assert scores[0].equal(scores[1])


def test_int8_weights_are_within_half_a_step():
    linear = torch.nn.Linear(24, 16)
    rounded = StreamedLinear(linear, int8=True)
    x = torch.randn(5, 24)
    step = linear.weight.abs().amax(dim=1) / 127
    assert (rounded(x) - linear(x)).abs().le(x.abs().sum(1, keepdim=True) * step / 2 + 1e-5).all()
    assert rounded.weight.dtype == torch.int8


def test_race_reports_every_way(tiny):
    with torch.compiler.set_stance("force_eager"):
        rows = list(race(tiny, bandwidth=1e9, quick=True))
    assert [(row.mode, row.dtype, row.batch) for row in rows] == [
        ("original", "fp32", 1),
        ("eager", "fp32", 1),
        ("eager", "fp32", 16),
        ("compiled", "fp32", 1),
    ]
    assert all(row.same_tokens == 1.0 for row in rows)
    original, eager, sixteen, compiled = rows
    assert original.ratio_to_original == 1
    ratios = [16 * a / b for a, b in zip(original.seconds, sixteen.seconds, strict=True)]
    assert sixteen.ratio_to_original == pytest.approx(sum(ratios) / 2)
    assert compiled.compile_seconds > 0
    weights = sum(p.numel() for p in tiny.decoder.parameters()) - 64 * 32  # without positions
    limit = 20 * 4 * weights / 1e9
    assert eager.times_the_limit == pytest.approx(eager.seconds_per_image.median / limit)
