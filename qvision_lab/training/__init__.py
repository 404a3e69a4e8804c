"""Training: recipes that make checkpoints, on transformers' Trainer."""

from qvision_lab.training.recipe import run_recipe

__all__ = ["run_recipe"]
