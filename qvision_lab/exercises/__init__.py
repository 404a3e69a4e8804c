"""Graded blanks of the notebooks.

An attempt runs next to our answer on cases of growing difficulty; any right form is accepted.
"""

import copy
from importlib.resources import files
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from qvision_lab.exercises.answers import READ, exercises

__all__ = ["check"]


def check(notebook: str, attempt: Any) -> None:
    """Print whether an attempt at the exercise of a notebook ("01" to "08") is right.

    If not, the hint says which case fails; `...` is "not attempted". ValueError for another name.
    """
    print(grade(notebook, attempt))


def grade(notebook: str, attempt: Any) -> str:
    """The sentence that `check` prints."""
    if notebook not in (known := exercises()):
        raise ValueError(f"no exercise {notebook!r}; choose one of {', '.join(known)}.")
    if attempt is ...:
        return "not attempted"
    answer, cases = known[notebook]
    read = READ.get(notebook, lambda returned, _: returned)
    hints = yaml.safe_load((files("qvision_lab.exercises") / "hints.yaml").read_text())
    for hint, arguments in zip(hints[notebook], cases, strict=True):
        ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
        expected = read(answer(*ours), ours)
        try:
            problem = _compare(read(attempt(*theirs), theirs), expected)
        except Exception as error:  # of any kind: the code is the reader's
            problem = f"raises {type(error).__name__}: {error}"
        if problem:
            return f"not yet: {problem}. {hint}"
        pairs = [(a, b) for a, b in zip(theirs, arguments, strict=True) if isinstance(a, Tensor)]
        if not all(torch.equal(a, b) for a, b in pairs):
            return "not yet: your function changes in place what it is handed; copy first."
    return "right"


def _compare(found: Any, expected: Any) -> str | None:
    """What is wrong with a result, or None."""
    if found is None or found is ...:
        return "your function returns nothing"
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return f"the result has the shape {list(found.shape)}, not {list(expected.shape)}"
    if expected.dtype.kind not in "fi":
        return None if np.array_equal(found, expected) else "the result is another one"
    if np.allclose(found, expected, rtol=1e-4, atol=1e-4):
        return None
    size = "small" if expected.ndim == 0 and found < expected else "large"
    return "numbers differ" if expected.ndim else f"{found:.6g} is too {size}"
