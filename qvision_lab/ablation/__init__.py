"""Ablations: a study of variants and seeds, one table, and only what its intervals support."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
