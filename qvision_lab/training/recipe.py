"""Recipes: every setting of a training run with its type, bounds and default, read from YAML."""

import copy
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from qvision_lab.training.freezing import find_policy, suggest

RECIPES = files("qvision_lab.training") / "recipes"
T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: types are strict, unknown names are errors, instances do not change."""

    model_config = ConfigDict(strict=True, frozen=True, validate_default=True)

    @classmethod
    def parse(cls: type[T], values: Mapping[str, Any], source: str = "the recipe") -> T:
        """Validate the values of a YAML file.

        ValueError, with `source` and the dotted name, for a name that is unknown (with the nearest
        known one) or missing, or a value that is not allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = map(_describe, error.errors()[:3])
            raise ValueError(f"{source}: {'; '.join(problems)}") from None

    @model_validator(mode="before")
    @classmethod
    def _names_exist(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"there is no setting {name}; {suggest(name, cls.model_fields)}")
        return values


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class DataSource(Settings):
    """Captioned images, as `qvision_lab.data.coco.open_dataset` takes them."""

    source: str
    split: str | None = None
    n: Count | None = None
    seed: int = 0
    images: str | None = None
    captions: Count | None = None  # only the first so many captions of an image; None: all
    as_sentences: bool = False  # captions get a capital, a full stop, and no space before it


class Data(Settings):
    """Training and validation data; an image in both is used for validation only."""

    train: DataSource
    validation: DataSource
    skip_bad: bool = False  # leave out images that cannot be read, instead of stopping


class Features(Settings):
    """The cache of vision states, see `features.FeatureCache`."""

    folder: str | None = None  # None: inside the run's folder
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    views: int = Field(1, ge=1, le=3)  # of a training image: as it is, mirrored, a random part
    workers: int | None = Field(None, ge=0)  # reading processes; None: by the number of cores


class Optimisation(Settings):
    """Settings of every stage: optimizer, schedule, batches."""

    learning_rate: Positive
    matrix_learning_rate: Positive | None = None  # of Muon, for hidden matrices; None: AdamW only
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    clip: Positive = 1.0  # largest norm of the gradient
    batch_size: Count = 16  # images per batch, over all processes
    accumulation: Count = 1  # batches per step
    # bfloat16 is float32 on a CPU without instructions for it
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    evaluations: Count = 8  # each validates and saves a checkpoint
    workers: int | None = Field(None, ge=0)  # processes preparing batches; None: 4 with a GPU
    tensorboard: bool = False


class Phase(Settings):
    """A part of the training with its own policy, warm-up and cosine; give epochs or steps."""

    policy: str | float  # see `freezing.apply`
    epochs: Positive | None = None
    steps: Count | None = None
    learning_rate: Positive | None = None  # scales Muon's too; None: that of `Training`
    thaw_projection: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "Phase":
        find_policy(self.policy)
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a phase needs epochs or steps, and not both")
        return self


class Training(Optimisation):
    """How the captioner is trained."""

    phases: Annotated[tuple[Phase, ...], Strict(False), Field(min_length=1)]
    captions_per_image: Count = 5  # in a batch; of more, each epoch draws with the seed
    max_tokens: int = Field(40, ge=3)  # longer captions are cut before their <END>
    label_smoothing: float = Field(0, ge=0, lt=1)  # Szegedy et al. 2016, arXiv:1512.00567
    state_dropout: float = Field(0, ge=0, lt=1)  # of cached vision states
    bridge_rate: Positive | None = None  # factor of the bridge's learning rates, with Muon
    query_cosine: Positive | None = None  # weight of the visual tokens' mean cosine in the loss
    token_dropout: float | None = Field(None, gt=0, lt=1)  # of visual tokens, each as a whole
    best_by: Literal["cider", "loss"] = "cider"
    patience: Count | None = None  # evaluations without improvement before a phase ends
    capture: bool = True  # on one GPU, replay steps of cached features as CUDA graphs
    compile: bool = False  # compile the trained blocks with inductor (half a minute)

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.bridge_rate and not self.matrix_learning_rate:
            raise ValueError("bridge_rate needs a matrix_learning_rate too, of Muon")
        if self.query_cosine and self.token_dropout:
            raise ValueError("query_cosine compares all visual tokens: leave token_dropout out")
        return self


class TowerData(Settings):
    """Scenes that the tower learns from: the first `n` of a split and seed."""

    split: str
    n: Count
    seed: int = 0


class NewModel(Settings):
    """A new model, and the tokenizer that is trained on its captions."""

    model: dict[str, Any]  # of `QVisionConfig`
    vocab_size: Count  # of the tokenizer


