"""The demo: held-out scenes as picture files, captioned from disk, judged against their truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from qvision_lab.captioning import Caption, load
from qvision_lab.data import scenes
from qvision_lab.data.scenes.checking import RATES, Rate
from qvision_lab.plots import caption_sheet

SHEET = 24  # scenes that are drawn on the contact sheet


def run_demo(
    n: int = 24,
    output: str | Path = "figures/demo.png",
    folder: str | Path | None = None,
    seed: int = 0,
    model: str | None = None,
) -> dict[str, Rate]:
    """Caption n scenes of the split `test`, write a contact sheet, and print how many were true.

    Args:
        output: file of the contact sheet, in any format that matplotlib writes.
        folder: where the pictures are written and stay; by default they are deleted.
        model: folder or Hub id; by default the embedded checkpoint.

    Returns:
        The rates of `scenes.score`.
    """
    if n < 1:
        raise ValueError(f"n={n} scenes cannot be shown; choose at least 1.")
    captioner = load(model)
    with nullcontext(folder) if folder else TemporaryDirectory() as place:
        place = scenes.write_coco(place, n, split="test", seed=seed)
        images = json.loads((place / "captions.json").read_text(encoding="utf-8"))["images"]
        captions = captioner.caption([place / "images" / image["file_name"] for image in images])
        checks = [
            scenes.check(caption.text, scenes.layout(image["split"], image["seed"], image["index"]))
            for caption, image in zip(captions, images, strict=True)
        ]
        _write_sheet(captions[:SHEET], checks[:SHEET], Path(output))
    rates = scenes.score(checks)
    print(f"\n{n} scenes that training never saw, captioned from disk:\n")
    for name, rate in rates.items():
        print(f"  {name:<18}{str(rate) if rate.total else '-':>18}   of {RATES[name]}")
    print(f"\ncontact sheet: {output}")
    return rates


def _write_sheet(captions: Sequence[Caption], checks: Sequence[scenes.Check], output: Path) -> None:
    figure = caption_sheet(captions, ncols=6, marks=[check.true for check in checks])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"partial-{output.name}")  # the suffix chooses the format
    figure.savefig(partial, dpi=110)
    partial.replace(output)
