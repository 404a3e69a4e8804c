"""Training: one path from a recipe to a checkpoint, for new models and for fine-tuning.

A training example goes through seven files: `recipe.py` reads the YAML, `train.py` runs it,
`data/coco.py` opens the captioned images, `features.py` encodes each image once with the frozen
tower, `samples.py` makes batches, `trainer.py` steps, and `model/captioner.py` gives the loss.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
