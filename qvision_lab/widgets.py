"""The explorer: an image, its caption and maps by the whole model and with parts muted.

`Backend` runs a `Request` and returns a `Result` or two, functions turn those into HTML, and
`Explorer` has the controls, so that each can be tested without the others.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from html import escape

import ipywidgets as w
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.decoding_step import copy_sharing_weights
from qvision_lab.captioning.images import Picture, open_image, walk_pictures
from qvision_lab.data.coco import open_dataset
from qvision_lab.interpretation.interventions import Intervention, mute
from qvision_lab.interpretation.maps import DEFAULT_METHOD, METHODS, PatchMap, query_maps, word_maps
from qvision_lab.interpretation.trace import Trace, trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.plots import plot_patch_map

SAMPLES = 6  # scenes to choose from
CACHE_SIZE = 16  # captions and traces, so that a click on a word costs its map alone


@dataclass(frozen=True)
class Request:
    """The state of all controls."""

    image: Callable[[], Image.Image]  # opens it
    search: tuple[tuple[str, object], ...]  # arguments of `Captioner.caption`
    muted: tuple[str, ...] = ()  # labels of interventions
    word: tuple[str, int] | None = None  # caption and index; else the longest, mostly a noun
    method: str = DEFAULT_METHOD
    token: int = 0  # of the visual tokens
    block: int | None = None  # None: the mean of all, as for `head`
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """Output of the model, whole or with parts muted, for an image."""

    caption: str
    trace: Trace  # of the whole model's caption
    word: int | None  # index of the mapped word in the trace
    maps: tuple[PatchMap, ...]  # of the word, if there is one, and of the visual token

    @property
    def probabilities(self) -> np.ndarray:
        """Of each word [W] of the trace's caption, given those before it."""
        logprobs = self.trace.logprobs
        return np.exp([logprobs[list(word.tokens)].sum() for word in self.trace.words])


class Backend:
    """Runs requests on a copy of the model that shares its weights, and caches what can be.

    Mutes are hooks; in the copy they do not affect the captioner in other cells.
    """

    def __init__(self, captioner: Captioner):
        model = copy_sharing_weights(captioner.model)
        self.captioner = replace(captioner, model=model)
        self.parts = parts(model)
        self._by_label = {i.label: i for group in self.parts.values() for i in group.values()}
        self._caption = lru_cache(CACHE_SIZE)(self._caption)
        self._trace = lru_cache(CACHE_SIZE)(self._trace)

    def run(self, request: Request) -> list[Result]:
        """Result of the whole model, then of the muted one if a part is muted."""
        caption = self._caption(request.image, request.search, ())
        words = self._trace(request.image, caption, ()).words
        word = max(range(len(words)), key=lambda i: len(words[i].text), default=None)
        if request.word and request.word[0] == caption:
            word = request.word[1]
        results = []
        for muted in dict.fromkeys(((), request.muted)):  # one, if they are the same
            traced = self._trace(request.image, caption, muted)
            with self._muting(muted):
                maps = word_maps(traced, request.method, () if word is None else (words[word],))
            maps.append(query_maps(traced, request.block, request.head)[request.token])
            own = self._caption(request.image, request.search, muted)
            results.append(Result(own, traced, word, tuple(maps)))
        return results

    def _caption(self, image: Callable, search: tuple, muted: tuple[str, ...]) -> str:
        with self._muting(muted):
            return self.captioner.caption(image(), **dict(search)).text

    def _trace(self, image: Callable, caption: str, muted: tuple[str, ...]) -> Trace:
        with self._muting(muted):
            return trace(self.captioner, image(), caption)

    def _muting(self, muted: tuple[str, ...]) -> ExitStack:
        stack = ExitStack()
        for label in muted:
            stack.enter_context(self._by_label[label])
        return stack


def parts(model: QVisionForConditionalGeneration) -> dict[str, dict[str, Intervention]]:
    """A mute for each part of the model, by kind and number."""
    heads = [(str(h), h) for h in range(model.config.num_attention_heads)]
    blocks, queries = range(len(model.qformer.blocks)), range(model.config.num_query_tokens)
    has_global = model.config.global_token != "none"
    found = {"Queries": {"global": mute(model, global_token=True)} if has_global else {}}
    found["Queries"] |= {str(q): mute(model, queries=[q]) for q in queries}
    for b in blocks:
        cross = {name: mute(model, heads=[(b, h)]) for name, h in heads}
        itself = {name: mute(model, self_heads=[(b, h)]) for name, h in heads}
        found |= {f"Block {b}: heads on patches": cross, f"Block {b}: heads on queries": itself}
    found["Bridge: heads"] = {name: mute(model, bridge_heads=[h]) for name, h in heads}
    whole = {f"block {b}": mute(model, blocks=[b]) for b in blocks}
    return {**found, "Whole": {**whole, "bridge": mute(model, bridge=True)}}


