"""CHAIR and its vocabularies; statistics of captions."""

import json
from collections import Counter
from importlib.resources import files
from math import isnan
from pathlib import Path

import pytest
import yaml

import qvision_lab as ql
from qvision_lab.evaluation.chair import chair, coco_vocabulary
from qvision_lab.evaluation.statistics import caption_statistics
from qvision_lab.scenes.captions import caption_scene
from qvision_lab.scenes.dataset import SceneJudge

NAMED = yaml.safe_load(Path(__file__).with_name("chair_captions.yaml").read_text())


@pytest.mark.parametrize(("caption", "named"), NAMED.items(), ids=NAMED)
def test_what_a_caption_names(caption, named):
    mentions = coco_vocabulary().mentions(caption)
    assert [mention.category for mention in mentions] == named
    assert all(caption[slice(*mention.span)] == mention.text for mention in mentions)


def test_every_category_names_itself_and_no_phrase_is_listed_twice():
    mentions = coco_vocabulary().mentions("Two Tabby cats eat hot-dogs.")
    assert [mention.text for mention in mentions] == ["Tabby cats", "hot-dogs"]
    categories = coco_vocabulary().categories
    assert len(categories) == 80
    for name in categories:
        assert [m.category for m in coco_vocabulary().mentions(f"There is a {name}.")] == [name]
    words = yaml.safe_load((files("qvision_lab.evaluation") / "coco_words.yaml").read_text())
    for section in (words["objects"], words["qualifiers"]):
        listed = Counter(entry for row in section.values() for entry in row.split(", "))
        assert [entry for entry, times in listed.items() if times > 1] == []


def test_counts_of_captions_without_and_with_references():
    captions = {7: "A dog, a dog and a cat on a bench", 3: "", 5: "Grass"}
    objects = {3: {"car"}, 5: set(), 7: {"dog", "person"}, 9: {"cup"}}
    table = chair(captions, objects, coco_vocabulary())
    counts = ["captions", "mentioned", "hallucinated", "has_hallucination", "objects", "recalled"]
    assert list(table.index) == [7, 3, 5]
    expected = [[1, 4, 2, 1, 2, 1], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert table[counts].to_numpy().tolist() == expected
    assert table["hallucinated_objects"].to_list() == [("cat", "bench"), (), ()]
    captions, objects = {"a": "A kitten on a bench"}, {"a": {"cat"}}
    alone = chair(captions, objects)
    joined = chair(captions, objects, references={"a": ["A pew.", "A red car"]})
    assert alone.loc["a", "hallucinated_objects"] == ("bench",)
    assert joined.loc["a", ["hallucinated", "objects", "recalled"]].to_list() == [0, 3, 2]


def test_scenes_are_read_as_the_checker_reads_them():
    truths = {i: ql.scenes.layout("crowd", 0, i) for i in range(200)}
    captions = {i: caption_scene(truth, 1)[0] for i, truth in truths.items()}
    objects = {i: {thing.category for thing in truth.objects} for i, truth in truths.items()}
    for i, caption in captions.items():
        mentions = SceneJudge.vocabulary.mentions(caption)
        expected = [mention.category for mention in ql.scenes.check(caption, truths[i]).mentions]
        assert [mention.category for mention in mentions] == expected
    table = chair(captions, objects, SceneJudge.vocabulary)
    assert table["hallucinated"].sum() == 0
    assert table["recalled"].equals(table["objects"])
    shifted = chair(captions, {i: objects[(i + 1) % 200] for i in objects}, SceneJudge.vocabulary)
    assert shifted["has_hallucination"].mean() > 0.9


def test_people_rarely_name_what_coco_has_not_labelled(shared):
    dataset = ql.coco.open_dataset(shared / "coco_mini")
    several = [(text, image.objects) for image in dataset for text in image.references]
    captions, objects = (dict(enumerate(column)) for column in zip(*several, strict=True))
    table = chair(captions, objects)
    labelled = shared / "coco_mini" / "annotations" / "instances_train2017.json"
    categories = json.loads(labelled.read_text())["categories"]
    assert {category["name"] for category in categories} == coco_vocabulary().categories
    assert table["hallucinated"].sum() / table["mentioned"].sum() < 0.06


def test_precision_and_recall_on_captions_that_were_read(shared):
    labels = yaml.safe_load(Path(__file__).with_name("coco_mentions.yaml").read_text())
    captions = shared / "coco_mini" / "annotations" / "captions_train2017.json"
    read = {(i, name) for name, ids in labels.items() for i in ids}
    found = {
        (row["id"], mention.category)
        for row in json.loads(captions.read_text())["annotations"]
        for mention in coco_vocabulary().mentions(row["caption"])
    }
    assert len(read & found) / len(found) > 0.985  # before these words: 557 of 565
    assert len(read & found) / len(read) > 0.98  # 557 of 570


def test_bad_truth_is_named():
    captions = dict.fromkeys(range(8), "A dog")
    with pytest.raises(ValueError, match=r"7 predictions \(1, 2, 3, 4, 5, ...\) without objects"):
        chair(captions, {0: {"dog"}})
    with pytest.raises(ValueError, match=r"1 prediction \(0\) without references"):
        chair({0: "A dog"}, {0: {"dog"}}, coco_vocabulary(), references={})
    with pytest.raises(ValueError, match=r"'motorbike' is no category .* nearest is 'motorcycle'"):
        chair({0: "A dog"}, {0: {"motorbike"}})


def test_statistics_by_hand():
    captions = ["A dog, a DOG.", "a cat", "A cat!", "?"]
    assert caption_statistics(captions, training=["a dog a dog", "The cat"]) == {
        "captions": 4,
        "mean_length": 2.0,
        "vocabulary": 3,
        "distinct_1": 3 / 8,
        "distinct_2": 3 / 8,  # a dog, dog a, a cat: none runs from one caption into the next
        "unique": 3 / 4,
        "in_training": 1 / 4,
    }
    assert caption_statistics(["A dog"])["in_training"] is None
    assert caption_statistics(["A dog"], training=[])["in_training"] == 0
    assert caption_statistics(["Three o'clock"])["mean_length"] == 2
    assert isnan(caption_statistics(["", "..."])["distinct_1"])
    with pytest.raises(ValueError, match="no captions"):
        caption_statistics([])
