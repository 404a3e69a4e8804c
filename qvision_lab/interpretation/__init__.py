"""Recorded passes, maps of words and queries, their collapse, interventions, tests of the maps."""

import lazy_loader

from qvision_lab.interpretation import page as page  # gives traces their `to_html`

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["collapse", "faithfulness", "interventions", "maps", "page", "queries", "trace"],
)
