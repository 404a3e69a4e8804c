"""Time from images to pixel values: our processor and transformers' CLIP image processors."""

from __future__ import annotations

from collections.abc import Iterator
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


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Preprocess scenes, and images as large as photographs, by the preset "training", on a CPU."""
    count = 8 if quick else IMAGES
    about = {"settings": {"images": count, "rounds": ROUNDS}, "machine": machine(gpu=False)}
    return growing_table("preprocessing", _rows(captioner, count, quick), quick=quick, **about)


def _rows(captioner: Captioner, count: int, quick: bool) -> Iterator[dict]:
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
            equal = methods[name]()["pixel_values"] == expected  # to the bit
            yield {
                "method": name,
                "size": "{} x {}".format(*images[0].size),  # in pixels
                "seconds_per_image": Spread.of(taken / count for taken in samples),
                "share_of_time": Spread.ratio(samples, seconds[first]),  # of the first method's
                "equal_values": equal.float().mean().item(),  # share of the pixel values
                "seconds": samples,  # of all images in one call, round by round
            }
