"""Damaged data files are refused by their name and the place of the damage."""

import json

import pytest

from qvision_lab.data.coco import open_dataset
from qvision_lab.evaluation import read_results

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
