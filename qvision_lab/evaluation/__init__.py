"""Captions and references in, numbers with error bars out. No model is known here, and no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chair": ["chair", "coco_vocabulary", "scenes_vocabulary"],
        "report": ["Comparison", "EvaluationReport", "compare", "evaluate"],
        "results": ["evaluate_dataset", "read_captions", "read_results", "write_results"],
        "statistics": ["CaptionStatistics", "caption_statistics"],
    },
)
