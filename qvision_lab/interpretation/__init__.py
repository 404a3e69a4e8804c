"""Looking inside: recorded passes, maps of words and queries, interventions, and their truth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["faithfulness", "interventions", "maps", "queries", "trace"]
)
