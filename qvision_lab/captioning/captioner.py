"""The Captioner: pictures of any kind, one, many or a folder of them -> Caption records."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from qvision_lab.captioning.captions import Batch, Caption, Item, outcome
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.decoding_step import Int8Decoder, copy_sharing_weights
from qvision_lab.captioning.generation import Search
from qvision_lab.captioning.images import ImageError, Picture, picture_name, walk_pictures
from qvision_lab.captioning.reading import Read, Reader, read_with_processes, read_with_threads
from qvision_lab.captioning.records import SeenNames, gather_records, read_records
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.loading.checkpoint import Provenance, load_checkpoint
from qvision_lab.model.processor import QVisionProcessor, image_preset

BATCH_SIZES = {"cpu": 16, "cuda": 256}  # where none is asked for; on CUDA, what fills a card
MANY = 512  # pictures in files, from which processes read them for a GPU


@dataclass(frozen=True)
class FolderReport:
    """What `caption_folder` did: numbers of pictures, and where their records are."""

    captioned: int
    skipped: int  # captioned already: by an earlier call, or under the same name
    failed: int
    output: Path


class Identified(Protocol):
    """A picture of a data set, such as `data.coco.CaptionedImage`."""

    image_id: int | str
    picture: Picture


@dataclass(eq=False, repr=False)
class Captioner:
    """A model with the preprocessing that matches it; `qvision_lab.load()` makes one.

    Attributes:
        decoding: how captions are made: compiled by `compile`, and on CUDA captured in graphs at
            the first batch of a size.
    """

    model: QVisionForConditionalGeneration
    processor: QVisionProcessor
    provenance: Provenance | None = None
    decoding: FastDecoding = field(init=False)

    def __post_init__(self):
        self.decoding = FastDecoding(self.model)

    def caption(
        self,
        images: Picture | Iterable[Picture],
        *,
        batch_size: int | None = None,
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
            batch_size: pictures at once; None: 16, or 256 on CUDA, halved where its memory is less.
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
            Item(picture, picture_name(picture) or f"picture {i}", key=str(i))
            for i, picture in enumerate([images] if single else images)
        )
        results = []
        with closing(self._caption_batches(items, search, preprocessing, batch_size)) as batches:
            for captions in chain.from_iterable(batch.captions() for batch in batches):
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
        items = (Item(source, source, key) for source, key in found)
        return self._caption_to_file(items, total, output, **how)

    def caption_dataset(
        self, images: Iterable[Identified], output: str | os.PathLike, **how
    ) -> FolderReport:
        """Caption a data set as `caption_folder` does a folder; `source` is the image's id.

        What is drawn for a picture depends on `seed` and this id. Drawn scenes are made one by one.
        """
        items = (
            Item(partial(getattr, image, "picture"), str(image.image_id), str(image.image_id))
            for image in images
        )
        total = len(images) if isinstance(images, Sized) else None
        return self._caption_to_file(items, total, output, **how)

    def compile(self, batch_size: int = 1, *, length: int = 32, int8: bool = False) -> Captioner:
        """The same captioner with its decoding step compiled for batches of one size.

        Compiling takes `captioner.decoding.compile_seconds`, half a minute or so at the published
        size. Batches of another size, and captions of more than `length` tokens, are made as
        before; all settings work as before.

        Args:
            batch_size: captions at once; smaller batches are padded up to it, down to its half.
            length: tokens of a caption that there is room for.
            int8: round the decoder's matrices to 8 bits, on a CPU. A token then reads half of what
                it reads in bfloat16, and words may change.

        Raises:
            ValueError: for a variant of the architecture that the step does not know, and for int8
                on another device.
        """
        model, origin = self.model, self.provenance
        if int8 and model.device.type != "cpu":
            raise ValueError(f"int8=True gains nothing on {model.device}: use it on a CPU.")
        if int8:
            model = copy_sharing_weights(model)
            model.decoder = Int8Decoder(model.decoder)
            origin = origin and replace(origin, dtype="int8")  # its captions may be others
        captioner = Captioner(model.eval(), self.processor, origin)
        captioner.decoding = FastDecoding(model, batch_size, length)
        return captioner

    def _caption_to_file(
        self,
        items: Iterable[Item],
        total: int | None,
        output: str | os.PathLike,
        *,
        batch_size: int | None = None,
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

        def unseen() -> Iterator[Item]:
            nonlocal skipped
            for item in items:
                if seen.add(item.source):
                    yield item
                else:
                    skipped += 1
                    progress.update()

        def write(batch: Batch) -> None:
            nonlocal captioned, failed
            for item, captions in zip(batch.items, batch.captions(), strict=True):
                record = {"source": item.source, **outcome(captions), "settings": told}
                file.write(json.dumps(record) + "\n")
                failed += isinstance(captions, ImageError)
                captioned += not isinstance(captions, ImageError)
            file.flush()
            progress.update(len(batch.items) * count)

        with (
            closing(SeenNames()) as seen,
            open(part, "a", encoding="utf-8") as file,
            progress,
            ThreadPoolExecutor(1) as writer,  # waited for, also where an error ends the job
        ):
            for record, _ in read_records(output, told):
                seen.add(record["source"])
            mine = islice(unseen(), index, None, count)
            workers = self._reading_processes(total, count)
            how = search, preprocessing, batch_size, workers
            written: Future | None = None
            with closing(self._caption_batches(mine, *how)) as batches:
                for batch in batches:
                    if written is not None:
                        written.result()
                    written = writer.submit(write, batch)
            if written is not None:
                written.result()
        counts = gather_object([(captioned, failed)])  # waits for all of them
        if count > 1 and everyone.is_main_process:
            gather_records(output, told, failures=True)
        everyone.wait_for_everyone()
        captioned, failed = map(sum, zip(*counts, strict=True))
        return FolderReport(captioned, skipped, failed, output)

    def _reading_processes(self, total: int | None, sharing: int) -> int:
        """How many read pictures: for a GPU and many of them, all cores but one."""
        if self.model.device.type != "cuda" or (total is not None and total < MANY):
            return 0
        return max(1, os.cpu_count() // sharing - 1)

    def _caption_batches(
        self,
        items: Iterable[Item],
        search: Search,
        preprocessing: str,
        batch_size: int | None,
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Caption items in order; one that cannot be read comes back with its error.

        Threads, or processes, read the pictures of the next batches while the model works.
        """
        if batch_size is None:
            batch_size = BATCH_SIZES.get(self.model.device.type, 16)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        image_preset(preprocessing, self.processor.image_size)  # refused before anything is read
        reader = Reader(self.processor, preprocessing, self.model.device)
        reading = (
            read_with_processes(items, reader, batch_size, workers)
            if workers
            else read_with_threads(items, reader, batch_size)
        )
        with closing(reading):  # now: a pool that a garbage collection closes may deadlock
            for read in reading:
                while read.items:  # at once, unless memory ran out
                    now, rest = read.split(batch_size)
                    found = None
                    try:
                        found = self._caption_batch(now, search, preprocessing)
                    except torch.OutOfMemoryError:
                        if len(now.items) == 1:
                            raise
                    if found is not None:
                        yield found
                        read = rest
                    else:  # out here, since the error holds on to what was allocated
                        batch_size = len(now.items) // 2
                        self.decoding.release()
                        warnings.warn(
                            f"{len(now.items)} pictures at once need more memory than "
                            f"{self.model.device} has: going on with batch_size={batch_size}.",
                            stacklevel=2,
                        )

    @torch.no_grad()
    def _caption_batch(self, read: Read, search: Search, preprocessing: str) -> Batch:
        if self.decoding.model is not self.model:  # it was given another
            self.decoding = FastDecoding(self.model)
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        ids = logprobs = torch.zeros(0, 0)
        good = [item for item, error in zip(read.items, read.errors, strict=True) if not error]
        if good:
            pixels = self.processor.normalise(read.pixels.to(self.model.device), preprocessing)
            ids, logprobs = search.run(self.decoding, pixels, [item.key for item in good])
        settings = {"preprocessing": preprocessing, **search.describe()}
        return Batch(
            self.processor,
            self.model.config,
            read.items,
            read.errors,
            ids,
            logprobs,
            search,
            settings,
        )

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

    `model.loading.checkpoint.load_checkpoint` says more about the arguments and the errors.
    """
    if device is None and "LOCAL_RANK" in os.environ:  # each process has a device of its own
        device = _processes().device
    checkpoint = load_checkpoint(source, revision=revision, dtype=dtype, device=device)
    return Captioner(checkpoint.model, checkpoint.processor, checkpoint.provenance)


def _is_single(images: Picture | Iterable[Picture]) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4  # four axes are a batch of pictures
    return isinstance(images, str | bytes) or not isinstance(images, Iterable)


def _processes() -> PartialState:
    """The processes of `accelerate launch`, or this one alone; a slow one is waited for."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=1))
