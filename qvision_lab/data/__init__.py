"""Images with reference captions, from files or plugins; independent of any model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["coco"])
