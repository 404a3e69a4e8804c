"""The diagram of the model is true for every configuration."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from qvision_lab import model
from qvision_lab.model.architecture import architecture
from qvision_lab.model.captioner import QVisionForConditionalGeneration
from qvision_lab.model.config import QVisionConfig
from qvision_lab.plots import plot_architecture


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_the_diagram_has_every_stage_and_parameter_of_a_configuration(tiny):
    published = architecture(QVisionConfig())
    names = [stage.name for stage in published]
    assert names == [
        *("image", "vision tower", "image projection", "Q-Former"),
        *("words so far", "GPT-Neo", "bridge", "head"),
    ]
    assert sum(stage.parameters for stage in published) == 509_190_401
    assert published[3].output == "visual tokens [65, 1024]"
    files = {stage.file for stage in published if stage.file}
    assert all((Path(model.__file__).parent / file).exists() for file in files)
    ax = plot_architecture(
        published, highlight="Q-Former", trained=pd.Index(["Q-Former", "bridge"])
    )
    drawn = {text.get_text() for text in ax.texts}
    assert {*names, *(stage.output for stage in published), "qformer.py\n52,550,656"} <= drawn
    outlined = [box for box in ax.patches if box.get_linewidth() > 2]
    assert len(outlined) == 1
    with pytest.raises(ValueError, match="no stage 'decoder'; choose from image, vision tower"):
        plot_architecture(published, highlight="decoder")


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
    plot_architecture(tuple(stages.values()))