class Tower(NewModel, Optimisation):
    """A stage before the captioner's: a new model, whose vision tower learns from Scenes' truth."""

    vocab_scenes: Count  # of so many scenes
    data: Annotated[tuple[TowerData, ...], Strict(False), Field(min_length=1)]
    held_out: Count
    steps: Count
    supervision: Literal["patches", "images"] = "patches"  # granularity; images: without positions
    drawing_workers: int = Field(0, ge=0)


class ModelChanges(Settings):
    """Fields of `QVisionConfig` that differ from the checkpoint's; None: as they are.

    The tower and the tokens stay, since the tower is frozen and the tokenizer is the checkpoint's.
    """

    num_query_tokens: Count | None = None
    num_qformer_blocks: Count | None = None
    num_attention_heads: Count | None = None
    dropout: float | None = Field(None, ge=0, lt=1)
    text_config: dict[str, Any] | None = None  # of GPT-Neo; what is not named stays
    global_token: Literal["token", "none", "added"] | None = None
    bridge: Literal["cross_attention", "prefix"] | None = None
    bridge_reads: Literal["visual_tokens", "image_tokens", "mean_image_token"] | None = None


class Generation(Settings):
    """Settings of transformers' `generate` that a checkpoint captions by."""

    num_beams: Count = 1
    length_penalty: float = 1.0
    max_new_tokens: Count = 30


class Recipe(Settings):
    """A whole run: a checkpoint (or a new model), data, what is trained and how."""

    name: str
    data: Data
    training: Training
    seed: int = 0
    tower: Tower | None = None  # start from this stage, instead of a checkpoint
    imagenet: NewModel | None = None  # or from a new model behind a tower with ImageNet's weights
    checkpoint: str | None = None  # folder or Hub id; None: the embedded one
    revision: str | None = None  # on the Hub
    model: ModelChanges = ModelChanges()
    reinitialise: Annotated[tuple[str, ...], Strict(False)] = ()  # modules with random weights
    features: Features | None = Features()  # None: no cache; images pass the tower in each step
    scores: dict[str, DataSource] = {}  # data sets, by a name, that the result is scored on
    calibration: DataSource | None = None  # scenes that give the confidence in claims
    generation: Generation = Generation()  # how the result captions by default
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the saved weights
    push_to: str | None = None  # Hub id to upload the result to

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for phase in self.training.phases if self.features else ():
            if "vision" in find_policy(phase.policy).modules:
                raise ValueError(
                    f"policy {phase.policy!r} trains the vision tower, whose states then change: "
                    "set features to null"
                )
        starts = {"tower": self.tower, "imagenet": self.imagenet, "checkpoint": self.checkpoint}
        if len(given := [name for name, start in starts.items() if start]) > 1:
            raise ValueError(f"a run starts from one of {' and '.join(given)}: leave the rest out")
        return self


def load_recipe(
    name: str, changes: Iterable[str] | Mapping[str, Any] = (), data: str | None = None
) -> Recipe:
    """Read a recipe by its name or path; changes are `name.name=value` or by dotted names.

    `data` is a source in place of all that the recipe names.

    ValueError for a recipe, setting or value that does not exist or is not allowed, with those that
    are.
    """
    values = read_yaml(find_settings(name, RECIPES, "recipe"))
    changes = changes if isinstance(changes, Mapping) else parse_overrides(changes)
    if data is not None:
        parts = "data.train", "data.validation", *(f"scores.{n}" for n in values.get("scores", ()))
        changes = {f"{part}.source": data for part in parts} | changes
    return Recipe.parse(override(values, changes))


def _describe(problem: Mapping[str, Any]) -> str:
    name, reason = ".".join(map(str, problem["loc"])), problem["msg"].removesuffix(".")
    if problem["type"] == "missing":
        return f"the setting {name} is missing."
    if problem["type"] == "value_error":
        reason = reason.removeprefix("Value error, ")
        return f"{name}: {reason}." if name else f"{reason}."
    return f"{name}={problem['input']!r}: {reason[0].lower()}{reason[1:]}."


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that `1e-4` is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """A value in YAML, without Python tags; ValueError with source and line if it is not valid."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """Read a YAML file; ValueError if it is not in UTF-8, not valid YAML, or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it so.") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not `name: value` settings.")
    return values


def find_settings(name: str, folder: Traversable, kind: str) -> Path | Traversable:
    """The file of a recipe or study, by a path that ends in .yaml or a shipped one's name."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(Path(str(file)).stem for file in folder.iterdir()))
        raise ValueError(f"no {kind} {name!r}: give a YAML file, or one of {known}.")
    return path


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with changed values, by dotted names; numbers index lists (`phases.0.epochs`).

    Unknown names are errors when the result is parsed; here, names of parts of a plain value.
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
    """Changes given as `name.name=value`, with values in YAML; ValueError for other arguments."""
    changes = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"cannot set {argument!r}: write name=value.")
        changes[key] = parse_yaml(value, argument)
    return changes
