"""Scores of captions against references, with intervals; imports neither torch nor a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chair": ["chair", "coco_vocabulary"],
        "report": [
            *("Comparison", "EvaluationReport", "compare", "evaluate", "evaluate_dataset"),
            *("read_captions", "read_results", "write_results"),
        ],
        "statistics": ["caption_statistics"],
    },
)
