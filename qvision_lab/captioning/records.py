"""Caption records: captions of an image, and the JSON Lines file of them that a job resumes."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from qvision_lab.captioning.images import ImageError
from qvision_lab.data.atomic import atomic
from qvision_lab.model.confidence import Claim


@dataclass(frozen=True)
class Caption:
    """A generated caption, with its tokens and their log-probabilities (nats)."""

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]  # as generated: without <START>, with <END> where reached
    logprobs: tuple[float, ...]  # of each token, before penalties and temperature; at most 0
    score: float  # their mean
    source: str  # path or URL, else "picture 3" by its place in the call
    settings: dict  # of generation and preprocessing, those that differ from the defaults
    seed: int | None  # None where nothing was sampled
    familiar: bool | None = None  # is the image like those learned from? None: not known
    claims: tuple[Claim, ...] | None = None  # with confidence; None: not calibrated
    confidence: float | None = None  # that all claims are right; None also without a claim


@dataclass(frozen=True)
class FolderReport:
    """Counts of images that `caption_folder` processed, and the file of their records."""

    captioned: int
    skipped: int  # captioned already: by an earlier call, or under the same name
    failed: int
    output: Path
    weights: str  # digest of the model's
    unfamiliar: int = 0  # of the captioned: unlike the images that the model learned from

    def __str__(self) -> str:
        counts = f"{self.captioned} captioned, {self.skipped} already there, {self.failed} failed"
        return f"{counts}, {self.unfamiliar} unlike those of the training -> {self.output}"


def make_record(captions: list[Caption] | ImageError) -> dict:
    """The fields of a record that are an image's own."""
    if isinstance(captions, ImageError):
        return {"error": str(captions)}
    texts = [caption.text for caption in captions]
    scores = [round(caption.score, 4) for caption in captions]  # later digits depend on the batch
    several = {"captions": texts, "scores": scores} if len(captions) > 1 else {}
    unlike = {"familiar": False} if captions[0].familiar is False else {}
    sure = captions[0].confidence
    sure = {} if sure is None else {"confidence": round(sure, 4)}
    return {"caption": texts[0], "score": scores[0], **several, **unlike, **sure}


def digest(name: str) -> bytes:
    """16 bytes that identify a name, so that a set of millions fits in memory."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def gather_records(output: Path, settings: dict, *, keep_failures: bool) -> None:
    """Merge `output` and the parts of all processes by an atomic rename; the last record counts."""
    parts = sorted(output.parent.glob(f"{glob.escape(output.name)}.part[0-9]*"))

    def kept() -> Iterator[tuple[int, bytes, str]]:
        lines = chain.from_iterable(read_records(part, settings) for part in (output, *parts))
        for number, (record, line) in enumerate(lines):
            if keep_failures or "caption" in record:
                yield number, digest(record["source"]), line

    last = {name: number for number, name, _ in kept()}
    with atomic(output) as merged, merged.open("w", encoding="utf-8") as file:
        file.writelines(line for number, name, line in kept() if last[name] == number)
    for part in parts:
        part.unlink()


def read_records(path: Path, settings: dict) -> Iterator[tuple[dict, str]]:
    """Records of a file with their lines; a line truncated by an interruption ends them.

    ValueError for a line that is not a record, or was made with other settings.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            complete, begun = line.endswith("\n"), line.startswith('{"source": "'[: len(line)])
            try:
                record = json.loads(line)
                earlier, _ = {**record["settings"]}, digest(record["source"])
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                if not complete and begun and (number > 1 or '", "image": ' in line):
                    return
                raise ValueError(
                    f"line {number} of {path} is no caption record; choose another output."
                ) from error
            if not complete:
                return
            names = sorted(settings.keys() | earlier.keys())
            values = [(name, earlier.get(name), settings.get(name)) for name in names]
            if changed := [f"{n} was {old!r}, now {new!r}" for n, old, new in values if old != new]:
                raise ValueError(
                    f"{path} was made with other settings ({'; '.join(changed)}): choose another "
                    "output, or delete this one to caption everything again."
                )
            yield record, line
