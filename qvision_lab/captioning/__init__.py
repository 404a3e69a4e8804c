"""Captioning of images, batches and folders: files are read, batched, captioned and recorded."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"captioner": ["BATCH_SIZES", "Captioner", "load"], "records": ["Caption"]},
)
