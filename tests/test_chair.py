"""Objects named that are not there, and how varied captions are."""

import json
from collections import Counter
from importlib.resources import files

import pytest
import yaml

from qvision_lab.data.scenes import check, layout
from qvision_lab.data.scenes.telling import tell
from qvision_lab.evaluation.chair import chair, coco_vocabulary, scenes_vocabulary
from qvision_lab.evaluation.statistics import CaptionStatistics, caption_statistics

# A caption and what it names, mention by mention.
NAMED = [
    # plurals
    ("Three men and two women with children", ["person"] * 3),
    ("People on skis", ["person", "skis"]),
    ("Knives, forks and spoons", ["knife", "fork", "spoon"]),
    ("Two computer mice on a desk", ["mouse", "dining table"]),
    ("Buses and taxis in traffic", ["bus", "car"]),
    ("busses", ["bus"]),
    ("sheep and geese near oxen", ["sheep", "bird", "cow"]),
    ("Calves beside their mothers", ["cow", "person"]),
    ("puppies, ponies and babies", ["dog", "horse", "person"]),
    ("Sandwiches on benches", ["sandwich", "bench"]),
    ("toothbrushes, vases and a pair of scissors", ["toothbrush", "vase", "scissors"]),
    ("Wine glasses beside water glasses", ["wine glass"]),
    ("Policemen on motorcycles", ["person", "motorcycle"]),
    ("couches, dishes, boxes and watches", ["couch"]),
    ("Cattle and aircraft", ["cow", "airplane"]),
    ("Two traffic lights and three stop signs", ["traffic light", "stop sign"]),
    # compounds that are one thing
    ("A hot dog with mustard", ["hot dog"]),
    ("HOT-DOGS!", ["hot dog"]),
    ("A dog eating a hotdog", ["dog", "hot dog"]),
    ("A hot, tired dog", ["dog"]),
    ("A teddy bear and a polar bear", ["teddy bear", "bear"]),
    ("stuffed bears and a stuffed sheep on a bed", ["teddy bear", "teddy bear", "bed"]),
    ("A red fire hydrant", ["fire hydrant"]),
    ("a hydrant by a parking meter", ["fire hydrant", "parking meter"]),
    ("A man in a bow tie", ["person", "tie"]),
    ("A toilet seat", ["toilet"]),
    ("A toilet with the seat up", ["toilet"]),
    ("The seat of a motorcycle", ["motorcycle"]),
    ("a toilet bowl beside a bowl", ["toilet", "bowl"]),
    ("Carrot cake and carrots", ["cake", "carrot"]),
    ("A cupcake in a cup", ["cake", "cup"]),
    ("a glass of wine and a glass of milk", ["wine glass", "cup"]),
    ("A microwave oven", ["microwave"]),
    ("A desk chair and an office desk", ["chair", "dining table"]),
    ("a back-pack, a surf board and a skate board", ["backpack", "surfboard", "skateboard"]),
    ("A tennis player with a racquet and balls", ["person", "tennis racket", "sports ball"]),
    ("A baseball bat, a baseball and a catcher's mitt", ["baseball bat", "baseball glove"]),
    ("A potted plant beside a plant", ["potted plant"]),
    ("A flat-screen TV and a computer monitor", ["tv", "tv"]),
    ("A laptop computer with its remote control", ["laptop", "remote"]),
    ("a love seat, a bar stool", ["couch", "chair"]),
    ("hair dryer and blow dryers", ["hair drier", "hair drier"]),
    ("A pickup truck with a bed of hay", ["truck"]),
    ("tabby cat", ["cat"]),
    ("A cat, a kitten", ["cat", "cat"]),
    ("cell-phone or mobile phone", ["cell phone", "cell phone"]),
    # words that only say which one
    ("A baby elephant", ["elephant"]),
    ("Baby giraffes and an adult zebra", ["giraffe", "zebra"]),
    ("An adult polar bear with a baby", ["bear", "person"]),
    ("A mother duck with ducklings", ["bird", "bird"]),
    ("A passenger train and a passenger jet", ["train", "airplane"]),
    ("A passenger on a train", ["person", "train"]),
    ("A man skis", ["person", "skis"]),
    # words that look like a thing
    ("An empty train track", []),
    ("A train on the tracks at a train station", ["train"]),
    ("A bus stop", []),
    ("A telephone pole and a phone booth", []),
    ("A bird's eye view of a bird house", []),
    ("Toilet paper and a shower seat", ["chair"]),
    ("A street light and a street sign", []),
    ("A pitcher of water", []),
    ("The pitcher throws a ball", ["person", "sports ball"]),
    ("A computer on the floor", []),
    ("A pizza box by the mouse pad", []),
    ("Three o'clock", []),
    ("oven mitts", []),
    ("Ski slope with ski lifts", []),
    ("carpet, catalog, cupboard, bearded, busy, tied", []),
    # a fruit and a color
    ("An orange cat", ["cat"]),
    ("An orange and white bus", ["bus"]),
    ("A kite in yellow and orange", ["kite"]),
    ("An orange and an apple", ["orange", "apple"]),
    ("Peel an orange.", ["orange"]),
    ("an orange on a plate, oranges", ["orange", "orange"]),
    ("A glass of orange juice", ["cup"]),
    # nothing at all
    ("", []),
    ("?!", []),
    ("\N{SLICE OF PIZZA} \N{DOG FACE}", []),
]


