"""Captions and what they are made of: a picture to caption, and what was found for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from jaxtyping import Float, Int
from torch import Tensor

from qvision_lab.captioning.generation import Search
from qvision_lab.captioning.images import ImageError, Picture
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import QVisionProcessor


@dataclass(frozen=True)
class Caption:
    """A caption with what the model thought of it."""

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]  # what was generated: without <START>, with <END> where reached
    logprobs: tuple[float, ...]  # of each token, before penalties and temperature; at most 0
    score: float  # their mean
    source: str  # path or URL, else "picture 3" by its place in the call
    settings: dict  # of the search and the preprocessing, as far as they are not the plain ones
    seed: int | None  # None where nothing was drawn


@dataclass(frozen=True)
class Item:
    """A picture to caption: what to call it, and what its random draws depend on."""

    picture: Picture | Callable[[], Picture]  # or how to get it, when its turn comes
    source: str
    key: str


@dataclass(eq=False)
class Batch:
    """What was found for a batch of pictures, to be made into records when there is time."""

    processor: QVisionProcessor
    config: QVisionConfig
    items: list[Item]
    errors: list[ImageError | None]  # of the items
    ids: Int[Tensor, "R T"]  # R = k captions of each readable picture
    logprobs: Float[Tensor, "R T"]
    search: Search
    settings: dict

    def captions(self) -> Iterator[list[Caption] | ImageError]:
        """The captions of each picture, or what is wrong with it."""
        rows = iter(zip(self.ids.tolist(), self.logprobs, strict=True))
        for item, error in zip(self.items, self.errors, strict=True):
            several = islice(rows, self.search.captions_per_image)
            yield error or [self._caption(item, *row) for row in several]

    def _caption(self, item: Item, ids: list[int], logprobs: Float[Tensor, " T"]) -> Caption:
        tokenizer, generated = self.processor.tokenizer, self._without_padding(ids)
        logprobs = logprobs[: len(generated)]
        return Caption(
            text=self.processor.decode(generated),
            tokens=tuple(tokenizer.decode([token]) for token in generated),
            token_ids=tuple(generated),
            logprobs=tuple(logprobs.tolist()),
            score=logprobs.mean().item(),
            source=item.source,
            settings=self.settings,
            seed=self.search.drawn_seed,
        )

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Up to the end token; where a stopping criterion came first, up to the padding."""
        config = self.config
        if config.end_token_id in ids:
            return ids[: ids.index(config.end_token_id) + 1]
        while len(ids) > 1 and ids[-1] == config.pad_token_id:
            ids = ids[:-1]
        return ids


def outcome(captions: list[Caption] | ImageError) -> dict:
    """What a record says of a picture."""
    if isinstance(captions, ImageError):
        return {"error": str(captions)}
    texts = [caption.text for caption in captions]
    scores = [round(caption.score, 4) for caption in captions]  # beyond, batches differ
    several = {"captions": texts, "scores": scores} if len(captions) > 1 else {}
    return {"caption": texts[0], "score": scores[0], **several}
