"""A page that needs no Python: words to click, maps, and each visual token muted beforehand."""

import base64
import io
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from qvision_lab.data.atomic import write_atomic
from qvision_lab.interpretation.interventions import mute_each, stack
from qvision_lab.interpretation.maps import DEFAULT_METHOD, METHODS, PatchMap, word_maps
from qvision_lab.interpretation.trace import Trace, trace_all

SIDE = 512  # pixels, of the picture in pages and in the explorer
MUTED_METHOD = "composition"  # of attention that a single pass records
WITHOUT_MODEL = ("composition", "rollout")  # methods that need no model, for a loaded trace


def write_page(trace: Trace, path: str | Path) -> Path:
    """Write one HTML file that shows a trace without Python and without network; return its path.

    Click words; choose the method, and block and head of a visual token's attention; mute any one
    visual token, for which caption, probabilities and maps by composition are computed now. A trace
    that was loaded without its captioner has two methods and no mutes.
    """
    methods = METHODS if trace.captioner is not None else WITHOUT_MODEL
    content = {
        "picture": picture_url(trace.image),
        "grid": trace.patch_grid,
        "words": [word.text for word in trace.words],
        "probabilities": _rounded(trace.probabilities),
        "tokens": trace.visual_token_labels,
        "maps": {method: _values(word_maps(trace, method)) for method in methods},
        "attention": _rounded(trace.qformer_cross_attentions),
        "muted": _muted(trace) if trace.captioner is not None else [],
        "method": DEFAULT_METHOD if trace.captioner is not None else MUTED_METHOD,
        "mutedMethod": MUTED_METHOD,
    }
    text = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    template = (files("qvision_lab.interpretation") / "page.html").read_text(encoding="utf-8")
    write_atomic(path := Path(path), template.replace("/*DATA*/null", text))
    return path


Trace.to_html = write_page  # set here: the page needs maps, and these need Trace


def _muted(trace: Trace) -> list[dict]:
    """Caption, probabilities and maps with each visual token muted, in their order."""
    captioner, mutes = trace.captioner, mute_each(trace.model, "queries")
    images = [trace.image] * len(mutes)
    with stack(mutes):
        captions = captioner.caption(images, batch_size=len(mutes), preset="greedy")
        same = [trace.caption] * len(mutes)
        traces = list(trace_all(captioner, images, same, batch_size=len(mutes)))
    return [
        {
            "caption": caption.text,
            "probabilities": _rounded(traced.probabilities),
            "maps": _values(word_maps(traced, MUTED_METHOD)),
        }
        for caption, traced in zip(captions, traces, strict=True)
    ]


def _values(maps: list[PatchMap]) -> list[list[float]]:
    return [_rounded(patch_map.values.ravel()) for patch_map in maps]


def _rounded(values: np.ndarray) -> list:
    """Three digits, to keep the file small."""
    digits = [float(f"{value:.3g}") for value in np.ravel(values)]
    return np.reshape(digits, np.shape(values)).tolist()


def picture_url(image: np.ndarray) -> str:
    """A small copy of an image as text."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    return data_url(small, "jpeg", quality=90)


def data_url(image: Image.Image, kind: str = "png", **settings) -> str:
    """An image as text, for HTML and JSON."""
    image.save(content := io.BytesIO(), kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
