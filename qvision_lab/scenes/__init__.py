"""Scenes, a drawn world: images whose whole truth is known, with true captions.

`layout` samples a scene, `drawing` draws it, `captions` captions it, `checker` judges the claims
of a caption. Splits: `train`, `val` and `test` are alike; `compose` has pairs of colour and object
that the others never show; `crowd` has five to eight objects.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
