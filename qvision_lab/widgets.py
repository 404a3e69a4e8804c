"""The explorer: a picture, what the model says of it and where it looks, with parts muted or not.

`Bench` answers a `Question`, `draw` and `tell` turn the `Answer` into pictures and text, and the
controls of `Explorer` only ask and show, so that each can be tested without the others.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape

import ipywidgets as w
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from qvision_lab import scenes
from qvision_lab.captioning import Captioner
from qvision_lab.captioning.decoding_step import copy_sharing_weights
from qvision_lab.captioning.images import Picture, find_pictures, open_image
from qvision_lab.interpretation import maps
from qvision_lab.interpretation.interventions import Intervention, mute
from qvision_lab.interpretation.trace import Trace, trace
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.plots import plot_patch_map

SAMPLES = 6  # scenes to begin with
REMEMBERED = 16  # captions and traces, so that a click on a word costs its map alone


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture that can be picked."""

    name: str
    picture: Picture


@dataclass(frozen=True)
class Question:
    """All that the controls say."""

    picture: Shown
    search: tuple[tuple[str, object], ...]  # arguments of `Captioner.caption`
    muted: tuple[str, ...] = ()  # labels of interventions
    word: tuple[str, int] | None = None  # of a caption; else the longest, mostly a thing
    method: str = maps.DEFAULT_METHOD
    token: int = 0  # of the visual tokens
    block: int | None = None  # None: the mean of all, as for `head`
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model, whole or with parts muted, makes of a picture."""

    said: str
    trace: Trace  # of what the whole model says
    maps: tuple[maps.PatchMap, ...]  # of the word, if there is one, and of the visual token

    @property
    def probabilities(self) -> Float[np.ndarray, " W"]:
        """Of each word of the trace's caption, given those before it."""
        logprobs = self.trace.logprobs
        return np.exp([logprobs[list(word.tokens)].sum() for word in self.trace.words])


@dataclass(frozen=True, eq=False)
class Answer:
    """The readings that stand side by side."""

    whole: Reading
    muted: Reading | None  # None where nothing is
    word: int | None  # which of the trace's words the maps are of

    @property
    def vmax(self) -> list[float]:
        """Of each map, the value of the brightest colour: readings are drawn on one scale."""
        maps = [reading.maps for reading in (self.whole, self.muted) if reading]
        return [max(0, *(m.values.max() for m in same)) for same in zip(*maps, strict=True)]


class Bench:
    """Runs what is asked, and remembers captions and traces.

    Mutes are hooks, so they go into a copy of the model that shares its weights: what other cells
    do with the captioner meanwhile is left alone.
    """

    def __init__(self, captioner: Captioner):
        model = copy_sharing_weights(captioner.model)
        self.captioner = replace(captioner, model=model)
        self.parts = parts(model)
        self._by_label = {i.label: i for group in self.parts.values() for i in group.values()}
        self._caption = lru_cache(REMEMBERED)(self._caption)
        self._trace = lru_cache(REMEMBERED)(self._trace)

    def answer(self, question: Question) -> Answer:
        """Raises ImageError for a bad picture, and ValueError if no visual token is left."""
        caption = self._caption(question.picture, question.search, ())
        words = self._trace(question.picture, caption, ()).words
        word = max(range(len(words)), key=lambda i: len(words[i].text), default=None)
        if question.word and question.word[0] == caption:
            word = question.word[1]
        muted = self._read(question, caption, word, question.muted) if question.muted else None
        return Answer(self._read(question, caption, word, ()), muted, word)

    def _read(
        self, question: Question, caption: str, word: int | None, muted: tuple[str, ...]
    ) -> Reading:
        said = self._caption(question.picture, question.search, muted)
        traced = self._trace(question.picture, caption, muted)
        words = () if word is None else (traced.words[word],)
        with self._muting(muted):
            of_word = maps.word_maps(traced, question.method, words)
        of_token = maps.query_maps(traced, question.block, question.head)[question.token]
        return Reading(said, traced, (*of_word, of_token))

    def _caption(self, shown: Shown, search: tuple, muted: tuple[str, ...]) -> str:
        image = open_image(shown.picture, shown.name)
        with self._muting(muted):
            return self.captioner.caption(image, **dict(search)).text

    def _trace(self, shown: Shown, caption: str, muted: tuple[str, ...]) -> Trace:
        image = open_image(shown.picture, shown.name)
        with self._muting(muted):
            return trace(self.captioner, image, caption)

    def _muting(self, muted: tuple[str, ...]) -> ExitStack:
        stack = ExitStack()
        for label in muted:
            stack.enter_context(self._by_label[label])
        return stack


