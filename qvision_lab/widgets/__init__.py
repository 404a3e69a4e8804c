"""The explorer: an image, its caption and maps by the whole model and with parts muted.

`backend` runs a `Request` and returns a `Result` or two, `html` draws those, and `explorer` has the
controls, so that each can be tested without the others.
"""

from qvision_lab.widgets.explorer import Explorer

explore = Explorer  # public as `ql.explore`
__all__ = ["Explorer", "explore"]
