"""Plots show the values that they are given; the diagram is true for every configuration."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from qvision_lab import model, plots
from qvision_lab.model.architecture import architecture
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig

CAPTIONS = [SimpleNamespace(text=text) for text in ("a dog", "a cat", "a cup")]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_caption_sheet_shows_images_captions_and_marks(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "cup.png")
    images = [np.zeros((20, 30, 3), np.uint8), Image.new("P", (30, 20)), tmp_path / "cup.png"]
    figure = plots.caption_sheet(CAPTIONS, images, 2, [1, 0, 1])
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [["a dog", "✓"], ["a cat", "✗"], ["a cup", "✓"], []]
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="1 marks for 3 captions"):
        plots.caption_sheet(CAPTIONS, marks=[True])
    with pytest.raises(ValueError, match="no caption"):
        plots.caption_sheet([])


def test_training_curves_draw_losses_and_shares():
    log = pd.DataFrame({"step": [1, 2, 2], "loss": [3.0, 2.0, None]})
    others = {"eval_loss": [None, None, 0.4], "eval_cider": [None, None, 300.0]}
    ax = plots.plot_training_curves(log.assign(eval_true=[None, None, 0.5], **others))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3.0, 2.0])
    _, shares = ax.figure.axes
    assert len(shares.lines) == 1
    np.testing.assert_array_equal(shares.lines[0].get_ydata(), [0.5])


PHOTO = np.full((28, 56, 3), 128, np.uint8)  # twice as wide as high


def peaked(row, column, height=1.0, method="attention"):
    values = np.zeros((7, 7))
    values[row, column] = height
    return SimpleNamespace(values=values, label="dog", method=method)


def test_patch_maps_lie_flat_on_the_patches_of_a_grey_photo():
    ax = plots.plot_patch_map(PHOTO, peaked(1, 5), grid=True)
    photo, heat = ax.images
    assert photo.get_array().ndim == 2
    assert list(photo.get_extent()) == list(heat.get_extent()) == [0, 56, 28, 0]
    assert heat.get_interpolation() == "nearest"
    assert 0 < heat.get_alpha().min() < heat.get_alpha().max() < 1
    vertical, horizontal = ax.collections
    np.testing.assert_allclose([s[0, 0] for s in vertical.get_segments()], np.arange(0, 57, 8))
    np.testing.assert_allclose([s[0, 1] for s in horizontal.get_segments()], np.arange(0, 29, 4))
    ax.figure.set_dpi(100)
    ax.figure.canvas.draw()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[::-1]
    x, y = ax.transData.transform((5.5 * 8, 1.5 * 4)).astype(int)  # the middle of the peak
    elsewhere = ax.transData.transform((1.5 * 8, 1.5 * 4)).astype(int)
    assert pixels[y, x, :3].sum() > pixels[elsewhere[1], elsewhere[0], :3].sum() + 200
    (heat,) = plots.plot_patch_map(None, peaked(0, 0), vmax=4.0).images
    assert heat.get_alpha() is None  # opaque
    assert heat.get_clim() == (0, 4)


def test_sheets_share_a_scale_within_a_method():
    weak = [peaked(0, 0, height, method="a") for height in (0.2, 0.4)]
    rows = {"weak": weak, "strong": [peaked(0, 0, 30, method="b")]}
    figure = plots.map_sheet(PHOTO, rows)
    maps = [ax.images[-1] for ax in figure.axes[:3]]
    assert [heat.get_clim() for heat in maps] == [(0, 0.4), (0, 0.4), (0, 30)]
    assert len(figure.axes) == 4 + 2  # tiles and colour bars
    captioned = plots.map_sheet(PHOTO, rows, caption="a dog")
    assert captioned.axes[0].images[0].get_array().ndim == 3  # in colour
    assert captioned.axes[0].texts[0].get_text() == "a dog"
    with pytest.raises(ValueError, match="no map"):
        plots.map_sheet(PHOTO, {"empty": []})


def test_query_sheet_names_the_words_that_read_a_query():
    profiles = [SimpleNamespace(map=peaked(0, i), words=("dog", "red"), cost=i) for i in range(3)]
    texts = [[t.get_text() for t in ax.texts] for ax in plots.query_sheet(profiles, PHOTO).axes]
    assert texts == [[f"dog, red\ncost {i}.00"] for i in range(3)] + [[], [], []]  # and the bar
    (ax, *_) = plots.query_sheet([SimpleNamespace(map=peaked(0, 0), words=(), cost=-0.001)]).axes
    assert ax.texts[0].get_text().endswith("cost 0.00")


def test_removal_curves_are_means_with_their_area():
    kept = np.array([0.0, 0.5, 1.0])
    curves = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    ax = plots.plot_removal_curves(kept, {"by_chance": curves})
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0, 0.5, 1])
    assert ax.get_legend().texts[0].get_text() == "by chance (0.50)"
    assert len(ax.collections) == 1  # its band


def test_risk_curves_have_their_area_and_end_at_all_captions():
    ax = plots.plot_risk_coverage({"confidence": [0.0, 0.1, 0.2, 0.5], "constant": [0.5] * 4})
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.25, 0.5, 0.75, 1])
    labels = [text.get_text() for text in ax.get_legend().texts]
    assert labels == ["confidence (0.200)", "constant (0.500)"]


def test_effects_stand_side_by_side_at_their_words():
    words = [SimpleNamespace(text=text) for text in ("a", "dog")]
    both = [SimpleNamespace(label=name, words=words, change=[-1, i]) for i, name in enumerate("xy")]
    ax = plots.plot_effects(both)
    assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [[-1, 0], [-1, 1]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "dog"]
    centres = [[bar.get_center()[0] for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(np.mean(centres, axis=0), [0, 1], atol=1e-9)


def test_studies_are_drawn_sorted_with_a_zero_line_and_bands():
    rows = pd.DataFrame(
        {"difference": [1.0, -2.0, 3.0], "low": [0.5, -3.0, np.nan], "high": [1.5, -1.0, np.nan]},
        index=["better", "worse", "failed"],
    )
    ax = plots.plot_differences(rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["better", "worse"]
    assert ax.lines[-1].get_xdata() == [0, 0]
    ax = plots.plot_differences(rows.assign(corrected=[0.2, 0.01, np.nan]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["better", "worse *"]
    table = pd.DataFrame({"variant": ["a", "a", "b"], "seed": [0, 1, 0], "step": 1})
    table = table.assign(CIDEr=[1.0, 3.0, 5.0], seconds=[10.0, 20.0, 30.0])
    ax = plots.plot_tradeoff(table, "seconds", "CIDEr")
    assert [(text.get_text(), *text.xy) for text in ax.texts] == [("a", 15, 2), ("b", 30, 5)]
    ax = plots.plot_curves(table, "CIDEr")
    assert ax.lines[0].get_ydata().tolist() == [2]
    assert ax.collections[0].get_datalim(ax.transData).intervaly.tolist() == [1, 3]
    both = [table.assign(length=n, equal="steps", tuned=n == 600) for n in (150, 600)]
    ax = plots.plot_lengths(pd.concat([*both, both[1].assign(length=2400)]))
    assert ax.containers[0][0].get_ydata().tolist() == [2, 2]  # with tuned rates alone
    assert [label.get_text() for label in ax.get_xticklabels()] == ["600", "2,400"]
    assert ax.get_xscale() == "log"
    (low, high), _ = ax.containers[0][2][0].get_segments()  # of a, with two seeds
    assert high[1] - low[1] == pytest.approx(2 * 12.7062, rel=1e-4)  # t with 1 degree of freedom
    figure = plots.plot_parts({"short": rows, "long": rows, "longer": rows}, "above", margin=0.5)
    assert [ax.get_title() for ax in figure.axes] == ["short", "long", "longer", ""]
    assert figure.axes[0].patches[0].get_extents().transformed(
        figure.axes[0].transData.inverted()
    ).intervalx.tolist() == pytest.approx([-0.5, 0.5])


def test_the_diagram_has_every_stage_and_parameter_of_a_configuration(tiny):
    published = architecture(QVisionConfig())
    names = [stage.name for stage in published]
    inputs = ["image", "vision tower", "image projection", "Q-Former", "words so far"]
    assert names == [*inputs, "GPT-Neo", "bridge", "head"]
    assert sum(stage.parameters for stage in published) == 509_190_401
    assert published[3].output == "visual tokens [65, 1024]"
    files = {stage.file for stage in published if stage.file}
    assert all((Path(model.__file__).parent / file).exists() for file in files)
    trained = pd.Index(["Q-Former", "bridge"])
    ax = plots.plot_architecture(published, highlight="Q-Former", trained=trained)
    drawn = {text.get_text() for text in ax.texts}
    assert {*names, *(stage.output for stage in published), "qformer.py\n52,550,656"} <= drawn
    outlined = [box for box in ax.patches if box.get_linewidth() > 2]
    assert len(outlined) == 1
    with pytest.raises(ValueError, match="no stage 'decoder'; choose from image, vision tower"):
        plots.plot_architecture(published, highlight="decoder")


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"bridge": "prefix"}, {"GPT-Neo": ("words so far", "Q-Former"), "head": ("GPT-Neo",)}),
        ({"bridge_reads": "image_tokens"}, {"bridge": ("image projection", "GPT-Neo")}),
        ({"bridge_reads": "mean_image_token"}, {"bridge": ("mean", "GPT-Neo")}),
        ({"global_token": "added"}, {"GPT-Neo": ("words so far", "Q-Former")}),
    ],
)
def test_the_diagram_is_true_for_variants(tiny, changes, reads):
    config = QVisionConfig.from_dict(tiny.config.to_dict() | changes)
    stages = {stage.name: stage for stage in architecture(config)}
    assert {name: stages[name].reads for name in reads} == reads
    with torch.device("meta"):
        expected = sum(p.numel() for p in QVisionForConditionalGeneration(config).parameters())
    assert sum(stage.parameters for stage in stages.values()) == expected
    plots.plot_architecture(tuple(stages.values()))