@pytest.mark.parametrize(("caption", "named"), NAMED, ids=[caption for caption, _ in NAMED])
def test_what_a_caption_names(caption, named):
    mentions = coco_vocabulary().mentions(caption)
    assert [mention.category for mention in mentions] == named
    assert all(caption[slice(*mention.span)] == mention.text for mention in mentions)


def test_a_mention_says_which_words():
    mentions = coco_vocabulary().mentions("Two Tabby cats eat hot-dogs.")
    assert [mention.text for mention in mentions] == ["Tabby cats", "hot-dogs"]


def test_every_category_names_itself():
    categories = coco_vocabulary().categories
    assert len(categories) == 80
    for name in categories:
        assert [m.category for m in coco_vocabulary().mentions(f"There is a {name}.")] == [name]


def test_no_phrase_is_listed_twice():
    words = yaml.safe_load((files("qvision_lab.evaluation") / "coco_words.yaml").read_text())
    for section in (words["objects"], words["qualifiers"]):
        listed = Counter(entry for said in section.values() for entry in said.split(", "))
        assert [entry for entry, times in listed.items() if times > 1] == []


def test_counts_of_captions():
    table = chair(
        {7: "A dog, a dog and a cat on a bench", 3: "", 5: "Grass"},
        {3: {"car"}, 5: set(), 7: {"dog", "person"}, 9: {"cup"}},
        coco_vocabulary(),
    )
    counts = ["captions", "mentioned", "hallucinated", "has_hallucination", "objects", "recalled"]
    assert list(table.index) == [7, 3, 5]
    assert table[counts].to_numpy().tolist() == [
        [1, 4, 2, 1, 2, 1],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert table["hallucinated_objects"].to_list() == [("cat", "bench"), (), ()]


def test_what_people_name_is_there_too():
    captions, objects = {"a": "A kitten on a bench"}, {"a": {"cat"}}
    alone = chair(captions, objects, coco_vocabulary())
    joined = chair(captions, objects, coco_vocabulary(), {"a": ["A pew.", "A red car"]})
    assert alone.loc["a", "hallucinated_objects"] == ("bench",)
    assert joined.loc["a", ["hallucinated", "objects", "recalled"]].to_list() == [0, 3, 2]


def test_scenes_are_read_as_the_checker_reads_them():
    truths = {i: layout("crowd", 0, i) for i in range(200)}
    captions = {i: tell(truth, 1)[0] for i, truth in truths.items()}
    objects = {i: {thing.category for thing in truth.objects} for i, truth in truths.items()}
    for i, caption in captions.items():
        mentions = scenes_vocabulary().mentions(caption)
        expected = [mention.category for mention in check(caption, truths[i]).mentions]
        assert [mention.category for mention in mentions] == expected
    table = chair(captions, objects, scenes_vocabulary())
    assert table["hallucinated"].sum() == 0
    assert table["recalled"].equals(table["objects"])
    shifted = chair(captions, {i: objects[(i + 1) % 200] for i in objects}, scenes_vocabulary())
    assert shifted["has_hallucination"].mean() > 0.9


def test_people_rarely_name_what_coco_has_not_labelled(shared):
    folder = shared / "coco_mini" / "annotations"
    told = json.loads((folder / "captions_train2017.json").read_text())["annotations"]
    labelled = json.loads((folder / "instances_train2017.json").read_text())
    names = {category["id"]: category["name"] for category in labelled["categories"]}
    objects = {row["image_id"]: set() for row in told}
    for row in labelled["annotations"]:
        objects[row["image_id"]].add(names[row["category_id"]])
    table = chair(
        {row["id"]: row["caption"] for row in told},
        {row["id"]: objects[row["image_id"]] for row in told},
        coco_vocabulary(),
    )
    assert set(names.values()) == coco_vocabulary().categories
    assert table["hallucinated"].sum() / table["mentioned"].sum() < 0.06


def test_bad_truth_is_named():
    captions = dict.fromkeys(range(8), "A dog")
    with pytest.raises(ValueError, match=r"7 of 8 predictions have no objects: 1, 2, 3, 4, 5, …"):
        chair(captions, {0: {"dog"}}, coco_vocabulary())
    with pytest.raises(ValueError, match="1 of 1 predictions have no references: 0"):
        chair({0: "A dog"}, {0: {"dog"}}, coco_vocabulary(), references={})
    with pytest.raises(ValueError, match=r"'motorbike' is no category .* nearest is 'motorcycle'"):
        chair({0: "A dog"}, {0: {"motorbike"}}, coco_vocabulary())


def test_statistics_by_hand():
    captions = ["A dog, a DOG.", "a cat", "A cat!", "?"]
    assert caption_statistics(captions, training=["a dog a dog", "The cat"]) == CaptionStatistics(
        captions=4,
        mean_length=2.0,
        vocabulary=3,
        distinct_1=3 / 8,
        distinct_2=3 / 8,  # a dog, dog a, a cat: none runs from one caption into the next
        unique=3 / 4,
        seen=1 / 4,
    )


def test_statistics_where_there_is_nothing():
    assert caption_statistics(["A dog"]).seen is None
    assert caption_statistics(["A dog"], training=[]).seen == 0
    assert caption_statistics(["Three o'clock"]).mean_length == 2
    wordless = caption_statistics(["", "..."])
    assert wordless.distinct_1 != wordless.distinct_1  # nan
    with pytest.raises(ValueError, match="no captions"):
        caption_statistics([])
