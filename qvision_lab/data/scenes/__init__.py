"""Scenes, the drawn world: pictures whose whole truth is known, with captions that keep to it.

`world` says what is in a scene, `drawing` how it is drawn, `telling` how it is told, and
`checking` judges what a caption claims. Splits: `train`, `val` and `test` are alike; `compose` has
pairs of colour and object that the others never show; `crowd` has five to eight objects.
"""

from qvision_lab.data.scenes.checking import Check, check, score
from qvision_lab.data.scenes.coco_export import write_coco
from qvision_lab.data.scenes.drawing import Scene, generate, scene
from qvision_lab.data.scenes.world import SPLITS, Layout, describe, layout

__all__ = [
    "SPLITS",
    "Check",
    "Layout",
    "Scene",
    "check",
    "describe",
    "generate",
    "layout",
    "scene",
    "score",
    "write_coco",
]
