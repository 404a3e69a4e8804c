"""Time from images to pixel values: our processor and transformers' CLIP image processors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from qvision_lab import scenes
from qvision_lab.benchmark.folder import write_pictures
from qvision_lab.benchmark.harness import Spread, Table, growing_table, interleave, machine
from qvision_lab.captioning import Captioner
from qvision_lab.model.processor import image_preset

IMAGES, ROUNDS = 64, 15


@dataclass(frozen=True)
class PreprocessingRow:
    """A method, timed in turn with the others on the same decoded images."""

    method: str
    size: str  # of the images, in pixels
    seconds_per_image: Spread
    share_of_time: Spread  # of the first method's
    equal_values: float  # share of the pixel values that are the first method's to the bit
    seconds: list[float]  # of all images in one call, round by round


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Preprocess scenes, and images as large as photographs, by the preset "training", on a CPU."""
    count = 8 if quick else IMAGES
    about = {"quick": quick, "settings": {"images": count, "rounds": ROUNDS}}
    return growing_table(
        "preprocessing", _rows(captioner, count, quick), machine=machine(gpu=False), **about
    )


def _rows(captioner: Captioner, count: int, quick: bool) -> Iterator[PreprocessingRow]:
    drawn = [scene.image for scene in scenes.generate(count, split="test")]
    with TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder) / "pictures", count)
        photographs = [Image.open(path).convert("RGB") for path in paths]
    preset = image_preset("training", captioner.processor.image_size)
    for images in (drawn, photographs):
        methods = {
            f"transformers' {kind.__name__}": partial(kind(**preset), images, return_tensors="pt")
            for kind in (CLIPImageProcessorPil, CLIPImageProcessor)
        }
        first, *_ = methods
        expected = methods[first]()["pixel_values"]
        methods["QVisionProcessor"] = partial(captioner.processor, images=images)
        seconds = interleave(methods, ROUNDS, quick)
        for name, samples in seconds.items():
            yield PreprocessingRow(
                name,
                "{} x {}".format(*images[0].size),
                Spread.of(taken / count for taken in samples),
                Spread.ratio(samples, seconds[first]),
                (methods[name]()["pixel_values"] == expected).float().mean().item(),
                samples,
            )