def parts(model: QVisionForConditionalGeneration) -> dict[str, dict[str, Intervention]]:
    """What can be muted, by kind and number."""
    heads = [(str(h), h) for h in range(model.config.num_attention_heads)]
    blocks = range(len(model.qformer.blocks))
    queries = {str(q): mute(model, queries=[q]) for q in range(model.config.num_query_tokens)}
    if model.config.global_token != "none":
        queries = {"global": mute(model, global_token=True), **queries}
    found = {"Queries": queries}
    for b in blocks:
        cross = {name: mute(model, heads=[(b, h)]) for name, h in heads}
        itself = {name: mute(model, self_heads=[(b, h)]) for name, h in heads}
        found |= {f"Block {b}: heads on patches": cross, f"Block {b}: heads on queries": itself}
    found["Bridge: heads"] = {name: mute(model, bridge_heads=[h]) for name, h in heads}
    whole = {f"block {b}": mute(model, blocks=[b]) for b in blocks}
    return {**found, "Whole": {**whole, "bridge": mute(model, bridge=True)}}


def draw(reading: Reading, vmax: Sequence[float]) -> bytes:
    """The maps on the picture, side by side, as PNG; `vmax` as in `Answer`."""
    figure = Figure(figsize=(3 * len(reading.maps), 3.3), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(reading.maps), squeeze=False)[0]
    for patch_map, ax, brightest in zip(reading.maps, axes, vmax, strict=True):
        plot_patch_map(reading.trace.image, patch_map, ax, brightest)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def tell(reading: Reading, vmax: Sequence[float], title: str) -> str:
    """HTML of a reading: what it is of, the caption, and the maps with a text in their place."""
    peaks = [f"{m.label} ({m.method}): highest in patch {m.peak}" for m in reading.maps]
    return (
        f"<b>{escape(title)}</b><br><big>{escape(reading.said) or '(no word)'}</big><br>"
        f'<img style="width:100%" alt="{escape("; ".join(peaks))}" '
        f'src="data:image/png;base64,{base64.b64encode(draw(reading, vmax)).decode()}">'
    )


def tell_probabilities(answer: Answer) -> str:
    """HTML table of how likely each word of the whole model's caption is, muted or not."""
    rows = {"whole": answer.whole} | ({"muted": answer.muted} if answer.muted else {})
    values = {f"probability, {name}": reading.probabilities for name, reading in rows.items()}
    words = [word.text for word in answer.whole.trace.words]
    table = pd.DataFrame.from_dict(values, orient="index", columns=words)
    return table.to_html(border=0, col_space=50, justify="left", float_format="{:.0%}".format)


