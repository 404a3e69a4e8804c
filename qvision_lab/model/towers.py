"""Vision towers that can stand in the place of CLIP's: transformers' own, and some of timm."""

from collections.abc import Iterable

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import image_utils as pixels
from transformers.utils import is_timm_available

DEFAULT = "clip_vision_model"
IMAGENET = pixels.IMAGENET_DEFAULT_MEAN, pixels.IMAGENET_DEFAULT_STD
HALF = pixels.IMAGENET_STANDARD_MEAN, pixels.IMAGENET_STANDARD_STD  # 0.5 each
# By `model_type`: mean and deviation of the pixels that towers of a kind are trained on.
TOWERS = {
    "clip_vision_model": (pixels.OPENAI_CLIP_MEAN, pixels.OPENAI_CLIP_STD),
    **{"vit": HALF, "siglip_vision_model": HALF, "dinov2": IMAGENET},
    "timm_wrapper": IMAGENET,  # but for some of these:
}
TIMM_TOWERS = {
    "tf_efficientnet_lite0": ([127 / 255] * 3, [128 / 255] * 3),
    **{"resnet18": IMAGENET, "resnet50": IMAGENET, "vit_small_patch16_224": HALF},
}
TIMM_ARGUMENTS = ("img_size", "drop_rate", "drop_path_rate")  # others can name files to read


def tower_config(settings: PreTrainedConfig | dict | None) -> PreTrainedConfig:
    """Configuration of a tower, by default CLIP's, without the pooling head: nothing reads it."""
    if isinstance(settings, PreTrainedConfig):
        return settings
    settings = dict(settings or {})
    model_type = settings.pop("model_type", DEFAULT)
    _check_known("model_type", model_type, TOWERS)
    headless = {"siglip_vision_model": {"vision_use_head": False}}
    headless |= {"timm_wrapper": {"do_pooling": False}}
    return AutoConfig.for_model(model_type, **settings | headless.get(model_type, {}))


def tower_defaults(fields: object) -> dict[str, object]:
    """All settings that a tower of the kind of these fields has, with their defaults."""
    kind = (isinstance(fields, dict) and fields.get("model_type")) or DEFAULT
    _check_known("model_type", kind, TOWERS)
    sizes = dict.fromkeys(("hidden_size", "image_size", "patch_size"), 0)
    config = CONFIG_MAPPING[kind]
    named = {name: getattr(config, name, None) for name in config.__annotations__}
    return {"model_type": kind, **(sizes if kind == "timm_wrapper" else {}), **named}


def check_tower(config: PreTrainedConfig) -> None:
    """Raise ValueError where a tower is unknown, could read files or lacks its sizes."""
    _check_known("model_type", config.model_type, TOWERS)
    if config.model_type == "timm_wrapper":
        _check_known("architecture", config.architecture, TIMM_TOWERS)
        for name in config.model_args or {}:
            _check_known("model_args", name, TIMM_ARGUMENTS)
    for name in ("hidden_size", "image_size", "patch_size"):
        size = getattr(config, name, None)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"vision_config.{name}={size}: give one positive whole number.")


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights; ImportError if it is timm's, and timm is not installed."""
    if config.model_type == "timm_wrapper" and not is_timm_available():
        remedy = "pip install 'qvision-lab[photos]'"
        raise ImportError(f"the tower {config.architecture} needs timm: {remedy}.")
    settings = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    return arrange(AutoModel.from_config(config, **settings))


def arrange(tower: PreTrainedModel) -> PreTrainedModel:
    """Order the weights of timm's convolutions as a CPU takes a third of the time for."""
    is_timm = tower.config.model_type == "timm_wrapper"
    return tower.to(memory_format=torch.channels_last) if is_timm else tower


def pixel_statistics(config: PreTrainedConfig) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels, 0 to 1, that a tower's pixels are normalised by."""
    return TIMM_TOWERS.get(getattr(config, "architecture", None)) or TOWERS[config.model_type]


def _check_known(name: str, value: object, known: Iterable[str]) -> None:
    if value not in [*known]:
        raise ValueError(f"vision_config.{name}: {value!r} is not one of {', '.join(known)}.")
