"""Scenes, the drawn world: pictures whose whole truth is known, with captions that keep to it.

`layout` says what is in a scene, `drawing` draws it, `captions` writes its captions, and `checker`
judges what a caption claims. Splits: `train`, `val` and `test` are alike; `compose` has
pairs of colour and object that the others never show; `crowd` has five to eight objects.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checker": ["Check", "check", "score"],
        "export": ["write_coco"],
        "drawing": ["Scene", "generate", "scene"],
        "layout": ["SPLITS", "Layout", "describe", "layout"],
    },
)
