"""One data set from every kind of file; errors name the file and the images."""

import json

import pytest
from PIL import Image

from qvision_lab import scenes
from qvision_lab.data.coco import Contamination, contamination, open_dataset
from qvision_lab.evaluation import read_results


def coco(captions, ids=None):
    """Content of a captions file: captions by image id, of the images `ids`."""
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids or captions]
    rows = [{"image_id": i, "caption": text} for i, texts in captions.items() for text in texts]
    return {"images": images, "annotations": rows}


@pytest.fixture
def write(tmp_path):
    """Writes JSON, or text as it is, and returns the path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_coco_photos(shared):
    dataset = open_dataset(shared / "coco_mini")
    annotations = shared / "coco_mini" / "annotations"
    listed = json.loads((annotations / "captions_train2017.json").read_text())
    assert dataset == open_dataset(annotations / "captions_train2017.json", split="train2017")
    assert dataset.ids == tuple(image["id"] for image in listed["images"])
    assert not dataset.missing()
    first = dataset[0]
    assert first.image_id == 493652
    assert first.picture == first.image == shared / "coco_mini" / "train2017" / "000000493652.jpg"
    assert first.references[1] == "a living room with many decorations hanging "
    assert len(first.references) == 5
    things = {"potted plant", "teddy bear", "couch", "tv", "book", "remote", "suitcase"}
    assert first.objects == dataset.objects[493652] == things
    assert dataset.references[493652] == list(first.references)
    report = contamination(dataset, annotations / "captions_train2017.json")
    assert report == Contamination(images=80, pool=80, suspects=dataset.ids)
    subset = dataset.subset(20, seed=3)
    assert subset == dataset.subset(20, seed=3) == open_dataset(annotations.parent, n=20, seed=3)
    assert subset.ids != dataset.subset(20, seed=4).ids
    assert len(set(subset.ids)) == 20
    assert list(subset.ids) == sorted(subset.ids, key=dataset.ids.index)
    assert "20 of 80" in subset.name
    for n in (0, 81):
        with pytest.raises(ValueError, match=f"n={n} of the 80 images"):
            dataset.subset(n)


def test_images_are_found_around_the_captions(write, tmp_path):
    path = write("annotations/captions_val2017.json", coco({7: ["A cat."], 8: ["A dog."]}))
    assert open_dataset(path).missing() == [7, 8]
    for folder in ("val2017", "annotations/images", "annotations"):
        picture = tmp_path / folder / "000000000007.jpg"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(picture)
        dataset = open_dataset(tmp_path)
        assert dataset[0].picture == picture
        assert dataset.missing() == [8]
        picture.unlink()
    assert open_dataset(path, images=tmp_path / "else")[1].image.parent == tmp_path / "else"


def test_objects_come_with_instances(write):
    path = write("captions_val2017.json", coco({7: ["A cat."], 8: ["A dog."], 9: ["A cow."]}))
    assert open_dataset(path).objects == {7: None, 8: None, 9: None}
    instances = {
        "images": [{"id": 7}, {"id": 8}],
        "annotations": 2 * [{"image_id": 7, "category_id": 17, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 17, "name": "cat"}],
    }
    expected = {7: {"cat"}, 8: set(), 9: None}
    assert open_dataset(path, instances=write("other.json", instances)).objects == expected
    write("instances_val2017.json", instances)
    assert open_dataset(path).objects == expected
    assert open_dataset(path)[0].boxes == 2 * (("cat", [1, 2, 3, 4]),)
    strange = write("strange.json", instances | {"images": [{"id": 1}], "annotations": []})
    with pytest.raises(ValueError, match="lists none of the images"):
        open_dataset(path, instances=strange)


def test_karpathy_splits(write):
    images = [
        {"imgid": i, "split": split, "filename": f"{i}.jpg", "sentences": [{"raw": f"No {i}."}]}
        for i, split in enumerate(("train", "restval", "test", "val", "test"))
    ]
    flickr = write("dataset_flickr30k.json", {"images": images})
    assert open_dataset(flickr, split="test").ids == (2, 4)
    images = [{**image, "cocoid": image["imgid"] + 900, "filepath": "val2014"} for image in images]
    path = write("dataset_coco.json", {"images": images})
    dataset = open_dataset(path, split="test")
    assert dataset.references == {902: ["No 2."], 904: ["No 4."]}
    assert dataset[0].image == path.parent / "val2014" / "2.jpg"
    assert open_dataset(path, split="train+restval").ids == (900, 901)
    for split in (None, "tset", "train+tset"):
        with pytest.raises(ValueError, match="there is train, restval, test, val"):
            open_dataset(path, split=split)


CSV = '\ufefffile_name,caption\na.jpg,"Red, round."\nb.jpg,Two\na.jpg,Big\n'
JSONL = """{"image": "a.jpg", "captions": ["Red, round.", "Big"]}

