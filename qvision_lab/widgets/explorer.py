"""The controls of the explorer: words to click, parts to mute, a caption of your own."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape

import ipywidgets as w
import matplotlib.pyplot as plt

from qvision_lab.captioning import Captioner
from qvision_lab.captioning.images import Picture, open_image, walk_pictures
from qvision_lab.data.coco import open_dataset
from qvision_lab.interpretation.maps import DEFAULT_METHOD, METHODS
from qvision_lab.plots import map_sheet
from qvision_lab.widgets import html
from qvision_lab.widgets.backend import Backend, Request, Result

SAMPLES = 6  # scenes to choose from
FOREIGN = (
    "This picture is unlike those that the checkpoint learned from: its captions of it mean little."
)


class Explorer(w.VBox):
    """Explore a captioner with Q-Former and bridge in Jupyter: click words, mute parts of it.

    The model runs in a thread, which skips all but the last request.

    Args:
        captioner: as `ql.load` returns it.
        pictures: files, folders or URLs to choose from, besides a few scenes; by default none, and
            six free photographs for "photos".
    """

    def __init__(self, captioner: Captioner, pictures: str | os.PathLike | Iterable = ()):
        self.backend, self._requested, self._picked = Backend(captioner), None, ("", 0)
        self._worker, self._shown = ThreadPoolExecutor(1), ()
        config, origin = captioner.model.config, captioner.provenance
        self._source = origin and origin.source
        auto, style = {"layout": {"width": "auto"}}, {"style": {"description_width": "initial"}}
        late = {"continuous_update": False, **style}  # a request when the handle is released
        self.image = w.Dropdown(description="Picture", layout={"width": "220px"}, **style)
        scenes = open_dataset("scenes:test", n=SAMPLES)
        self._truths = {f"scene {i}": truth for i, truth in scenes.judge.truths.items()}
        self._add((f"scene {i}", sample.picture) for i, sample in enumerate(scenes))
        self.upload = w.FileUpload(description="Upload a picture", accept="image/*", **auto)
        self.folder = w.Text(placeholder="or a file, a folder, a URL", continuous_update=False)
        self.own = w.Text(placeholder="or read a caption of your own", continuous_update=False)
        self.search = w.Dropdown(description="Search", options=["greedy", "beams", "sampling"])
        self.beams = w.IntSlider(3, 2, 8, description="Beams", **late)
        self.temperature = w.FloatSlider(0.7, min=0.1, max=2, description="Temperature", **late)
        self.top_p = w.FloatSlider(0.9, min=0.05, max=1, step=0.05, description="Top p", **late)
        self.seed = w.BoundedIntText(0, 0, 2**31 - 1, description="Seed", **style)
        usual = captioner.model.generation_config.repetition_penalty or 1.0
        self.penalty = w.FloatSlider(usual, min=1, max=2, description="Repetition penalty", **late)
        methods = {"options": list(METHODS), "value": DEFAULT_METHOD}
        self.method = w.Dropdown(description="Map", layout={"width": "210px"}, **methods, **style)
        tokens = [(label, i) for i, label in enumerate(config.visual_token_labels)]
        wide = {"layout": {"width": "330px"}, **late}
        self.token = w.SelectionSlider(description="Visual token", options=tokens, **wide)
        sizes = {"Block": config.num_qformer_blocks, "Head": config.num_attention_heads}
        narrow = {"layout": {"width": "110px"}, **style}
        self.block, self.head = (
            w.Dropdown(description=name, options=["all", *map(str, range(size))], **narrow)
            for name, size in sizes.items()
        )
        slim = {"readout": False, "layout": {"width": "210px"}}
        self.opacity = w.FloatSlider(0.75, min=0, max=1, description="Opacity", **slim, **style)
        self.unmute = w.Button(description="Unmute all", **auto)
        self.only = w.Button(description="Only this visual token", **auto)
        self.only.tooltip = "mute all visual tokens but the one whose map is drawn"
        self.save = w.Button(description="Save PNG", tooltip="in the notebook's folder", **auto)
        wrapped = {"flex_flow": "row wrap"}
        self.words, self._style = w.HBox(layout=wrapped), w.HTML()
        self.words.add_class("qv-words")
        half = {"width": "50%", "padding": "0 4px"}
        self.whole, self.muted = w.HTML(layout=half), w.HTML(layout=half)
        self.status, self.warning, self.probabilities, self.code = (w.HTML() for _ in range(4))
        searching = (self.search, self.beams, self.temperature, self.top_p, self.seed, self.penalty)
        mapping = (self.image, self.own, self.method, self.token, self.block, self.head)
        row = {"layout": {**wrapped, "align_items": "center", "grid_gap": "0 8px"}}
        self.parts, mutes = {}, [w.HBox([self.unmute, self.only], **row)]
        for kind, group in self.backend.parts.items():
            for name in group:
                short = name.removesuffix(" token").split()[-1]
                self.parts[name] = w.ToggleButton(description=short, tooltip=f"mute {name}")
            mutes.append(w.HBox([w.Label(kind), *map(self.parts.get, group)], layout=wrapped))
        panel = w.VBox(mutes, layout={"flex": "1 1 260px"})
        panel.add_class("qv-mute")
        shown = [w.HBox([self.whole, self.muted]), w.HBox([self.opacity, self.save], **row)]
        stretched = {"flex": "3 1 480px", "min_width": "0"}
        maps = w.VBox([*shown, self.probabilities], layout=stretched)
        data = {"application/javascript": html.SCRIPT}  # it runs where the frontend runs scripts
        script = {"output_type": "display_data", "data": data, "metadata": {}}
        more = w.Accordion([w.HBox(searching, **row), self.code], titles=["Search", "Copy as code"])
        super().__init__(
            [
                self._style,
                w.HBox([self.image, self.upload, self.folder, self.own], **row),
                self.warning,
                w.HBox([self.words, self.status], **row),
                w.HBox([self.method, self.token, self.block, self.head], **row),
                w.HBox([maps, panel], layout=wrapped),
                more,
                w.Output(outputs=(script,), layout={"display": "none"}),
            ]
        )
        self.add_class("qv")
        for control in (*searching, *mapping, *self.parts.values()):
            control.observe(self.request, "value")
        self.opacity.observe(self._set_opacity, "value")
        self.upload.observe(self._add_upload, "value")
        self.folder.observe(lambda change: self._add_folder(change.new), "value")
        self.unmute.on_click(lambda _: self._mute(()))
        self.only.on_click(lambda _: self._mute({*config.visual_token_labels} - {self.token.label}))
        self.save.on_click(self._save)
        self._set_opacity()
        pictures = [pictures] if isinstance(pictures, str | os.PathLike) else [*pictures]
        if not pictures and self._source == "photos":
            from qvision_lab.figures import photographs

            pictures = photographs()
        if pictures:
            self._add_folder(pictures)
        self.request()

    def request(self, change: object = None) -> None:
        """Run the model for the state of the controls, in the worker's thread."""
        self.beams.disabled = self.search.value != "beams"
        for control in (self.temperature, self.top_p, self.seed):
            control.disabled = self.search.value != "sampling"
        request = Request(
            self.image.value,
            self._settings(),
            tuple(name for name, button in self.parts.items() if button.value),
            *(self._picked, self.method.value, self.token.value),
            *(None if c.value == "all" else int(c.value) for c in (self.block, self.head)),
            " ".join(self.own.value.split()),
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
        self._say("Running the model …")
        try:
            self._show(request, self.image.label, self.backend.run(request))
            self._say("Ready.")
        except Exception as error:  # it would be lost in this thread
            self._show_error(error)

    def _show(self, request: Request, name: str, results: list[Result]) -> None:
        traced, truth = results[0].trace, self._truths.get(name)
        if new := (name, traced.caption) != self._shown[:2]:
            marks = [""] * len(traced.words)
            if truth is not None:
                from qvision_lab.scenes import check

                marks = html.truth_marks(check(traced.caption, truth).claims, traced.words)
            self._write_words(results[0], marks)
        self._shown = name, traced.caption, results
        foreign = results[0].familiar is False
        self.warning.value = f"<div class='qv-warning'>{FOREIGN}</div>" if foreign else ""
        if new and results[0].word is not None:  # other words were pressed by whoever clicked
            self._press(traced.caption, results[0].word)
        titles = ["The model says"]
        if len(results) > 1:
            few = ", ".join(request.muted[:4]) + ", …" * (len(request.muted) > 4)
            titles.append(f"With {few} muted")
        else:
            self.muted.value = "<div class='qv-title'>Nothing is muted</div>Press what to mute."
        limits, whole = html.color_limits(results), results[0].caption
        for output, result, title in zip((self.whole, self.muted), results, titles, strict=False):
            output.value = html.result_html(result, limits, title, whole)
        self.probabilities.value = html.probabilities_html(results)
        self.code.value = f"<pre class='qv-code'>{escape(self._as_code(request, name))}</pre>"

    def _write_words(self, result: Result, marks: list[str]) -> None:
        """Separate buttons, known by their position: a word may occur twice.

        The tint is the confidence in a word's claim; without a calibration its probability.
        """
        buttons, words = [], result.trace.words
        likely, claims, confidence = self.backend.alternatives(result.trace)
        rows = zip(words, marks, result.trace.probabilities, likely, claims, strict=True)
        for i, (word, mark, probability, others, claim) in enumerate(rows):
            button = w.ToggleButton(description=f"{word.text} {mark}".strip())
            button.tooltip = f"probability {probability:.0%}; here the model would write {others}"
            if claim is not None:
                probability = claim.confidence
                button.tooltip = f"{claim.kind} right: {probability:.0%}; {button.tooltip}"
            if claim is not None or confidence is None:  # other words claim nothing
                button.add_class(f"qv-p{min(9, int(10 * probability))}")
            button.observe(partial(self._toggle, i), "value")
            buttons.append(button)
        old, self.words.children = self.words.children, buttons
        self._picked = result.trace.caption, max(0, min(self._picked[1], len(buttons) - 1))
        for button in old:
            button.close()

    def _toggle(self, index: int, change: object) -> None:
        if not change.new:  # the picked one stays pressed until another is
            change.owner.value = index == self._picked[1]
        elif index != self._picked[1]:
            self._press(self._shown[1], index)
            self.request()

    def _press(self, caption: str, index: int) -> None:
        self._picked = caption, index
        for i, button in enumerate(self.words.children):
            button.value = i == index

    def _as_code(self, request: Request, name: str) -> str:
        """The whole and the muted maps of the word in a few lines."""
        source = request.image.args[0]
        picture = repr(source if isinstance(source, str) else name)
        if name in self._truths:
            picture = f'ql.scenes.scene("test", 0, {name.split()[1]}).image'
        caption = self._shown[1]
        lines = [f"captioner = ql.load({self._source!r})"]
        lines.append(f"traced = ql.trace(captioner, {picture}, {caption!r})")
        lines.append(f"ql.word_maps(traced, {request.method!r})[{self._picked[1]}]")
        if request.muted:
            muted = self.backend.mute_arguments(request.muted).items()
            arguments = ", ".join(f"{key}={value}" for key, value in muted)
            lines.append(f"with ql.interventions.mute(captioner.model, {arguments}):")
            lines.append(f"    print(captioner.caption({picture}, preset='greedy').text)")
        return "\n".join(["import qvision_lab as ql", "", *lines])

    def _save(self, button: w.Button) -> None:
        name, _, results = self._shown
        rows = dict(zip(("whole", "muted"), (result.maps for result in results), strict=False))
        figure = map_sheet(results[0].trace.image, rows)
        figure.suptitle(results[0].trace.caption, fontsize=9)
        path = f"explorer_{re.sub(r'[^a-zA-Z0-9]+', '_', name)}.png"
        figure.savefig(path, dpi=200)
        plt.close(figure)
        self._say(f"Saved {path}.")

    def _set_opacity(self, change: object = None) -> None:
        own = f".qv {{ --qv-opacity: {self.opacity.value}; }}"
        self._style.value = f"<style>{html.STYLE}{own}</style>"

    def _say(self, text: str) -> None:
        self.status.value = f'<span role="status">{escape(text)}</span>'

    def _show_error(self, error: Exception) -> None:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self.status.value = f'<b role="alert" style="color:#c4314b">{escape(text)}</b>'

    def _add(self, images: Iterable[tuple[str, Picture]]) -> None:
        new = [(name, partial(open_image, image, name)) for name, image in images]
        self.image.options = [*new, *self.image.options]
        self.image.index = 0

    def _add_upload(self, change: object) -> None:
        self._add((file["name"], bytes(file["content"])) for file in self.upload.value)

    def _add_folder(self, places: str | Iterable) -> None:
        try:
            self._add((name, path) for path, name in walk_pictures(places))
        except ValueError as error:
            self._show_error(error)

    def _mute(self, names: Iterable[str]) -> None:
        for name, part in self.parts.items():
            part.value = name in names


explore = Explorer  # public as `ql.explore`
