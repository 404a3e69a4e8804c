"""Ablations: a study of variants and seeds, one table, and only what its intervals support."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "analysis": [
            "averages",
            "crossover",
            "differences",
            "differences_of_scenes",
            "part",
            "parts",
            "summarise",
        ],
        "study": ["Study"],
    },
)
