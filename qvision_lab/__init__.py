"""A captioner to open up and learn from: frozen CLIP, a Q-Former and GPT-Neo.

Everything is loaded on first use: importing this package touches no network and no device.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
