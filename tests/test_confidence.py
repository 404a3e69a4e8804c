"""Confidence in claims: exact on made-up logits, calibrated, and kept with a checkpoint."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import save_captioner, tiny_captioner

import qvision_lab as ql
from qvision_lab.benchmark.confidence import auroc, calibration_error, risk_curve
from qvision_lab.captioning.records import make_record
from qvision_lab.model.confidence import LIMIT, Calibration, Confidence, all_right
from qvision_lab.model.loading.checkpoint import CheckpointError
from qvision_lab.training.confidence import calibrate, fit_logistic

PLAIN = [0.0, 1.0, 0.0, 0.0]
KINDS = {
    "object": {"words": {"cat": ["cat", "cats"], "dog": ["dog"]}, "before": [], "weights": PLAIN},
    "color": {"words": {"red": ["red"], "blue": ["blue"]}, "before": ["object"]},
    "place": {"words": {"left": ["to the left of"], "right": ["to the right of"]}},
}
KINDS["color"]["weights"] = [0.5, 0.25, 2.0, -1.0]
KINDS["place"] |= {"before": ["color", "object"], "weights": PLAIN}
SETTINGS = {"kinds": KINDS, "caption": [0.0, 1.0]}


class Words:
    """A tokenizer of whole words."""

    known = ("a", "and", "red", "blue", "cat", "cats", "dog", "to", "the", "left", "right")
    known += ("of", "on")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.known.index(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.known[i] for i in ids)


def judge(text: str, chances: dict[int, dict[str, float]], settings: dict = SETTINGS):
    """Claims of a text, where tokens at some places have given weights, all others 1e-3."""
    confidence = Confidence(Calibration.model_validate(settings), Words())
    ids = Words()(text, False)["input_ids"]
    weights = torch.full((len(ids), len(Words.known)), 1e-3)
    for place, chance in chances.items():
        for word, weight in chance.items():
            weights[place, Words.known.index(word)] = weight
    return confidence.judge(ids, weights.log()[:, confidence.tokens])


def test_a_word_competes_with_the_others_of_its_kind_and_spellings_count_together():
    (claim,), whole = judge("a cat", {1: {"cat": 3.0, "cats": 1.0, "dog": 1.0, "and": 9.0}})
    assert (claim.kind, claim.text, claim.tokens) == ("object", "cat", (1, 2))
    assert claim.own == claim.noun == claim.least == pytest.approx(math.log(4))
    assert claim.confidence == whole == pytest.approx(0.8)


def test_weights_apply_to_a_claim_its_noun_and_the_least_of_the_caption():
    chances = {0: {"red": 9.0, "blue": 1.0}, 1: {"cat": 2.0, "dog": 1.0}}
    chances[3] = {"dog": 1.0, "cat": 2.0}
    claims, whole = judge("red cat and dog", chances)
    color, cat, dog = claims
    assert [claim.text for claim in claims] == ["red", "cat", "dog"]
    assert (color.own, color.noun) == pytest.approx((math.log(9), math.log(2.001)), abs=1e-6)
    least = math.log(1 / 2.001)  # the dog, to which the model prefers a cat
    assert [claim.least for claim in claims] == pytest.approx([least] * 3)
    odds = 0.5 + 0.25 * color.own + 2 * color.noun - least
    assert color.confidence == pytest.approx(1 / (1 + math.exp(-odds)))
    (color, _), _ = judge("red cat", {0: {"red": 1.0, "blue": 9.0}, 1: {"cat": 9.0}})
    assert color.confidence == pytest.approx(0.1)  # not what the weights make of it, nearly 1
    color = claims[0]
    product = color.confidence * cat.confidence * dog.confidence
    assert whole == pytest.approx(product)
    assert all_right(claims) == pytest.approx(math.log(product / (1 - product)))


def test_words_of_several_tokens_compete_where_they_part():
    text = "cat to the left of red dog"
    relation = judge(text, {1: {"to": 0.1}, 3: {"left": 3.0, "right": 1.0}})[0][1]
    assert (relation.kind, relation.text, relation.tokens) == ("place", "to the left of", (1, 5))
    assert relation.own == pytest.approx(math.log(3))
    assert relation.noun == pytest.approx(math.log(1 / 2))  # the dog, against cat and cats


def test_words_claim_something_only_before_their_kinds():
    found = [claim.text for claim in judge("red and blue red cat on the left of a dog", {})[0]]
    assert found == ["red", "cat", "dog"]  # of "blue red cat", the red alone precedes a noun
    assert judge("a and the", {}) == ((), None)


def test_log_odds_are_cut():
    (claim,), _ = judge("cat", {0: {"cat": 1.0, "cats": 0.0, "dog": 0.0}})
    assert claim.own == LIMIT
    (claim,), _ = judge("cat", {0: {"cat": 0.0, "cats": 0.0, "dog": 1.0}})
    assert claim.own == -LIMIT


DAMAGES = [
    lambda s: s.pop("caption"),
    lambda s: s.update(more=1),
    lambda s: s.update(caption=[0.0]),
    lambda s: s.update(kinds=[1]),
    lambda s: s["kinds"]["object"].update(weights=[1e9, 1.0, 0.0, 0.0]),
    lambda s: s["kinds"]["object"].update(weights=["1", 1.0, 0.0, 0.0]),
    lambda s: s["kinds"]["object"]["words"].update(cat="cat"),
    lambda s: s["kinds"]["object"]["words"].update(cat=["cat"] * 501),
    lambda s: s["kinds"]["object"]["words"].update(cat=["cat" * 100]),
]


def test_a_checkpoint_keeps_it_and_a_damaged_file_is_refused(tmp_path):
    folder = save_captioner(tiny_captioner(), tmp_path / "a")
    assert ql.load(folder).confidence is None
    (folder / "confidence.json").write_text(json.dumps(SETTINGS))
    again = ql.load(ql.convert(folder, tmp_path / "b")).confidence
    assert again.calibration.model_dump() == SETTINGS
    message = r"confidence.json does not fit.*delete or download"
    for damage in DAMAGES:
        damage(settings := json.loads(json.dumps(SETTINGS)))
        (folder / "confidence.json").write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=message):
            ql.load(folder)


def test_captions_carry_it_in_any_batch_and_search(embedded):
    scenes = [ql.scenes.scene("compose", 0, i).image for i in range(5)]
    batched = embedded.caption(scenes, batch_size=5)
    single = embedded.caption(scenes, batch_size=2)
    whole = [c.confidence for c in batched]
    assert whole == pytest.approx([c.confidence for c in single], abs=1e-4)
    assert len({round(x, 3) for x in whole}) > 1
    for caption in batched:
        assert {"count", "color", "object"} <= {claim.kind for claim in caption.claims}
        for claim in caption.claims:
            spelled = "".join(caption.tokens[slice(*claim.tokens)]).strip()
            assert claim.text == spelled
            assert 0 < claim.confidence < 1
    slow = embedded.caption(scenes, logits_processor=[lambda ids, scores: scores])  # `generate`
    assert [c.confidence for c in slow] == pytest.approx(whole, abs=1e-4)
    best = embedded.caption(scenes, num_beams=3, num_return_sequences=2)
    again = {c.text: c.confidence for c in batched}
    same = [c for beams in best for c in beams if c.text in again]
    assert same
    assert [c.confidence for c in same] == pytest.approx([again[c.text] for c in same], abs=1e-4)
    record = make_record(best[0])
    assert record["confidence"] == round(best[0][0].confidence, 4)
    assert "confidence" not in make_record(ql.load("photos", device="cpu").caption(scenes[:1]))


def test_calibration_is_fitted_to_scenes_of_known_truth(embedded):
    scenes = ql.coco.open_dataset("scenes:compose", n=12)
    confidence = calibrate(embedded, scenes)
    captions = ql.Captioner(embedded.model, embedded.processor, confidence=confidence).caption(
        [image.picture for image in scenes], preset="greedy"
    )
    true = [ql.scenes.check(c.text, scenes.judge.truths[i]).true for i, c in enumerate(captions)]
    assert 0 < sum(true) < 12
    assert auroc(np.array(true, float), np.array([c.confidence for c in captions])) > 0.5
    assert np.mean([c.confidence for c in captions]) == pytest.approx(np.mean(true), abs=0.1)
    other = ql.coco.open_dataset("scenes:val", n=2)
    with pytest.raises(ValueError, match="only of scenes"):
        calibrate(embedded, type(other)("photographs", other.images))


def test_a_logistic_regression_finds_its_weights():
    draws = np.random.default_rng(0)
    x = draws.normal(size=(20_000, 2))
    right = draws.random(20_000) < 1 / (1 + np.exp(-(1 + 2 * x[:, 0] - x[:, 1])))
    assert fit_logistic(np.c_[x, right]) == pytest.approx([1, 2, -1], abs=0.08)
    bias, _ = fit_logistic(np.c_[np.zeros(8), np.ones(8)])  # Platt's target: 9 of 10
    assert bias == pytest.approx(math.log(9), abs=1e-3)


def test_scores_of_confidence_are_those_by_hand():
    right, values = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.5, 0.5, 0.1])
    assert auroc(right, values) == pytest.approx(3.5 / 4)
    assert auroc(right, np.full(4, 0.3)) == 0.5
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 0, 1]])
    assert auroc(right, values, weights) == pytest.approx([3.5 / 4, 1])
    assert np.isnan(auroc(np.ones(4), values))
    assert calibration_error(right, values) == pytest.approx((0.1 + 0 + 0.1) / 4)
    risks = risk_curve(right, values)
    assert len(risks) == 20
    assert [risks[4], risks[9], risks[14], risks[19]] == [0, 0.25, 1 / 3, 0.5]
