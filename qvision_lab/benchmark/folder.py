"""Folders of many images: memory, the rate next to the model's alone, and preprocessing."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from qvision_lab import scenes
from qvision_lab.benchmark.harness import ROUNDS, Spread, Table, identity_of, interleave, machine
from qvision_lab.captioning.captioner import BATCH_SIZES, Captioner
from qvision_lab.captioning.sampling import Choice
from qvision_lab.model.processor import image_preset

PICTURES, EARLY = {"cpu": 5_000, "cuda": 20_000}, 1_000
TIMED = {"cpu": 512, "cuda": 8_192}
SIZE, NOISE = (640, 480), 6  # pixels, and the deviation of noise like a camera's, of 255
DRAWN = 64  # distinct images; the others are the same files under other names
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 30}


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Caption many JPEG files as large as photographs; in turn, some of them as tensors.

    Then preprocess scenes, and images as large as photographs, by the preset "training".
    """
    device, resident = captioner.model.device.type, {}  # bytes, by the number of images read
    count, early, timed = (64, 32, 32) if quick else (PICTURES[device], EARLY, TIMED[device])
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_pictures(folder / "pictures", count)
        tensors = captioner.processor(images=[Image.open(path) for path in paths[:DRAWN]])
        ready = tensors["pixel_values"].to(captioner.model.device, captioner.model.dtype)
        ready = ready.repeat(-(-timed // len(ready)), 1, 1, 1)[:timed]
        choice = Choice(repetition_penalty=1.0, min_length=0, sampling=None)
        outputs = (folder / f"{number}.jsonl" for number in range(count))

        def caption_tensors() -> None:
            for pixel_values in ready.split(BATCH_SIZES[device]):
                captioner.decoding.run(choice, GREEDY["max_new_tokens"], pixel_values=pixel_values)

        def caption_files() -> None:
            captioner.caption_folder(paths[:timed], next(outputs), **GREEDY)

        def watched_paths() -> Iterator[Path]:
            for number, path in enumerate(paths, start=1):
                yield path
                if number in (early, count):
                    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
                    resident[number] = sum(process.memory_info().rss for process in processes)

        candidates = {"model_seconds": caption_tensors, "seconds": caption_files}
        seconds = interleave(candidates, ROUNDS, quick)  # of `timed_pictures`
        captioner.caption_folder(watched_paths(), folder / "all.jsonl", **GREEDY)
        photographs = [Image.open(path).convert("RGB") for path in paths[:DRAWN]]
    row = {
        "pictures": count,
        "early_gigabytes": resident[early] / 1e9,  # resident after the first 1,000 images,
        "late_gigabytes": resident[count] / 1e9,  # and after all; reading processes included
        "pictures_per_second": Spread.of(timed / s for s in seconds["seconds"]),
        "model_pictures_per_second": Spread.of(timed / s for s in seconds["model_seconds"]),
        "share_of_model_rate": Spread.ratio(seconds["model_seconds"], seconds["seconds"]),
        **seconds,
    }
    settings = {**GREEDY, "format": "JPEG", "size": SIZE, "timed_pictures": timed}
    settings |= {"batch": BATCH_SIZES[device], "parameters": captioner.model.num_parameters()}
    about = {"quick": quick, "settings": settings, "identity": identity_of(captioner)}
    yield Table(name="folder", rows=(row,), **about)
    rows, about = (*_preprocess(captioner, photographs, quick),), {"images": DRAWN}
    on_cpu = machine(gpu=False)
    yield Table(name="preprocessing", rows=rows, quick=quick, settings=about, machine=on_cpu)


def _preprocess(
    captioner: Captioner, photographs: list[Image.Image], quick: bool
) -> Iterator[dict]:
    """Time from images to pixel values, on a CPU: our processor and transformers', in turn."""
    drawn = [scene.image for scene in scenes.generate(DRAWN, split="test")]
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
                **{"method": name, "size": "{} x {}".format(*images[0].size)},  # in pixels
                "seconds_per_image": Spread.of(taken / DRAWN for taken in samples),
                "share_of_time": Spread.ratio(samples, seconds[first]),  # of the first method's
                "equal_values": equal.float().mean().item(),  # share of the pixel values
                "seconds": samples,  # of all images in one call, round by round
            }


def write_pictures(folder: Path, count: int) -> list[Path]:
    """So many JPEG files of `DRAWN` scenes, as large and as noisy as photographs."""
    folder.mkdir()
    paths = [folder / f"{i:06}.jpg" for i in range(count)]
    random = np.random.default_rng(0)
    for path, scene in zip(paths, scenes.generate(DRAWN, split="test"), strict=False):
        pixels = np.asarray(scene.image.resize(SIZE), np.float32)
        pixels = (pixels + random.normal(0, NOISE, pixels.shape)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    for i in range(DRAWN, count):
        os.link(paths[i % DRAWN], paths[i])
    return paths
