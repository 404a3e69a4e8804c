"""The Captioner: images of any kind, one, many or a folder of them -> Caption records."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from qvision_lab.captioning import reading, records
from qvision_lab.captioning.compiled import FastDecoding
from qvision_lab.captioning.decoding_step import Int8Decoder, copy_sharing_weights
from qvision_lab.captioning.generation import Search, check_number, without_padding
from qvision_lab.captioning.images import (
    ImageError,
    Picture,
    file_identity,
    open_image,
    picture_name,
    walk_pictures,
)
from qvision_lab.captioning.reading import Batch, Item
from qvision_lab.captioning.records import Caption, FolderReport, digest
from qvision_lab.data.atomic import locked, output_file
from qvision_lab.data.coco import CaptionedImage
from qvision_lab.model.familiarity import exceeds_chance
from qvision_lab.model.loading.checkpoint import Checkpoint, load_checkpoint
from qvision_lab.model.loading.storage import SHIPPED
from qvision_lab.model.parameters import count_parameters, fingerprint_weights

BATCH_SIZES = {"cpu": 16, "cuda": 256}  # defaults; on CUDA, what fills a card
Captioned: TypeAlias = tuple[Item, list[Caption] | ImageError]


@dataclass(eq=False, repr=False)
class Captioner(Checkpoint):
    """A model with the preprocessing that matches it; `qvision_lab.load()` makes one."""

    decoding: FastDecoding = field(init=False)  # on CUDA, captures a graph for each batch size

    def __post_init__(self):
        self.decoding = FastDecoding(self.model)

    def __repr__(self) -> str:
        origin = self.provenance.source if self.provenance else "a model in memory"
        size = f"{count_parameters(self.model):,} parameters"
        return f"Captioner of {origin}: {size}, {self.model.dtype}, {self.model.device}"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

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
        """Caption one image or many, and leave the model in evaluation mode.

        Sampling is batch-invariant: draws for an image depend on `seed` and its index in `images`
        alone, so in float32 captions do not depend on the batch size; torch's own are unused.

        Args:
            images: anything that `open_image` takes, or an iterable of it, read as it is needed.
            batch_size: None: 16, or 256 on CUDA, halved when out of memory.
            preset: a key of `GENERATION_PRESETS`; by default the model's own generation settings.
            preprocessing: "training" (how the model was trained), "model_card" or "clip".
            settings: any setting of transformers' `generate`, on top of the preset. One of sampling
                (`temperature`, `top_k`, `top_p`, ...) turns sampling on, and the model's own beams
                off; `num_beams` turns sampling off, unless `do_sample` says otherwise.

        Returns a Caption for one image, a list for an iterable; with `num_return_sequences=k` > 1 a
        list of k in place of each Caption, in the order of `generate`. ImageError for an image that
        cannot be read; ValueError for no image at all, and a setting that does not exist or fit.
        """
        how = {"preset": preset, "preprocessing": preprocessing, "seed": seed}
        search = Search.from_settings(self.model, **how, **settings)
        single, results, unfamiliar = _is_single(images), [], 0
        kept = single or isinstance(images, Sequence | np.ndarray | Tensor)

        def item(index: int, picture: Picture) -> Item:
            name = picture_name(picture) or f"picture {index}"
            if not (kept or isinstance(picture, str | os.PathLike | bytes)):
                picture = open_image(picture, name)  # now: an iterator may overwrite it
            return Item(picture, name, key=str(index))

        items = (item(*pair) for pair in enumerate([images] if single else images))
        with closing(self._caption_batches(items, search, batch_size)) as batches:
            for _, captions in chain.from_iterable(batches):
                if isinstance(captions, ImageError):
                    raise captions
                results.append(captions if len(captions) > 1 else captions[0])
                unfamiliar += captions[0].familiar is False
        if not results:
            raise ValueError("there is nothing to caption: images is empty; pass at least one.")
        self._warn_of_unfamiliar(unfamiliar, len(results))
        return results[0] if single else results

    def caption_folder(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        output: str | os.PathLike = "captions.jsonl",
        *,
        recursive: bool = False,
        **how,
    ) -> FolderReport:
        """Caption the images of folders into a JSON Lines file; a later call resumes.

        Each image has a record: `source`, `image` (size and time of its file), `caption`, `score`
        and `settings`, with k > 1 captions `captions` and `scores` too; or `error` in their place.
        They are written batch by batch in the order of `walk_pictures`. Images are streamed: memory
        holds a few batches, and some 250 bytes for each name. Resuming skips what is captioned,
        retries what failed, and captions again what has changed. Draws for an image depend on
        `seed` and its path inside the folder, so that other images and interruptions change none.

        Under `accelerate launch` the processes share the images. Each writes a separate file
        next to `output`; they are merged into it at the end, or when the job is started again.

        Args:
            paths: folders (of which files with an image's suffix are taken), images, URLs; an
                iterator is read as it is needed.
            how: `batch_size`, `preset`, `preprocessing`, `seed` and settings, as in `caption`.

        ValueError if there is no image, or `output` is no regular file, is being written by another
        command, or was made with other settings or weights.
        """
        known = not isinstance(paths, Iterator)
        total = sum(1 for _ in walk_pictures(paths, recursive)) if known else None
        found = walk_pictures(paths, recursive)
        items = (Item(path, path, name, file_identity(path)) for path, name in found)
        return self._caption_to_file(items, total, output, **how)

    def caption_dataset(
        self, images: Iterable[CaptionedImage], output: str | os.PathLike, **how
    ) -> FolderReport:
        """Caption a data set as `caption_folder` does a folder, with its ids as names."""

        def item(image: CaptionedImage) -> Item:
            name, file = str(image.image_id), image.image
            content = file_identity(file) if file else image.drawing.name
            return Item(partial(getattr, image, "picture"), name, name, content)

        total = len(images) if isinstance(images, Sized) else None
        return self._caption_to_file(map(item, images), total, output, **how)

    def compile(self, batch_size: int = 1, *, length: int = 32, int8: bool = False) -> "Captioner":
        """A captioner of the same model whose decoding step is compiled for one batch size.

        Compiling takes `captioner.decoding.compile_seconds`, about half a minute at the published
        size. Other batch sizes, and captions of more than `length` tokens, are decoded uncompiled.

        Args:
            batch_size: captions per batch, each beam one; more than half of it are padded.
            int8: round the decoder to 8 bits, on a CPU: half of bfloat16; captions may change.

        ValueError for an unsupported variant of the architecture, and int8 on a GPU.
        """
        model, origin = self.model, self.provenance
        if int8:
            if model.device.type != "cpu":
                raise ValueError(f"int8=True gains nothing on {model.device}: use it on a CPU.")
            model = copy_sharing_weights(model)
            model.decoder = Int8Decoder(model.decoder)
            origin = origin and replace(origin, dtype="int8")  # captions may differ
        captioner = replace(self, model=model.eval(), provenance=origin)
        captioner.decoding = FastDecoding(model, batch_size, length)
        return captioner

    def _caption_to_file(
        self, items: Iterable[Item], total: int | None, output: str | os.PathLike, **how
    ) -> FolderReport:
        path = output_file(output)
        with locked(path):
            return replace(self._write_records(items, total, path, **how), output=Path(output))

    def _write_records(
        self,
        items: Iterable[Item],
        total: int | None,
        output: Path,
        *,
        batch_size: int | None = None,
        **settings,
    ) -> FolderReport:
        search = Search.from_settings(self.model, **settings)
        recorded = search.describe()  # and all else that a caption depends on, but its image
        recorded["weights"] = fingerprint_weights(self.model)
        if (origin := self.provenance) is not None:
            recorded |= {"model": origin.source, "revision": origin.revision, "dtype": origin.dtype}
        if search.seed is not None:
            recorded["seed"] = search.seed
        processes = _processes()
        count, index = processes.num_processes, processes.process_index
        part = output.with_name(f"{output.name}.part{index}") if count > 1 else output
        with processes.main_process_first():
            if processes.is_main_process:
                records.gather_records(output, recorded, keep_failures=False)
        old = (record for record, _ in records.read_records(output, recorded))
        known = {digest(f"{record['source']}\0{record.get('image')}") for record in old}
        known_before = len(known)
        counts, quiet = Counter(), total == 1 or index > 0
        progress = tqdm(total=total, unit="picture", disable=quiet)

        def new_items() -> Iterator[Item]:
            for item in items:
                if (name := digest(f"{item.source}\0{item.content}")) not in known:
                    known.add(name)
                    yield item
                else:
                    counts["skipped"] += 1
                    progress.update()

        def write(batch: Iterable[Captioned]) -> None:
            for item, captions in batch:
                found = records.make_record(captions)
                record = {"source": item.source, "image": item.content, **found}
                record["settings"] = recorded
                file.write(json.dumps(record) + "\n")
                counts["failed" if isinstance(captions, ImageError) else "captioned"] += 1
                counts["unfamiliar"] += not record.get("familiar", True)
                progress.update(count)
            file.flush()

        with (
            open(part, "a", encoding="utf-8") as file,
            progress,
            ThreadPoolExecutor(1) as writer,  # finishes its batch, also where an error ends the job
        ):
            mine = islice(new_items(), index, None, count)
            workers = reading.count_workers(self.model.device, total, count)
            written = writer.submit(write, ())
            with closing(self._caption_batches(mine, search, batch_size, workers)) as batches:
                for batch in batches:
                    written.result()
                    written = writer.submit(write, batch)
            written.result()
        sums = sum(gather_object([counts]), Counter())  # waits for all processes
        captioned, failed = sums["captioned"], sums["failed"]
        added_to = known_before and captioned + failed  # it may hold an image's older record
        if (count > 1 or added_to) and processes.is_main_process:
            records.gather_records(output, recorded, keep_failures=True)
        processes.wait_for_everyone()
        self._warn_of_unfamiliar(sums["unfamiliar"] * processes.is_main_process, captioned)
        more = recorded["weights"], sums["unfamiliar"]
        return FolderReport(captioned, counts["skipped"], failed, output, *more)

    def _warn_of_unfamiliar(self, count: int, total: int) -> None:
        if exceeds_chance(count, total):
            name = self.provenance.source if self.provenance else "the model"
            hints = [f" For {SHIPPED[n]}: ql.load({n!r})." for n in SHIPPED if n != name]
            warnings.warn(
                f"{count:,} of {total:,} pictures are unlike those that {name} learned from: its "
                f"captions of them mean little.{hints[0] if name in SHIPPED else ''}",
                stacklevel=3,
            )

    def _caption_batches(
        self, items: Iterable[Item], search: Search, batch_size: int | None, workers: int = 0
    ) -> Iterator[Iterator[Captioned]]:
        """Caption items in order, while threads, or processes, read the next batches."""
        if batch_size is None:
            batch_size = BATCH_SIZES.get(self.model.device.type, 16)
        batch_size = check_number("batch_size", batch_size)
        reader = reading.Reader(self.processor, search.preprocessing, self.model.device)
        read = reading.read_batches(items, reader, batch_size, workers)
        with closing(read):  # not by garbage collection, where a pool may deadlock
            for batch in read:
                while batch.items:  # once, unless memory runs out
                    now, rest = batch.split(batch_size)
                    try:
                        captioned = self._caption_batch(now, search)
                    except torch.OutOfMemoryError:
                        if len(now.items) == 1:
                            raise
                    else:
                        yield captioned
                        batch = rest
                        continue
                    # Out here, since the error holds on to what was allocated.
                    batch_size = len(now.items) // 2
                    self.decoding.release()
                    warnings.warn(
                        f"{len(now.items)} pictures in a batch need more memory than "
                        f"{self.model.device} has: continuing with batch_size={batch_size}.",
                        stacklevel=2,
                    )

    @torch.no_grad()
    def _caption_batch(self, batch: Batch, search: Search) -> Iterator[Captioned]:
        """Generate the captions of a batch; they are decoded to text where they are iterated."""
        if self.decoding.model is not self.model:  # `model` was replaced
            self.decoding = FastDecoding(self.model)
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        rows, familiar = iter(()), []
        if keys := [item.key for item, error in batch.items if not error]:
            pixels = batch.pixels.to(self.model.device)
            pixels = self.processor.normalise(pixels, search.preprocessing)
            image = {"pixel_values": pixels}
            if self.familiarity is not None:
                image = {"vision_states": self.model.vision.encode(pixels)}  # [B,P,C]
                familiar = self.familiarity.holds(image["vision_states"].mean(1)).tolist()
            kept = self.confidence and self.confidence.tokens
            rows = zip(*search.run(self.decoding, keys, kept, **image), strict=True)
        return self._make_captions(batch, search, iter(familiar), rows)

    def _make_captions(
        self, batch: Batch, search: Search, familiar: Iterator[bool], rows: Iterator[tuple]
    ) -> Iterator[Captioned]:
        """Captions from the rows of `Search.run` for readable images, and the others' errors."""
        settings, k = search.describe(), search.config.num_return_sequences
        judge = self.confidence.judge if self.confidence else lambda *_: (None, None)
        for item, error in batch.items:
            captions, is_familiar = [], None if error else next(familiar, None)
            for ids, scores, logits in islice(rows, 0 if error else k):
                row = without_padding(ids.tolist(), self.model.config)
                scores = scores[: len(row)]
                claims, confidence = judge(row, logits[: len(row)])
                caption = Caption(
                    text=self.processor.decode(row),
                    tokens=tuple(self.processor.tokenizer.decode([token]) for token in row),
                    token_ids=tuple(row),
                    logprobs=tuple(scores.tolist()),
                    score=scores.mean().item(),
                    source=item.source,
                    settings=settings,
                    seed=search.seed,
                    familiar=is_familiar,
                    claims=claims,
                    confidence=confidence,
                )
                captions.append(caption)
            yield item, error or captions


def load(
    source: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Captioner:
    """Load a model with its preprocessing, ready to caption.

    Args:
        source: folder or Hub id, or "scenes" (None: that) or "photos", the embedded checkpoints.
        revision: branch, tag or commit on the Hub.
        dtype: "float32" (the default), "bfloat16", "float16", torch's, or "auto": as it is stored.
        device: "cpu", "cuda", "cuda:1" or "mps"; None: CUDA where there is one.

    Raises:
        CheckpointError: if something is wrong with the checkpoint or a setting; it says what.
    """
    if device is None and "LOCAL_RANK" in os.environ:  # each process has its own device
        device = _processes().device
    return Captioner(**vars(load_checkpoint(source, revision, dtype, device)))


def _is_single(images: Picture | Iterable[Picture]) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4  # four axes are a batch of images
    single = isinstance(images, str | bytes) or hasattr(images, "read")  # a file object
    return single or not isinstance(images, Iterable)


def _processes() -> PartialState:
    """The processes of `accelerate launch`, or this one alone; a slow one is waited for."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(weeks=1))
