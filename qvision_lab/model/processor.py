"""Preprocessing: images -> pixel values, and text <-> ids."""

from collections.abc import Sequence
from functools import partial
from os import PathLike
from os.path import lexists
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.towers import pixel_statistics

IMAGE_PRESETS = ("training", "model_card", "clip")


def image_preset(name: str, side: int) -> dict:
    """Arguments of CLIP's image processor for images of `side` x `side` pixels.

    `training` stretches (bilinear, antialiased) and normalises with the tower's mean and deviation,
    as in the training of the published model. `model_card` does the same without normalising, as
    its example does by mistake. `clip` resizes the short side (bicubic) and crops the centre.
    """
    square = {"height": side, "width": side}
    stretch = {"size": square, "resample": Resampling.BILINEAR, "do_center_crop": False}
    crop = {"resample": Resampling.BICUBIC, "do_center_crop": True, "crop_size": square}
    presets = {
        "training": {**stretch, "do_normalize": True},
        "model_card": {**stretch, "do_normalize": False},
        "clip": {**crop, "size": {"shortest_edge": side}, "do_normalize": True},
    }
    if name not in presets:
        raise ValueError(f"no image preset {name!r}; choose one of {', '.join(IMAGE_PRESETS)}.")
    return presets[name]


class QVisionProcessor(ProcessorMixin):
    """Preprocessing that matches one model; without a tokenizer, text raises a ValueError."""

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = None

    @classmethod
    def from_config(
        cls, config: QVisionConfig, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> "QVisionProcessor":
        """The preprocessing that a model of this configuration was trained with."""
        vision = config.vision_config
        mean, deviation = pixel_statistics(vision)
        settings = image_preset("training", vision.image_size) | {"patch_size": vision.patch_size}
        images = CLIPImageProcessorPil(**settings, image_mean=mean, image_std=deviation)
        processor = cls(images, tokenizer)
        processor.check_fits(config)
        return processor

    @classmethod
    def from_pretrained(cls, source: str | PathLike, **kwargs) -> "QVisionProcessor":
        """Read a folder or Hub id, and its tokenizer if it has one; `ql.load` checks more."""
        kwargs["trust_remote_code"] = False  # no code of a checkpoint runs, whatever is asked
        image_processor = CLIPImageProcessorPil.from_pretrained(source, **kwargs)
        has_tokenizer = not Path(source).is_dir() or holds_tokenizer(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs) if has_tokenizer else None
        return cls(image_processor, tokenizer)

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs):
        """Write `preprocessor_config.json` and the tokenizer's files, as transformers does."""
        for part in (self.image_processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check_fits(self, config: QVisionConfig) -> None:
        """Raise ValueError unless image size, vocabulary and special tokens are the model's."""
        pairs = {
            "image_size": (self.image_size, config.vision_config.image_size),
            "patch_size": (self.image_processor.patch_size, config.vision_config.patch_size),
        }
        if (tokenizer := self.tokenizer) is not None:
            pairs |= {
                "vocab_size": (len(tokenizer), config.vocab_size),
                "start_token_id": (tokenizer.bos_token_id, config.start_token_id),
                "end_token_id": (tokenizer.eos_token_id, config.end_token_id),
                "pad_token_id": (tokenizer.pad_token_id, config.pad_token_id),
            }
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ValueError(
                    f"the processor has {name}={ours}, but the model {theirs}: take the tokenizer "
                    "and preprocessor files that were saved with the model."
                )

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        preset: str = "training",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """PIL images -> `pixel_values` [B,3,H,W]; captions -> `input_ids`, `attention_mask` [R,T].

        Start and end tokens are added, padding on the right; `preset` is one of `IMAGE_PRESETS`.
        """
        if images is None and text is None:
            raise ValueError("pass images, text, or both; got neither.")
        features = BatchFeature()
        if images is not None:
            images = [images] if isinstance(images, Image.Image) else list(images)
            if foreign := {type(x).__name__ for x in images if not isinstance(x, Image.Image)}:
                raise TypeError(f"pass PIL images, not {min(foreign)}; Captioner opens everything.")
            resized = np.stack([self.resize(image, preset) for image in images])  # [B,H,W,3]
            features["pixel_values"] = self.normalise(torch.from_numpy(resized), preset)
        if text is not None:
            captions = [text] if isinstance(text, str) else text
            rows = {"input_ids": [self.encode(caption) for caption in captions]}
            features |= self.tokenizer.pad(rows, padding_side="right")
        return features.convert_to_tensors(return_tensors)

    def encode(self, caption: str, max_length: int | None = None) -> Int[Tensor, " T"]:
        """Ids of "<START> caption <END>", the text of training, cut to `max_length` before its end.

        Special tokens that are spelled out inside a caption are read as plain characters.
        """
        tokenizer = self._require_tokenizer()
        words = tokenizer(f" {caption} ", add_special_tokens=False, split_special_tokens=True)
        kept = words["input_ids"][: None if max_length is None else max(max_length - 2, 0)]
        return torch.tensor([tokenizer.bos_token_id, *kept, tokenizer.eos_token_id])

    def decode(self, token_ids: Tensor | Sequence[int]) -> str:
        """Text of one caption [T], without special tokens and surrounding space."""
        return self._require_tokenizer().decode(token_ids, skip_special_tokens=True).strip()

    @property
    def image_size(self) -> int:
        """Side of the model's square input, in pixels."""
        return self.image_processor.size["height"]

    def resize(self, image: Image.Image, preset: str) -> UInt8[np.ndarray, "H W 3"]:
        """The model's square input, before normalisation."""
        side, settings = self.image_size, image_preset(preset, self.image_size)
        size = np.array([side, side])
        if settings["do_center_crop"]:  # of a long strip only the middle: resized whole, it is huge
            margin = (np.array(image.size) - 4 * min(image.size)).clip(0) // 2
            image = image.crop((*margin, *(image.size - margin)))
            size = size * image.size // min(image.size)  # the short side becomes `side`
        image = image.convert("RGB").resize(tuple(size.tolist()), settings["resample"])
        left, top = (size - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)))

    def normalise(self, pixels: UInt8[Tensor, "B H W 3"], preset: str) -> Float[Tensor, "B 3 H W"]:
        """Pixel values of the output of `resize`: on any device transformers' own, bit for bit."""
        mean, deviation = self.image_processor.image_mean, self.image_processor.image_std
        if pixels.is_cpu:  # by numpy: torch's threads would compete with the model
            values = pixels.numpy().transpose(0, 3, 1, 2).astype(np.float32, order="C")
            as_array = np.float32
        else:
            values = pixels.permute(0, 3, 1, 2).float().contiguous()
            as_array = partial(torch.tensor, dtype=torch.float32, device=pixels.device)
        values /= as_array(255)
        if image_preset(preset, self.image_size)["do_normalize"]:
            values -= as_array(mean)[:, None, None]
            values /= as_array(deviation)[:, None, None]
        return torch.from_numpy(values) if pixels.is_cpu else values

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(
                "there is no tokenizer, so the model works on token ids only; set "
                "processor.tokenizer to the one that it was trained with."
            )
        return self.tokenizer


def holds_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has a tokenizer."""
    return any(lexists(folder / name) for name in ("tokenizer.json", "vocab.json"))


AutoProcessor.register(QVisionConfig, QVisionProcessor)
