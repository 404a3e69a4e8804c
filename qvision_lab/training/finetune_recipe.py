"""What a fine-tuning recipe says: every setting with its meaning, and how a YAML file is read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from qvision_lab.training.freezing import find_policy

PRECISIONS = ("float32", "bfloat16", "float16")
SELECTIONS = ("cider", "loss")

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Captioned pictures; what `qvision_lab.data.coco.open_dataset` takes."""

    source: str
    split: str | None = None
    n: int | None = None
    seed: int = 0
    images: str | None = None


@dataclass(frozen=True)
class Data:
    """What is learned from, and what it is judged by; a picture in both is only judged by."""

    train: Source
    validation: Source
    skip_bad: bool = False  # leave out pictures that cannot be read, instead of stopping


@dataclass(frozen=True)
class Features:
    """The cache of `FeatureCache`."""

    folder: str | None = None  # None: inside the run's folder
    dtype: str = "bfloat16"
    workers: int | None = None  # processes that read pictures; None: as there are cores


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with a warm-up and a cosine of its own."""

    policy: str | float  # see `freezing.apply`
    epochs: float
    learning_rate: float | None = None  # None: that of `Training`
    thaw_projection: bool = False

    def __post_init__(self):
        find_policy(self.policy)


@dataclass(frozen=True)
class Training:
    """How: pictures are counted over all processes."""

    phases: tuple[Phase, ...]
    learning_rate: float
    matrix_learning_rate: float | None = None  # of Muon, for hidden matrices; None: AdamW for all
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of a phase's steps
    clip: float = 1.0  # largest norm of the gradient
    batch_size: int = 16  # pictures at once
    accumulation: int = 1  # batches a step
    captions_per_image: int = 5  # a seeded choice, new in each epoch, where a picture has more
    max_tokens: int = 40  # longer captions are cut before their <END>
    precision: str = "float32"
    evaluations: int = 8  # a phase: each validates and saves
    best_by: str = "cider"
    patience: int | None = None  # evaluations without a better one before a phase ends
    workers: int | None = None  # processes that prepare batches; None: 4 beside a GPU, else 0
    capture: bool = True  # on one GPU, replay steps of cached features as CUDA graphs
    compile: bool = False  # the blocks that are trained, by inductor; they are not captured then
    tensorboard: bool = False

    def __post_init__(self):
        if not self.phases:
            raise ValueError("training.phases is empty: say what to train, and how long.")
        for name, choices in (("precision", PRECISIONS), ("best_by", SELECTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"training.{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}."
                )
        for name in ("batch_size", "accumulation", "captions_per_image", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}={getattr(self, name)} must be at least 1.")


@dataclass(frozen=True)
class FinetuneRecipe:
    """A whole run."""

    name: str
    data: Data
    training: Training
    kind: str = "finetune"
    seed: int = 0
    checkpoint: str | None = None  # folder or Hub id; None: the embedded one
    revision: str | None = None  # on the Hub
    reinitialise: tuple[str, ...] = ()  # modules that start from random weights, by their names
    features: Features | None = Features()  # None: from pixels, through the tower at each step
    push_to: str | None = None  # Hub id to upload the result to

    def __post_init__(self):
        for phase in self.training.phases:
            if self.features is not None and "vision" in find_policy(phase.policy).modules:
                raise ValueError(
                    f"policy {phase.policy!r} trains the vision tower, whose states then change: "
                    "set features to null."
                )

    @classmethod
    def parse(cls, values: dict) -> FinetuneRecipe:
        """Read what a YAML file says.

        Raises:
            ValueError: for a setting that does not exist, naming the nearest that does, that is
                missing, or that has a value of the wrong type.
        """
        return _parse(cls, values, "")


def _parse(kind: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or 'a recipe'} is {values!r}: give it settings.")
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            near = get_close_matches(str(name), names, n=1, cutoff=0)[0]
            raise ValueError(
                f"there is no setting {where}{name}; did you mean {where}{near}? "
                f"The settings are {', '.join(names)}."
            )
    required = [f.name for f in fields(kind) if f.default is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"the recipe lacks {', '.join(where + name for name in missing)}.")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], values[name], where + name) for name in values})


def _value(hint: Any, value: Any, where: str) -> Any:
    kinds = get_args(hint) or (hint,)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_value(kinds[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if is_dataclass(kinds[0]) and value is not None:
        return _parse(kinds[0], value, f"{where}.")
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)  # YAML 1.1 reads 1e-4 as text
    if get_origin(hint) is tuple or type(value) not in kinds:
        name = hint.__name__ if isinstance(hint, type) else hint
        raise ValueError(f"{where}={value!r} must be of type {name}.")
    return value
