"""Settings of recipes and studies: YAML in, validated pydantic models out."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: types are strict, unknown names are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    @classmethod
    def parse(cls: type[T], values: Mapping[str, Any], source: str = "the recipe") -> T:
        """Validate the values of a YAML file.

        Raises:
            ValueError: for an unknown name, with the nearest known one, a missing name, or a value
                that is not allowed; `source` and the dotted name are in the message.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            unknown_first = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
            problems = (_describe(cls, problem) for problem in unknown_first[:3])
            raise ValueError(f"{source}: {'; '.join(problems)}") from None


def suggest(name: object, known: Iterable[str]) -> str:
    """The nearest of the known names, as a question, and all of them."""
    known = list(known)
    near = get_close_matches(str(name), known, n=1, cutoff=0)[0]
    return f"did you mean {near!r}? Known are {', '.join(known)}."


def _describe(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    *parents, name = problem["loc"] or ("settings",)
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {where}; {suggest(name, _fields(kind, parents))}"
    if problem["type"] == "missing":
        return f"the setting {where} is missing."
    reason = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    if problem["type"] == "value_error":
        return f"{where}: {reason}." if problem["loc"] else f"{reason}."
    return f"{where}={problem['input']!r}: {reason[0].lower()}{reason[1:]}."


def _fields(kind: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """Names of the settings at a place of a nested model."""
    for part in path:
        if part in kind.model_fields:
            kind = _model_in(kind.model_fields[part].annotation) or kind
    return list(kind.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that `1e-4` is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """A value in YAML, without Python tags.

    Raises:
        ValueError: the text is not valid YAML; `source` and the line are in the message.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, in UTF-8.

    Raises:
        ValueError: the file is not UTF-8, not valid YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it so.") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not `name: value` settings.")
    return values


def find_settings(name: str, folder: Traversable, kind: str) -> Path | Traversable:
    """The file of a recipe or study: a path that ends in .yaml, or a name of the package's own.

    Raises:
        ValueError: there is no such file, with the names of the package's own.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(Path(str(file)).stem for file in folder.iterdir()))
        raise ValueError(f"no {kind} {name!r}: give a YAML file, or one of {known}.")
    return path


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with changed values, by dotted names; numbers index lists (`phases.0.epochs`).

    Whether the names exist is checked when the result is parsed.

    Raises:
        ValueError: a dotted name leads into a value that has no parts.
    """
    result = copy.deepcopy(dict(values))
    for key, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in str(key).split("."))
        place: Any = result
        try:
            for part in parents:
                if isinstance(place, dict) and place.get(part) is None:
                    place[part] = {}
                place = place[part]
            place[last] = copy.deepcopy(value)
        except (TypeError, IndexError):
            raise ValueError(f"cannot set {key}: it leads into a value without parts.") from None
    return result


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Changes given as `name.name=value`, with values in YAML.

    Raises:
        ValueError: an argument without `=`, or a value that is not valid YAML.
    """
    changes = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"cannot set {argument!r}: write name=value.")
        changes[key] = parse_yaml(value, argument)
    return changes
