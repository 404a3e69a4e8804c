"""Recipes and their settings: one reader, and errors that name the value and the way out."""

import re

import pytest
from pydantic import ValidationError

from qvision_lab.training.recipe import RECIPES, Recipe, load_recipe, override, read_yaml

MINIMAL = {
    "name": "minimal",
    "data": {"train": {"source": "x"}, "validation": {"source": "y"}},
    "training": {"phases": [{"policy": "bridge", "epochs": 1}], "learning_rate": 0.1},
}


def test_shipped_recipes_are_valid_and_overrides_change_single_values():
    names = {path.stem for path in RECIPES.iterdir()}
    assert names == {"ablation", "finetune_coco", "finetune_scenes", "photos", "scenes"}
    for name in names:
        changes = ["training.learning_rate=1e-4", "training.phases.0.policy=0.5", "features=null"]
        recipe = load_recipe(name, changes)
        assert recipe.training.learning_rate == 1e-4
        assert recipe.training.phases[0].policy == 0.5
        assert recipe.features is None
    changed = load_recipe("scenes", {"tower.steps": 7, "features.dtype": "float32"})
    assert (changed.tower.steps, changed.features.dtype) == (7, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainign": {}}, "there is no setting trainign; did you mean 'training'?"),
        ({"features.dtyp": "float32"}, "features: there is no setting dtyp; did you mean 'dtype'?"),
        (
            {"training.phases.0.epoch": 1},
            "training.phases.0: there is no setting epoch; did you mean 'epochs'",
        ),
        ({"tower": {"step": 1}}, "tower: there is no setting step; did you mean 'steps'?"),
        ({"seed": "three"}, "seed='three': input should be a valid integer"),
        ({"seed": True}, "seed=True: input should be a valid integer"),
        ({"training.batch_size": 0}, "batch_size=0: input should be greater than or equal to 1"),
        ({"training.learning_rate": -1}, "learning_rate=-1: input should be greater than 0"),
        ({"training.learning_rate": "1"}, "learning_rate='1': input should be a valid number"),
        ({"training.precision": "fp16"}, "'float32', 'bfloat16' or 'float16'"),
        ({"data": {"train": {"source": "x"}}}, "the setting data.validation is missing"),
        ({"reinitialise": "qformer"}, "reinitialise='qformer': input should be a valid tuple"),
        ({"training": 3}, "training=3: input should be a valid dictionary"),
        ({"training.phases": []}, "training.phases=[]: tuple should have at least 1 item"),
        ({"training.phases.0.steps": 3}, "needs epochs or steps, and not both"),
        ({"training.phases.0.policy": "publishd"}, "did you mean 'published'?"),
        ({"training.phases.0.policy": 1.5}, "must be a share of blocks, 0 to 1"),
        ({"training.phases.0.policy": "everything"}, "set features to null"),
        ({"model.num_query_token": 4}, "did you mean 'num_query_tokens'?"),
        ({"model.bridge": "none"}, "'cross_attention' or 'prefix'"),
    ],
)
def test_bad_settings_are_named_with_the_way_out(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Recipe.parse(override(MINIMAL, changes))
    assert not isinstance(error.value, ValidationError)
    assert "\n" not in str(error.value)


def test_overrides_without_a_place_or_a_value_are_refused():
    for bad in ("training.steps", "3", "seed=[1"):
        with pytest.raises(ValueError, match=r"write name=value|not valid YAML"):
            load_recipe("scenes", [bad])
    for bad in ("seed.steps=7", "training.phases.4.epochs=1", "training.phases.first.epochs=1"):
        with pytest.raises(ValueError, match="value without parts"):
            load_recipe("scenes", [bad])
    with pytest.raises(ValueError, match=r"no recipe 'nonsense': .* one of .*scenes"):
        load_recipe("nonsense")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", r"is not valid YAML: .*line 1"),
        (b"\tname: x", "is not valid YAML"),
        (b"- name: x", "holds list, not"),
        (b"", "holds NoneType, not"),
        (b"name: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        (b"when: 2020-13-45", "is not valid YAML"),
        ("name: Zürich".encode("latin-1"), "is not in UTF-8"),
    ],
)
def test_malformed_yaml_is_a_sentence(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


def test_numbers_are_read_as_in_yaml_1_2(tmp_path):
    content = "name: Zürich\nrates: [1e-4, 1e3, -2.5E+1, .5e1, 1e, e5, 12]\n"
    (tmp_path / "x.yaml").write_text(content, encoding="utf-8")
    rates = [1e-4, 1e3, -25, 5, "1e", "e5", 12]
    assert read_yaml(tmp_path / "x.yaml") == {"name": "Zürich", "rates": rates}