def color_limits(results: Sequence[Result]) -> list[float]:
    """Of each map, the value of the brightest colour, so that results share a scale."""
    maps = zip(*(result.maps for result in results), strict=True)
    return [max(0, *(patch_map.values.max() for patch_map in same)) for same in maps]


def result_html(result: Result, vmax: Sequence[float], title: str) -> str:
    """A title, the caption, and the maps over the image; `vmax` as of `color_limits`."""
    figure = Figure(figsize=(3 * len(result.maps), 3.3), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(result.maps), squeeze=False)[0]
    for patch_map, ax, brightest in zip(result.maps, axes, vmax, strict=True):
        plot_patch_map(result.trace.image, patch_map, ax, brightest)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    peaks = [f"{m.label} ({m.method}): highest in patch {m.peak}" for m in result.maps]
    return (
        f"<b>{escape(title)}</b><br><big>{escape(result.caption) or '(no word)'}</big><br>"
        f'<img style="width:100%" alt="{escape("; ".join(peaks))}" '
        f'src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
    )


def probabilities_html(results: Sequence[Result]) -> str:
    """Table of the probabilities of the words of the whole model's caption."""
    rows = zip(("probability, whole", "probability, muted"), results, strict=False)
    values = {name: result.probabilities for name, result in rows}
    words = [word.text for word in results[0].trace.words]
    table = pd.DataFrame.from_dict(values, orient="index", columns=words)
    return table.to_html(border=0, col_space=50, justify="left", float_format="{:.0%}".format)