{"file": "b.jpg", "caption": "Two"}"""


@pytest.mark.parametrize(("name", "text"), [("captions.csv", CSV), ("captions.jsonl", JSONL)])
def test_tables(write, name, text):
    path = write(f"photos/{name}", text)
    dataset = open_dataset(path.parent)
    assert dataset == open_dataset(path)
    assert dataset.name == "photos"
    assert dataset.references == {"a.jpg": ["Red, round.", "Big"], "b.jpg": ["Two"]}
    assert dataset[0].image == path.parent / "a.jpg"
    assert dataset[0].objects is None
    with pytest.raises(ValueError, match=r"no split 'val' in .*: there is none"):
        open_dataset(path, split="val")


def test_scenes_are_drawn_when_asked():
    dataset = open_dataset("scenes:test", n=3, seed=4)
    for image, scene in zip(dataset, scenes.generate(3, split="test", seed=4), strict=True):
        assert image.references == scene.captions
        assert image.drawing.layout == scenes.layout("test", 4, scene.index)
        assert image.objects == {thing.category for thing in scene.objects}
        assert image.picture.tobytes() == scene.image.tobytes()
        assert image.image is None
    assert dataset.missing() == []
    assert dataset.subset(2).judge == dataset.judge
    for source, n, split, match in [
        ("scenes:test", None, None, "no end"),
        ("scenes:test", 3, "val", "there is test"),
        ("scenes:tset", 1, None, "choose one of"),
        ("scnes:test", 1, None, r"'scnes:test': installed data sets are .*scenes"),
    ]:
        with pytest.raises(ValueError, match=match):
            open_dataset(source, n=n, split=split)


def test_scenes_written_as_coco_are_the_same_scenes(tmp_path):
    written = open_dataset(scenes.write_coco(tmp_path / "drawn", 3, split="compose"))
    drawn = open_dataset("scenes:compose", n=3)
    assert written.name == "drawn"
    assert not written.missing()
    for attribute in ("references", "objects", "ids", "judge"):
        assert getattr(written, attribute) == getattr(drawn, attribute)
    assert [image.drawing for image in written] == [image.drawing for image in drawn]
    assert all(image.picture.is_file() for image in written)


def test_contamination(write, monkeypatch):
    dataset = open_dataset("scenes:test", n=3)
    pool = write("captions_train2017.json", coco({i: ["."] for i in (31, 2, 1, 30, 4)}))
    assert str(contamination(dataset, None)).startswith("contamination: unknown")
    assert contamination(dataset, pool).suspects == ()  # scenes 1 and 2 are no photos
    monkeypatch.setattr("qvision_lab.data.coco.POOL", 3)  # by sorted ids: 1, 2 and 4
    names = ("COCO_val2014_000000000004.jpg", "000000000030.jpg", "2.jpg", "1000000000001.jpg")
    rows = "".join(f"{name},Something\n" for name in names)
    report = contamination(open_dataset(write("captions.csv", "file,caption\n" + rows)), pool)
    assert report == Contamination(images=4, pool=3, suspects=names[:1])
    assert "1 of 4 images possibly trained on" in str(report)


TEXTS = {i: ["A cat."] for i in range(1, 8)}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("captions_a.json", json.dumps(coco(TEXTS))[:-9], "captions_a.json is cut off"),
        ("results.json", [{"image_id": 1, "caption": "A cat."}], "results.json is cut off, or"),
        ("instances_a.json", coco({}, [1]) | {"annotations": [{"image_id": 1}]}, "'caption'"),
        ("captions_a.json", coco(TEXTS, [1, 2, 2, 3, 1, 4, 5, 6, 7]), r"2 images \(1, 2\) more"),
        ("captions_a.json", coco({1: ["A cat."]}, range(1, 9)), r"7 images \(2, 3, 4, 5, 6, ..."),
        ("captions_a.json", coco({1: ["A cat."], 2: ["", " \n"]}), r"no caption of 1 image \(2\)"),
        ("captions_a.json", coco(TEXTS, [3]), r"6 images \(1, 2, 4, 5, 6, ...\) that it does not"),
        ("captions_a.json", coco({}), "captions_a has no images"),
        ("captions.csv", "path,caption\na.jpg,A cat.\n", "row 1 .* needs caption and one of .*'im"),
        ("captions.csv", "file,text\na.jpg,A cat.\n", "row 1 .* needs caption"),
        ("captions.csv", "file,caption\na.jpg,A cat, asleep\n", "quotes around captions"),
        ("captions.csv", "file,caption\na.jpg\n", r"no caption of 1 image \('a.jpg'\)"),
        ("captions.jsonl", '{"file": "a", "caption": "A"}\n{"file": "b", "ca', "line 2"),
    ],
)
def test_bad_files_are_named(write, name, content, match):
    path = write(name, content)
    with pytest.raises(ValueError, match=match):
        open_dataset(path)


def test_folders_and_splits_that_are_not_there(write, tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is no captions file or folder with"):
            open_dataset(source)
    for split in ("train2017", "val2017"):
        path = write(f"annotations/captions_{split}.json", coco({1: [split]}))
    assert open_dataset(tmp_path, split="train2017").references == {1: ["train2017"]}
    with pytest.raises(ValueError, match="name the file or the split"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test' in .*: there is val2017"):
        open_dataset(path, split="test")


GOOD = {"image_id": 1, "caption": "a"}
IMAGE = {"imgid": 1, "split": "test", "filename": "a", "sentences": [{"raw": "a"}]}
ODD = (None, 5, [], "text", {})
WRONG = (*ODD, *({"image_id": 1, "caption": value} for value in (None, 5, ["a"])))
TORN = ("", "{", "3", "[" * 10**5, "\xff{}")
CASES = [
    *(("captions_a.json", {"images": [], "annotations": [GOOD, x]}, "annotation 2") for x in WRONG),
    *(("captions_a.json", {"images": [{"id": 1}, x], "annotations": []}, "image 2") for x in ODD),
    *(("dataset_a.json", {"images": [IMAGE, {"sentences": x}]}, "image 2") for x in ODD),
    ("dataset_a.json", {"images": [{**IMAGE, "sentences": [{"raw": None}]}]}, "image 1"),
    *(
        ("captions.jsonl", f'{{"file": "a", "caption": "a"}}\n{json.dumps(x)}', "row 2")
        for x in ODD
    ),
    *(("captions.jsonl", {"file": "a", "captions": ["a", x]}, "row 1") for x in ODD[:3]),
    ("captions.csv", "file,caption\na,b\n" + "c" * 200_000 + ",d\n", "line 3 of"),
    ("captions.csv", 'file,caption\na,"b\nc"\nd,"e\nf,g\nh,i\n', "line 4 of"),  # a quote is open
    ("captions.csv", 'file,caption\na,"b\nc,"d"\n', "line 2 of"),
    ("captions.csv", '"file,caption\na,b\n', "line 1 of"),
    *(("results.json", [GOOD, x], "row 2") for x in WRONG),
    *((name, text, name) for name in ("results.json", "captions_a.json") for text in TORN),
]


@pytest.mark.parametrize(("name", "content", "place"), CASES)
def test_the_file_and_the_place_are_named(tmp_path, name, content, place):
    path, split = tmp_path / name, "test" if "dataset" in name else None
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=place) as refused:
        read_results(path) if name == "results.json" else open_dataset(path, split=split)
    assert name in str(refused.value)