class Explorer(w.VBox):
    """Controls and what they show; the model works in a thread, and the last question counts."""

    def __init__(self, captioner: Captioner):
        self.bench, self._asked = Bench(captioner), None
        self._worker = ThreadPoolExecutor(1)
        config, blocks = captioner.model.config, len(captioner.model.qformer.blocks)
        drawn = enumerate(scenes.generate(SAMPLES, split="test"))
        samples = [(f"scene {i}", Shown(f"scene {i}", scene.image)) for i, scene in drawn]
        style = {"style": {"description_width": "initial"}}
        late = {"continuous_update": False, **style}  # a question when the handle is let go
        self.picture = w.Dropdown(description="Picture", options=samples)
        auto = {"layout": {"width": "auto"}}
        self.upload = w.FileUpload(description="Upload a picture", accept="image/*", **auto)
        self.folder = w.Text(description="Folder", placeholder="or a file, or a URL", **late)
        self.search = w.Dropdown(description="Search", options=["greedy", "beams", "sampling"])
        self.beams = w.IntSlider(3, 2, 8, description="Beams", **late)
        self.temperature = w.FloatSlider(0.7, min=0.1, max=2, description="Temperature", **late)
        self.top_p = w.FloatSlider(0.9, min=0.05, max=1, step=0.05, description="Top p", **late)
        self.seed = w.BoundedIntText(0, 0, 2**31 - 1, description="Seed", **style)
        usual = captioner.model.generation_config.repetition_penalty or 1.0
        self.penalty = w.FloatSlider(usual, min=1, max=2, description="Repetition penalty", **late)
        methods = {"options": list(maps.METHODS), "value": maps.DEFAULT_METHOD}
        self.method = w.Dropdown(description="Map of the word", **methods, **style)
        labels = config.visual_token_labels
        tokens = {"options": [(x, i) for i, x in enumerate(labels)], "layout": {"width": "380px"}}
        self.token = w.SelectionSlider(description="Visual token", **tokens, **late)
        self.block, self.head = (
            w.Dropdown(description=name, options=["all", *map(str, range(n))])
            for name, n in (("Block", blocks), ("Head", config.num_attention_heads))
        )
        self.parts = {
            part.label: w.ToggleButton(description=name, tooltip=f"mute {part.label}", **auto)
            for group in self.bench.parts.values()
            for name, part in group.items()
        }
        self.unmute = w.Button(description="Unmute all")
        self.words, self._words = w.ToggleButtons(), w.Box()
        half = {"width": "50%", "padding": "4px"}
        self.whole, self.muted = w.HTML(layout=half), w.HTML(layout=half)
        self.status, self.probabilities = w.HTML(), w.HTML()
        searching = (self.search, self.beams, self.temperature, self.top_p, self.seed, self.penalty)
        reading = (self.picture, self.method, self.token, self.block, self.head)
        super().__init__(self._arrange(searching))
        for control in (*searching, *reading, *self.parts.values()):
            control.observe(self.ask, "value")
        self.upload.observe(self._add_upload, "value")
        self.folder.observe(self._add_folder, "value")
        self.unmute.on_click(self._unmute)
        self.ask()

    def ask(self, change: object = None) -> None:
        """Have the controls' question answered and shown, in the worker's thread."""
        self.beams.disabled = self.search.value != "beams"
        for control in (self.temperature, self.top_p, self.seed):
            control.disabled = self.search.value != "sampling"
        muted = tuple(label for label, button in self.parts.items() if button.value)
        asked = (self.picture.value, self._settings(), muted)
        read = (self.words.value, self.method.value, self.token.value)
        of = (None if c.value == "all" else int(c.value) for c in (self.block, self.head))
        question = Question(*asked, *read, *of)
        if question != self._asked:
            self._asked = question
            self.pending = self._worker.submit(self._answer, question)

    def _settings(self) -> tuple[tuple[str, object], ...]:
        settings = {"preset": "greedy", "repetition_penalty": self.penalty.value}
        if self.search.value == "beams":
            settings |= {"preset": "beam", "num_beams": self.beams.value}
        elif self.search.value == "sampling":
            settings |= {"temperature": self.temperature.value, "top_p": self.top_p.value}
            settings |= {"seed": self.seed.value}
        return tuple(settings.items())

    def _answer(self, question: Question) -> None:
        if question != self._asked:
            return  # a later one waits
        self.status.value = '<span role="status">The model is at work …</span>'
        try:
            self._show(question, self.bench.answer(question))
            self.status.value = '<span role="status">Ready.</span>'
        except Exception as error:  # nobody would see it in this thread
            self._complain(error)

    def _show(self, question: Question, answer: Answer) -> None:
        caption, words = answer.whole.trace.caption, answer.whole.trace.words
        options = tuple((word.text, (caption, i)) for i, word in enumerate(words))
        if options != self.words.options:
            old, picked = self.words, None if answer.word is None else (caption, answer.word)
            self.words = w.ToggleButtons(
                description="Word", options=options, value=picked, style={"button_width": "auto"}
            )
            self.words.observe(self.ask, "value")
            self._words.children = (self.words,)
            old.close()
        self.whole.value = tell(answer.whole, answer.vmax, "The model says")
        self.muted.value = "<b>Nothing is muted.</b> Press what to mute below."
        if answer.muted:
            title = f"With {', '.join(question.muted)} muted"
            self.muted.value = tell(answer.muted, answer.vmax, title)
        self.probabilities.value = tell_probabilities(answer)

    def _complain(self, error: Exception) -> None:
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self.status.value = f'<b role="alert" style="color:#c4314b">{escape(told)}</b>'

    def _add_upload(self, change: object) -> None:
        self._add((file["name"], bytes(file["content"])) for file in self.upload.value)

    def _add_folder(self, change: object) -> None:
        try:
            self._add((name, path) for path, name in find_pictures(self.folder.value).items())
        except ValueError as error:
            self._complain(error)

    def _add(self, pictures: Iterable[tuple[str, Picture]]) -> None:
        """In front, since the first of new options is picked."""
        new = [(name, Shown(name, picture)) for name, picture in pictures]
        self.picture.options = [*new, *self.picture.options]

    def _unmute(self, button: w.Button) -> None:
        for part in self.parts.values():
            part.value = False

    def _arrange(self, searching: Sequence[w.Widget]) -> list[w.Widget]:
        wrap = w.Layout(flex_flow="row wrap")
        mutes = [self.unmute]
        for kind, group in self.bench.parts.items():
            buttons = [self.parts[part.label] for part in group.values()]
            mutes.append(w.HBox([w.Label(kind, layout={"width": "230px"}), *buttons], layout=wrap))
        return [
            w.HBox([self.picture, self.upload, self.folder], layout=wrap),
            w.HBox(searching, layout=wrap),
            self.status,
            w.HBox([self._words, self.method], layout=wrap),
            w.HBox([self.token, self.block, self.head], layout=wrap),
            w.HBox([self.whole, self.muted]),
            self.probabilities,
            w.Accordion([w.VBox(mutes)], titles=["Mute"], selected_index=0),
        ]


def explore(captioner: Captioner) -> w.Widget:
    """Explore a captioner in Jupyter: pick a picture, click a word, mute what it may hang on.

    Raises:
        ValueError: for a compiled captioner, whose decoding passes over what is muted, and a model
            without Q-Former or bridge.
    """
    return Explorer(captioner)
