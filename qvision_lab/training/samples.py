"""Training samples: an image (cached states or pixels) with some of its captions, and batches."""

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qvision_lab.captioning.images import open_image
from qvision_lab.data.coco import CaptionDataset, CaptionedImage
from qvision_lab.model.captioner import IGNORED_LABEL
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.training.features import CachedFeatures

PACKED_LENGTHS = 8  # packed captions fill rows whose length is a multiple of it


@dataclass
class CaptionSamples(Dataset):
    """One sample per image, with the same number of captions.

    Of more, and of an image's cached views, each epoch draws with the seed; of fewer captions, rows
    without a target are added, so that all captions weigh the same.
    """

    images: CaptionDataset
    processor: QVisionProcessor
    captions_per_image: int
    max_tokens: int
    seed: int
    features: CachedFeatures | None = None  # without them samples have pixels
    epoch: int = 0
    encoded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor | list[Tensor]]:
        image = self.images[index]
        draw = np.random.default_rng((self.seed, self.epoch, index))
        chosen = draw.permutation(image.references)[: self.captions_per_image].tolist()
        captions = [self._encode(caption) for caption in chosen]
        captions += [captions[0][:1]] * (self.captions_per_image - len(captions))
        return {**self.image_inputs(image, draw), "captions": captions}

    def image_inputs(self, image: CaptionedImage, draw: np.random.Generator) -> dict[str, Tensor]:
        """What the model takes of an image: `vision_states` [P,C] or `pixel_values` [3,H,W]."""
        if self.features is not None:
            view = draw.integers(len(self.features.places[image.image_id]))
            return {"vision_states": self.features.view(image.image_id, view)}
        return {"pixel_values": self.processor(images=open_image(image.picture)).pixel_values[0]}

    def lengths(self) -> list[int]:
        """Numbers of tokens of the first thousand captions."""
        captions = (caption for image in self.images for caption in image.references)
        return [len(self._encode(caption)) for caption in islice(captions, 1000)]

    def _encode(self, caption: str) -> Tensor:
        if caption not in self.encoded:
            self.encoded[caption] = self.processor.encode(caption, self.max_tokens)
        return self.encoded[caption]


@dataclass(frozen=True)
class CaptionCollator:
    """Stacks images and, in the same order, their captions, padded on the right.

    A packed batch also says where the words are, so that a step can leave the pads out. Its sizes
    are rounded up, since each of them is captured as a CUDA graph of its own.
    """

    pad_token_id: int
    packed: bool = False

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        rows = [caption for sample in samples for caption in sample["captions"]]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)  # [R,T]
        if self.packed:  # at least one pad at the end of each row
            missing = PACKED_LENGTHS - input_ids.shape[1] % PACKED_LENGTHS
            input_ids = nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id)
        labels = input_ids.masked_fill(input_ids == self.pad_token_id, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # <START> is never a target, so it must not count as one
        names = samples[0].keys() - {"captions"}  # vision_states [B,P,C] or pixel_values [B,3,H,W]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        batch |= {"input_ids": input_ids, "labels": labels}
        return batch | ({"places": self.places(input_ids)} if self.packed else {})

    def places(self, input_ids: Int[Tensor, "R T"]) -> Int[Tensor, " K"]:
        """Where words are in the flattened batch; at least one more, all of them the last pad."""
        places = (input_ids != self.pad_token_id).flatten().nonzero()[:, 0]
        cells = input_ids.numel()
        multiple = 64 * max(1, cells // 2048)
        return nn.functional.pad(places, (0, multiple - len(places) % multiple), value=cells - 1)
