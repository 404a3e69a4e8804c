"""Drawings of the explorer as HTML: maps over the picture in colour, captions, probabilities.

A map is a small image of one pixel a patch that the browser enlarges, so its opacity is a style.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from qvision_lab.interpretation.maps import PatchMap
from qvision_lab.interpretation.page import data_url, picture_url
from qvision_lab.interpretation.trace import Word
from qvision_lab.plots.images import HEAT
from qvision_lab.widgets.backend import Result

STYLE, SCRIPT = (
    (files("qvision_lab.widgets") / f"explorer.{kind}").read_text() for kind in ("css", "js")
)
CHANGED = 0.1  # difference of a probability from which on it is marked
LOWEST = 0.3  # opacity of the darkest patch, relative to the brightest


def color_limits(results: Sequence[Result]) -> list[float]:
    """Of each map, the value of the brightest colour, so that results share a scale."""
    maps = zip(*(result.maps for result in results), strict=True)
    return [max(0, *(patch_map.values.max() for patch_map in same)) for same in maps]


def result_html(result: Result, vmax: Sequence[float], title: str, whole: str = "") -> str:
    """A title, the caption (words that `whole` has not are marked), and maps over the image."""
    picture = picture_url(result.trace.image)
    maps = [_map_html(picture, m, top) for m, top in zip(result.maps, vmax, strict=True)]
    caption = _marked(result.caption, whole or result.caption) or "(no word)"
    return (
        f"<div class='qv-title'>{escape(title)}</div><div class='qv-caption'>{caption}</div>"
        f"<div class='qv-maps'>{''.join(maps)}</div>"
    )


def probabilities_html(results: Sequence[Result]) -> str:
    """Probabilities of the words of the caption that is read; what muting changes is marked."""
    whole, words = results[0].trace.probabilities, results[0].trace.words
    head = "".join(f"<th>{escape(word.text)}</th>" for word in words)
    rows = []
    for name, result in zip(("whole", "muted"), results, strict=False):
        cells = "".join(
            f"<td><mark>{p:.0%}</mark></td>" if abs(p - w) > CHANGED else f"<td>{p:.0%}</td>"
            for p, w in zip(result.trace.probabilities, whole, strict=True)
        )
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    return f"<table class='qv-table'><tr><th>probability</th>{head}</tr>{''.join(rows)}</table>"


def truth_marks(claims: Sequence[object], words: Sequence[Word]) -> list[str]:
    """A tick or a cross for each word that makes a claim, by the narrowest claim that holds it."""
    marks = [""] * len(words)
    for claim in sorted(claims, key=lambda claim: claim.span[0] - claim.span[1]):
        for i, word in enumerate(words):
            if claim.span[0] <= word.span[0] < claim.span[1]:
                marks[i] = "✓" if claim.right else "✗"
    return marks


def _map_html(picture: str, patch_map: PatchMap, vmax: float) -> str:
    shares = np.clip(patch_map.values / (vmax or 1), 0, 1)
    pixels = plt.get_cmap(HEAT)(shares)
    pixels[..., 3] = LOWEST + (1 - LOWEST) * shares
    heat = data_url(Image.fromarray((255 * pixels).round().astype(np.uint8)))
    label = escape(f"{patch_map.label} ({patch_map.method})", quote=True)
    return (
        f"<figure><div class='qv-picture' role='img' aria-label='{label}: highest in patch "
        f"{patch_map.peak}'><img alt='' src='{picture}'><img alt='' class='qv-heat' src='{heat}'>"
        f"</div><figcaption>{label}<br>0 <span class='qv-bar'></span> {vmax:.2g}</figcaption>"
        "</figure>"
    )


def _marked(caption: str, whole: str) -> str:
    words, before = caption.split(), whole.split()
    found = []
    for kind, _, _, start, stop in SequenceMatcher(None, before, words, False).get_opcodes():
        text = escape(" ".join(words[start:stop]))
        found.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    return " ".join(text for text in found if text)
