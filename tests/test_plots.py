"""Plots say what was handed in, and leave showing and saving to the caller."""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from qvision_lab.plots import caption_sheet, plot_training_curves


@dataclass
class Said:
    text: str
    source: str = "nowhere.png"


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_caption_sheet_shows_pictures_captions_and_marks():
    pictures = [np.zeros((20, 30, 3), np.uint8)] * 3
    figure = caption_sheet([Said("a dog"), Said("a cat"), Said("a cup")], pictures, 2, [1, 0, 1])
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [["a dog", "✓"], ["a cat", "✗"], ["a cup", "✓"], []]
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 0]


def test_caption_sheet_wants_one_of_each():
    with pytest.raises(ValueError, match="1 marks for 2 captions"):
        caption_sheet([Said("a dog")] * 2, marks=[True])
    with pytest.raises(ValueError, match="no caption"):
        caption_sheet([])


def test_training_curves_draw_every_column():
    log = pd.DataFrame({"step": [1, 2, 2], "loss": [3.0, 2.0, None]})
    ax = plot_training_curves(log.assign(eval_true=[None, None, 0.5]))
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3.0, 2.0])
    _, shares = ax.figure.axes
    np.testing.assert_array_equal(shares.lines[0].get_ydata(), [0.5])