class Explorer(w.VBox):
    """Explore a captioner with Q-Former and bridge in Jupyter: click words, mute parts of it.

    The model runs in a thread, which skips all but the last request.
    """

    def __init__(self, captioner: Captioner):
        self.backend, self._requested = Backend(captioner), None
        self._worker = ThreadPoolExecutor(1)
        config = captioner.model.config
        auto = {"layout": {"width": "auto"}}
        style = {"style": {"description_width": "initial"}}
        late = {"continuous_update": False, **style}  # a request when the handle is released
        self.image = w.Dropdown(description="Picture")
        samples = enumerate(open_dataset("scenes:test", n=SAMPLES))
        self._add((f"scene {i}", sample.picture) for i, sample in samples)
        self.upload = w.FileUpload(description="Upload a picture", accept="image/*", **auto)
        self.folder = w.Text(description="Folder", placeholder="or a file, or a URL", **late)
        self.search = w.Dropdown(description="Search", options=["greedy", "beams", "sampling"])
        self.beams = w.IntSlider(3, 2, 8, description="Beams", **late)
        self.temperature = w.FloatSlider(0.7, min=0.1, max=2, description="Temperature", **late)
        self.top_p = w.FloatSlider(0.9, min=0.05, max=1, step=0.05, description="Top p", **late)
        self.seed = w.BoundedIntText(0, 0, 2**31 - 1, description="Seed", **style)
        usual = captioner.model.generation_config.repetition_penalty or 1.0
        self.penalty = w.FloatSlider(usual, min=1, max=2, description="Repetition penalty", **late)
        methods = {"options": list(METHODS), "value": DEFAULT_METHOD}
        self.method = w.Dropdown(description="Map of the word", **methods, **style)
        tokens = [(label, i) for i, label in enumerate(config.visual_token_labels)]
        wide = {"layout": {"width": "380px"}, **late}
        self.token = w.SelectionSlider(description="Visual token", options=tokens, **wide)
        sizes = {"Block": config.num_qformer_blocks, "Head": config.num_attention_heads}
        self.block, self.head = (
            w.Dropdown(description=name, options=["all", *map(str, range(size))])
            for name, size in sizes.items()
        )
        self.parts = {
            part.label: w.ToggleButton(description=name, tooltip=f"mute {part.label}", **auto)
            for group in self.backend.parts.values()
            for name, part in group.items()
        }
        self.unmute = w.Button(description="Unmute all")
        self.words, self._words = w.ToggleButtons(), w.Box()
        half = {"width": "50%", "padding": "4px"}
        self.whole, self.muted = w.HTML(layout=half), w.HTML(layout=half)
        self.status, self.probabilities = w.HTML(), w.HTML()
        searching = (self.search, self.beams, self.temperature, self.top_p, self.seed, self.penalty)
        mapping = (self.image, self.method, self.token, self.block, self.head)
        row = {"layout": {"flex_flow": "row wrap"}}
        mutes = [self.unmute]
        for kind, group in self.backend.parts.items():
            buttons = [self.parts[part.label] for part in group.values()]
            mutes.append(w.HBox([w.Label(kind, layout={"width": "230px"}), *buttons], **row))
        children = [
            w.HBox([self.image, self.upload, self.folder], **row),
            w.HBox(searching, **row),
            self.status,
            w.HBox([self._words, self.method], **row),
            w.HBox([self.token, self.block, self.head], **row),
            w.HBox([self.whole, self.muted]),
            self.probabilities,
            w.Accordion([w.VBox(mutes)], titles=["Mute"], selected_index=0),
        ]
        super().__init__(children)
        for control in (*searching, *mapping, *self.parts.values()):
            control.observe(self.request, "value")
        self.upload.observe(self._add_upload, "value")
        self.folder.observe(self._add_folder, "value")
        self.unmute.on_click(self._unmute)
        self.request()

    def request(self, change: object = None) -> None:
        """Run the model for the state of the controls, in the worker's thread."""
        self.beams.disabled = self.search.value != "beams"
        for control in (self.temperature, self.top_p, self.seed):
            control.disabled = self.search.value != "sampling"
        request = Request(
            self.image.value,
            self._settings(),
            tuple(label for label, button in self.parts.items() if button.value),
            *(self.words.value, self.method.value, self.token.value),
            *(None if c.value == "all" else int(c.value) for c in (self.block, self.head)),
        )
        if request != self._requested:
            self._requested = request
            self.pending = self._worker.submit(self._run, request)

    def _settings(self) -> tuple[tuple[str, object], ...]:
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        settings = {"greedy": {}, "beams": {"num_beams": self.beams}, "sampling": sampling}
        chosen = {"repetition_penalty": self.penalty, **settings[self.search.value]}
        preset = "beam" if self.search.value == "beams" else "greedy"
        return ("preset", preset), *((name, control.value) for name, control in chosen.items())

    def _run(self, request: Request) -> None:
        if request != self._requested:
            return  # a later one follows
        self.status.value = '<span role="status">The model is at work …</span>'
        try:
            self._show(request, self.backend.run(request))
            self.status.value = '<span role="status">Ready.</span>'
        except Exception as error:  # it would be lost in this thread
            self._show_error(error)

    def _show(self, request: Request, results: list[Result]) -> None:
        caption, words, word = results[0].trace.caption, results[0].trace.words, results[0].word
        options = tuple((each.text, (caption, i)) for i, each in enumerate(words))
        if options != self.words.options:
            old, picked = self.words, None if word is None else (caption, word)
            self.words = w.ToggleButtons(description="Word", options=options, value=picked)
            self.words.style.button_width = "auto"
            self.words.observe(self.request, "value")
            self._words.children = (self.words,)
            old.close()
        titles = ("The model says", f"With {', '.join(request.muted)} muted")
        self.muted.value = "<b>Nothing is muted.</b> Press what to mute below."
        for output, result, title in zip((self.whole, self.muted), results, titles, strict=False):
            output.value = result_html(result, color_limits(results), title)
        self.probabilities.value = probabilities_html(results)

    def _show_error(self, error: Exception) -> None:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self.status.value = f'<b role="alert" style="color:#c4314b">{escape(text)}</b>'

    def _add(self, images: Iterable[tuple[str, Picture]]) -> None:
        new = [(name, partial(open_image, image, name)) for name, image in images]
        self.image.options = [*new, *self.image.options]
        self.image.index = 0

    def _add_upload(self, change: object) -> None:
        self._add((file["name"], bytes(file["content"])) for file in self.upload.value)

    def _add_folder(self, change: object) -> None:
        try:
            self._add((name, path) for path, name in walk_pictures(self.folder.value))
        except ValueError as error:
            self._show_error(error)

    def _unmute(self, button: w.Button) -> None:
        for part in self.parts.values():
            part.value = False


explore = Explorer  # public as `ql.explore`
