"""What a training step costs in each arm of the study `length`, which fixes equal compute."""

from collections.abc import Callable, Iterator
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from qvision_lab.benchmark.harness import Spread, Table, identity_of, interleave, machine
from qvision_lab.captioning import Captioner
from qvision_lab.data.coco import open_dataset
from qvision_lab.model.loading.checkpoint import Checkpoint
from qvision_lab.training import freezing, load_recipe
from qvision_lab.training.optimizers import MuonAdamW
from qvision_lab.training.recipe import Recipe, read_yaml
from qvision_lab.training.samples import CaptionCollator, CaptionSamples
from qvision_lab.training.train import change_model

STUDY = files("qvision_lab") / "ablation/studies/length.yaml"
BASE, ROUNDS = "base", 100


def run_benchmarks(captioner: Captioner, quick: bool = False) -> Iterator[Table]:
    """Time training steps of one batch of Scenes in turn, with one thread, as a study's runs have.

    The batch holds states of the frozen tower; arms are those of the recipe, which the study keeps.
    """
    variants = {BASE: {}, **read_yaml(STUDY)["variants"]}
    recipes = {name: load_recipe("ablation", changes) for name, changes in variants.items()}
    settings = recipes[BASE].training
    images = open_dataset("scenes:train", n=settings.batch_size)
    samples = CaptionSamples(
        images, captioner.processor, settings.captions_per_image, settings.max_tokens, seed=0
    )
    batch = CaptionCollator(captioner.model.config.pad_token_id)([*samples])
    batch = {name: values.to(captioner.model.device) for name, values in batch.items()}
    with torch.no_grad():
        batch["vision_states"] = captioner.model.vision.encode(batch.pop("pixel_values"))
    steps = {name: training_step(captioner, recipe, batch) for name, recipe in recipes.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds, computer = interleave(steps, ROUNDS, quick), machine()
    finally:
        torch.set_num_threads(threads)
    rows = tuple(
        {
            "variant": name,
            "seconds": spent,
            "step": Spread.of(spent),
            "cost": Spread.ratio(spent, seconds[BASE]),
        }
        for name, spent in seconds.items()
    )
    about = {"quick": quick, "machine": computer, "identity": identity_of(captioner, train=images)}
    yield Table(name="costs", rows=rows, **about)


def training_step(
    captioner: Captioner, recipe: Recipe, batch: dict[str, Tensor]
) -> Callable[[], None]:
    """A step of the model that a recipe trains, from random weights."""
    settings = recipe.training
    model = change_model(Checkpoint(captioner.model, captioner.processor), recipe).model.train()
    freezing.apply(model, settings.phases[-1].policy)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rates = settings.learning_rate, settings.matrix_learning_rate
    optimizer = MuonAdamW(model, *rates, weight_decay=settings.weight_decay)

    def step() -> None:
        model(**batch).loss.backward()
        clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step
