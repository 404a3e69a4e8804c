"""Plots with matplotlib: axes or figures are returned, not shown or saved."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "architecture": ["plot_architecture"],
        "images": ["caption_sheet", "map_sheet", "plot_patch_map", "query_sheet"],
        "charts": [
            "plot_curves",
            "plot_differences",
            "plot_effects",
            "plot_removal_curves",
            "plot_risk_coverage",
            "plot_scores",
            "plot_tradeoff",
            "plot_training_curves",
        ],
    },
)
