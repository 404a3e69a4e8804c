"""The Captioner: pictures of any kind, one, many or a folder of them -> Caption records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from qvision_lab.generation import Search
from qvision_lab.images import ImageError, Picture, find_pictures, open_image, picture_name
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.checkpoint import Provenance, load_checkpoint
from qvision_lab.model.processor import QVisionProcessor

READERS = 4  # threads that open pictures while the model works


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
class FolderReport:
    """What `caption_folder` did: numbers of pictures, and where their records are."""

    captioned: int
    skipped: int  # captioned by an earlier call
    failed: int
    output: Path


@dataclass(frozen=True)
class _Item:
    """A picture to caption: what to call it, and what its random draws hang on."""

    picture: Picture | Callable[[], Picture]  # or how to get it, when its turn comes
    source: str
    key: str


class Identified(Protocol):
    """A picture of a data set, such as `data.coco.CaptionedImage`."""

    image_id: int | str
    picture: Picture


@dataclass(eq=False, repr=False)
class Captioner:
    """A model with the preprocessing that matches it; `qvision_lab.load()` makes one."""

    model: QVisionForConditionalGeneration
    processor: QVisionProcessor
    provenance: Provenance | None = None

    def caption(
        self,
        images: Picture | Iterable[Picture],
        *,
        batch_size: int = 16,
        preset: str | None = None,
        preprocessing: str = "training",
        seed: int = 0,
        **settings,
    ) -> Caption | list[Caption] | list[list[Caption]]:
        """Caption one picture or many.

        In float32 the same seed gives the same captions whatever the batch size: what is drawn for
        a picture depends on `seed` and its place in `images` alone. torch's generators stay as
        they are. The model is left in evaluation mode.

        Args:
            images: anything that `open_image` takes, or an iterable of it, read as it is needed.
            preset: a key of `GENERATION_PRESETS`; by default the model's own generation settings.
            preprocessing: "training" (how the model was trained), "model_card" or "clip".
            settings: any setting of transformers' `generate`, on top of the preset. One of sampling
                (`temperature`, `top_k`, `top_p` and their like) turns sampling on, and `num_beams`
                turns it off, unless `do_sample` says otherwise.

        Returns:
            A Caption for one picture, a list for an iterable. With `num_return_sequences=k` greater
            than 1, a list of k stands in place of each Caption, in the order of `generate`.

        Raises:
            ImageError: if a picture cannot be read (`caption_folder` notes it and goes on).
            ValueError: if there is no picture, or a setting does not exist or does not fit.
        """
        single = _is_single(images)
        search = Search.from_settings(self.model, preset, seed, settings)
        items = (
            _Item(picture, picture_name(picture) or f"picture {i}", key=str(i))
            for i, picture in enumerate([images] if single else images)
        )
        results = []
        for _, captions in self._captions(items, search, preprocessing, batch_size):
            if isinstance(captions, ImageError):
                raise captions
            results.append(captions if search.captions_per_image > 1 else captions[0])
        if not results:
            raise ValueError("there is nothing to caption: images is empty; pass at least one.")
        return results[0] if single else results

    def caption_folder(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        output: str | os.PathLike = "captions.jsonl",
        *,
        recursive: bool = False,
        **how,
    ) -> FolderReport:
        """Caption the pictures of folders into a JSON Lines file, going on where it was left.

        A record has `source`, `caption`, `score` and `settings`, and with k > 1 captions a picture
        `captions` and `scores` too; or `source`, `error` and `settings`. Records are written batch
        by batch, in the order of the paths. A later call skips what is captioned, tries again what
        failed, and adds what is new. What is drawn for a picture depends on `seed` and its path
        inside the folder, so other pictures, batches and interruptions change nothing.

        Args:
            paths: folders, pictures, URLs; a folder means its files with a picture's suffix.
            recursive: take those of its subfolders too.
            how: `batch_size`, `preset`, `preprocessing`, `seed` and settings, as in `caption`.

        Raises:
            ValueError: if there is no picture, or `output` was made with other settings.
        """
        found = find_pictures(paths, recursive).items()
        return self._caption_to_file(
            [_Item(source, source, key) for source, key in found], output, **how
        )

    def caption_dataset(
        self, images: Iterable[Identified], output: str | os.PathLike, **how
    ) -> FolderReport:
        """Caption a data set as `caption_folder` does a folder; `source` is the image's id.

        What is drawn for a picture depends on `seed` and this id. Drawn scenes are made one by one.
        """
        items = [
            _Item(partial(getattr, image, "picture"), str(image.image_id), str(image.image_id))
            for image in images
        ]
        return self._caption_to_file(items, output, **how)

    def _caption_to_file(
        self,
        items: list[_Item],
        output: str | os.PathLike,
        *,
        batch_size: int = 16,
        preset: str | None = None,
        preprocessing: str = "training",
        seed: int = 0,
        **settings,
    ) -> FolderReport:
        output = Path(output)
        search = Search.from_settings(self.model, preset, seed, settings)
        told = self._tell_settings(search, preprocessing)
        done = _resume(output, told)
        todo = [item for item in items if item.source not in done]
        failed = 0
        start, quiet = len(items) - len(todo), len(items) == 1
        progress = tqdm(total=len(items), initial=start, unit="picture", disable=quiet)
        with open(output, "a", encoding="utf-8") as file, progress:
            for item, captions in self._captions(todo, search, preprocessing, batch_size):
                record = {"source": item.source, **_outcome(captions), "settings": told}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                failed += isinstance(captions, ImageError)
                progress.update()
        return FolderReport(len(todo) - failed, start, failed, output)

    def _captions(
        self, items: Iterable[_Item], search: Search, preprocessing: str, batch_size: int
    ) -> Iterator[tuple[_Item, list[Caption] | ImageError]]:
        """Caption items in order; one that cannot be read comes back with its error.

        Threads open the pictures of the next batch while the model works on this one.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")

        def read(item: _Item) -> Float[Tensor, "1 3 H W"] | ImageError:
            try:
                picture = item.picture() if callable(item.picture) else item.picture
                image = open_image(picture, item.source)
            except ImageError as error:
                return error
            return self.processor(images=image, preset=preprocessing)["pixel_values"]

        items = iter(items)
        batches = iter(lambda: list(islice(items, batch_size)), [])
        with ThreadPoolExecutor(READERS) as pool:
            reading = (zip(batch, pool.map(read, batch), strict=True) for batch in batches)
            ahead = next(reading, None)
            while ahead:
                now, ahead = ahead, next(reading, None)
                opened = list(now)
                good = [(item, pixels) for item, pixels in opened if isinstance(pixels, Tensor)]
                captions = iter(self._caption_batch(good, search, preprocessing) if good else ())
                for item, pixels in opened:
                    yield item, next(captions) if isinstance(pixels, Tensor) else pixels

    @torch.no_grad()
    def _caption_batch(
        self,
        batch: list[tuple[_Item, Float[Tensor, "1 3 H W"]]],
        search: Search,
        preprocessing: str,
    ) -> list[list[Caption]]:
        model, k = self.model.eval(), search.captions_per_image
        pixel_values = torch.cat([pixels for _, pixels in batch]).to(model.device)  # [B,3,H,W]
        visual_tokens = model.encode(pixel_values)[1].visual_tokens  # [B,1+Q,D]
        ids = search.run(model, visual_tokens, [item.key for item, _ in batch])  # [k*B,T]
        logits = model(ids, visual_tokens=visual_tokens).logits[:, :-1]  # [k*B,T-1,V]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [k*B,T-1]
        settings = {"preprocessing": preprocessing, **search.describe()}
        captions = []
        for row, (row_ids, row_logprobs) in enumerate(zip(ids, logprobs, strict=True)):
            generated = self._without_padding(row_ids[1:].tolist())
            captions.append(
                Caption(
                    text=self.processor.decode(generated),
                    tokens=tuple(self.processor.tokenizer.decode([i]) for i in generated),
                    token_ids=tuple(generated),
                    logprobs=tuple(row_logprobs[: len(generated)].tolist()),
                    score=row_logprobs[: len(generated)].mean().item(),
                    source=batch[row // k][0].source,
                    settings=settings,
                    seed=search.drawn_seed,
                )
            )
        return [captions[i : i + k] for i in range(0, len(captions), k)]

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Up to the end token; where a stopping criterion came first, up to the padding."""
        end, pad = self.model.config.end_token_id, self.model.config.pad_token_id
        if end in ids:
            return ids[: ids.index(end) + 1]
        while len(ids) > 1 and ids[-1] == pad:
            ids = ids[:-1]
        return ids

    def _tell_settings(self, search: Search, preprocessing: str) -> dict:
        """All that a caption depends on beside its picture, for records that outlive the model."""
        told = {"preprocessing": preprocessing, **search.describe()}
        if self.provenance is not None:
            told["model"] = self.provenance.source
            told |= {name: getattr(self.provenance, name) for name in ("revision", "dtype")}
        return told if search.drawn_seed is None else {**told, "seed": search.drawn_seed}


def load(
    source: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Captioner:
    """Load a captioner: a folder, a Hub id, or (None) the one that ships inside the package.

    `qvision_lab.model.checkpoint.load_checkpoint` says more about the arguments and the errors.
    """
    checkpoint = load_checkpoint(source, revision=revision, dtype=dtype, device=device)
    return Captioner(checkpoint.model, checkpoint.processor, checkpoint.provenance)


def _is_single(images: Picture | Iterable[Picture]) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4  # four axes are a batch of pictures
    return isinstance(images, str | bytes) or not isinstance(images, Iterable)


def _outcome(captions: list[Caption] | ImageError) -> dict:
    if isinstance(captions, ImageError):
        return {"error": str(captions)}
    texts = [caption.text for caption in captions]
    scores = [round(caption.score, 4) for caption in captions]  # beyond, batches differ
    several = {"captions": texts, "scores": scores} if len(captions) > 1 else {}
    return {"caption": texts[0], "score": scores[0], **several}


def _resume(output: Path, settings: dict) -> set[str]:
    """Sources that are captioned already; their records stay, failures and torn lines go."""
    if not output.exists():
        return set()
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            source, earlier = record["source"], record["settings"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # empty, or torn by an interruption
                break
            raise ValueError(
                f"line {number} of {output} is no caption record; choose another output."
            ) from error
        changed = [
            f"{name} was {earlier.get(name)!r}, now {settings.get(name)!r}"
            for name in sorted(settings.keys() | earlier.keys())
            if settings.get(name) != earlier.get(name)
        ]
        if changed:
            raise ValueError(
                f"{output} was made with other settings ({'; '.join(changed)}): choose another "
                "output, or delete this one to caption everything anew."
            )
        if "caption" in record:
            kept[source] = line
    rewritten = output.with_name(output.name + ".partial")
    rewritten.write_text("".join(f"{line}\n" for line in kept.values()), encoding="utf-8")
    rewritten.replace(output)
    return set(kept)
