"""Scenes, the drawn world: pictures whose whole truth is known, with captions that keep to it.

`world` says what is in a scene, `drawing` how it is drawn, `telling` how it is told, and
`checking` judges what a caption claims. Splits: `train`, `val` and `test` are alike; `compose` has
pairs of colour and object that the others never show; `crowd` has five to eight objects.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checking": ["Check", "check", "score"],
        "coco_export": ["write_coco"],
        "drawing": ["Scene", "generate", "scene"],
        "world": ["SPLITS", "Layout", "describe", "layout"],
    },
)
