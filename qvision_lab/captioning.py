"""The Captioner: pictures of any kind, one, many or a folder of them -> Caption records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from qvision_lab.caption_file import SeenNames, gather_records, read_records
from qvision_lab.compiled import CompiledQVision
from qvision_lab.generation import Search
from qvision_lab.images import ImageError, Picture, open_image, picture_name, walk_pictures
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.checkpoint import Provenance, load_checkpoint
from qvision_lab.model.processor import QVisionProcessor

READERS = 2  # threads that open pictures while the model works; more stand in its way


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
    skipped: int  # captioned already: by an earlier call, or under the same name
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
        batches = self._caption_batches(items, search, preprocessing, batch_size)
        for _, captions in chain.from_iterable(batches):
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
        `captions` and `scores` too; or `source`, `error` and `settings`. There is one for each
        picture, written batch by batch in the order of `walk_pictures`, however many there are:
        memory stays the same. A later call skips what is captioned, tries again what failed, and
        adds what is new. What is drawn for a picture depends on `seed` and its path inside the
        folder, so other pictures, batches and interruptions change nothing.

        Under `accelerate launch` the processes share the pictures. Each writes a file of its own
        beside `output`, which takes them all in at the end, or when the job is started again.

        Args:
            paths: folders, pictures, URLs; a folder means its files with a picture's suffix. An
                iterator is read as it is needed.
            recursive: take those of its subfolders too.
            how: `batch_size`, `preset`, `preprocessing`, `seed` and settings, as in `caption`.

        Raises:
            ValueError: if there is no picture, or `output` was made with other settings.
        """
        known = not isinstance(paths, Iterator)
        total = sum(1 for _ in walk_pictures(paths, recursive)) if known else None
        found = walk_pictures(paths, recursive)
        items = (_Item(source, source, key) for source, key in found)
        return self._caption_to_file(items, total, output, **how)

    def caption_dataset(
        self, images: Iterable[Identified], output: str | os.PathLike, **how
    ) -> FolderReport:
        """Caption a data set as `caption_folder` does a folder; `source` is the image's id.

        What is drawn for a picture depends on `seed` and this id. Drawn scenes are made one by one.
        """
        items = (
            _Item(partial(getattr, image, "picture"), str(image.image_id), str(image.image_id))
            for image in images
        )
        total = len(images) if isinstance(images, Sized) else None
        return self._caption_to_file(items, total, output, **how)

    def compile(self, batch_size: int = 1, *, length: int = 64, int8: bool = False) -> Captioner:
        """The same captioner with its decoding step compiled for batches of one size.

        Compiling takes `captioner.model.compile_seconds`, a minute or so at the published size.
        Batches of another size are captioned as before; `CompiledQVision` tells the arguments.
        """
        model, origin = CompiledQVision(self.model, batch_size, length, int8), self.provenance
        if int8 and origin:  # its captions are not those of the weights as they were loaded
            origin = replace(origin, dtype="int8")
        return Captioner(model, self.processor, origin)

    def _caption_to_file(
        self,
        items: Iterable[_Item],
        total: int | None,
        output: str | os.PathLike,
        *,
        batch_size: int = 16,
        preset: str | None = None,
        preprocessing: str = "training",
        seed: int = 0,
        **settings,
    ) -> FolderReport:
        search = Search.from_settings(self.model, preset, seed, settings)
        told = self._tell_settings(search, preprocessing)
        everyone = _processes()
        count, index = everyone.num_processes, everyone.process_index
        output = part = Path(output)
        if count > 1:
            part = output.with_name(f"{output.name}.part{index}")
        with everyone.main_process_first():
            if everyone.is_main_process:
                gather_records(output, told, failures=False)
        skipped = captioned = failed = 0
        quiet = total == 1 or not everyone.is_main_process
        progress = tqdm(total=total, unit="picture", disable=quiet)

        def unseen() -> Iterator[_Item]:
            nonlocal skipped
            for item in items:
                if seen.add(item.source):
                    yield item
                else:
                    skipped += 1
                    progress.update()

        with closing(SeenNames()) as seen, open(part, "a", encoding="utf-8") as file, progress:
            for record, _ in read_records(output, told):
                seen.add(record["source"])
            mine = islice(unseen(), index, None, count)
            for batch in self._caption_batches(mine, search, preprocessing, batch_size):
                for item, captions in batch:
                    record = {"source": item.source, **_outcome(captions), "settings": told}
                    file.write(json.dumps(record) + "\n")
                    failed += isinstance(captions, ImageError)
                    captioned += not isinstance(captions, ImageError)
                file.flush()
                progress.update(len(batch) * count)
        counts = gather_object([(captioned, failed)])  # waits for all of them
        if count > 1 and everyone.is_main_process:
            gather_records(output, told, failures=True)
        everyone.wait_for_everyone()
        captioned, failed = map(sum, zip(*counts, strict=True))
        return FolderReport(captioned, skipped, failed, output)

    def _caption_batches(
        self, items: Iterable[_Item], search: Search, preprocessing: str, batch_size: int
    ) -> Iterator[list[tuple[_Item, list[Caption] | ImageError]]]:
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
                yield [
                    (item, next(captions) if isinstance(pixels, Tensor) else pixels)
                    for item, pixels in opened
                ]

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
        found = search.run(model, visual_tokens, [item.key for item, _ in batch])  # [k*B,T] each
        settings = {"preprocessing": preprocessing, **search.describe()}
        captions = []
        for row, (row_ids, row_logprobs) in enumerate(zip(*found, strict=True)):
            generated = self._without_padding(row_ids.tolist())
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
    if device is None and "LOCAL_RANK" in os.environ:  # each process has a device of its own
        device = _processes().device
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


def _processes() -> PartialState:
    """The processes of `accelerate launch`, or this one alone; a slow one is waited for."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=1))
