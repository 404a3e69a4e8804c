"""The explorer: an image, its caption and maps by the whole model and with parts muted.

`backend` runs a `Request` and returns a `Result` or two, `html` draws those, and `explorer` has the
controls, so that each can be tested without the others.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
