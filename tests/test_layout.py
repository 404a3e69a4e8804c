"""Imports run one way: from the model outwards, and the core knows nothing of the lab."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qvision_lab"

# What a part may import of the package, itself included. The core comes first, then the lab.
CORE = {"model", "captioning", "data", "evaluation", "interpretation", "plots"}
LAB = {"scenes", "training", "ablation", "benchmark", "demo", "findings"}
ALLOWED = {
    "model": {"model"},
    "captioning": {"model", "data", "captioning"},
    "data": {"data", "scenes"},
    "evaluation": {"data", "evaluation", "scenes"},
    "interpretation": {"model", "captioning", "data", "evaluation", "interpretation"},
    "plots": {"plots", "captioning"},
    "scenes": {"data", "scenes"},
    "training": {"training", *CORE, "scenes"},
    "ablation": {"training", "ablation", *CORE, "scenes"},
    "benchmark": {"training", "benchmark", *CORE, "scenes"},
    "demo": {*CORE, "scenes", "demo"},
    "findings": {"ablation", "plots"},
    "widgets": {*CORE, "widgets"},
    "cli": CORE | LAB,
}
CHECKPOINT_READERS = {"captioning", "training", "benchmark", "cli"}


def imports(path: Path) -> set[str]:
    """Full names of what a module imports of this package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qvision_lab"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("qvision_lab")}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    rooms = {name.split(".")[1] for name in imports(path)}
    assert rooms <= ALLOWED[room(path)]


def test_stages_do_not_import_each_other():
    stages = {"vision", "qformer", "decoder"}
    for stage in stages:
        parts = {name.split(".")[2] for name in imports(PACKAGE / "model" / f"{stage}.py")}
        assert not parts & (stages - {stage})


def test_only_those_who_load_import_the_checkpoint():
    for path in MODULES:
        reads = any(name.startswith("qvision_lab.model.loading") for name in imports(path))
        assert not reads or path.parent.name == "loading" or room(path) in CHECKPOINT_READERS, path


def test_no_drawer_files():
    assert not {path.stem for path in MODULES} & {"utils", "util", "helpers", "common", "misc"}
