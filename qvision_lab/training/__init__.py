"""Training: recipes that make checkpoints, on transformers' Trainer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"recipe": ["run_recipe"]}
)
