"""The Triton kernel of cached attention, interpreted without a GPU, equals PyTorch's."""

import os
import subprocess
import sys
from itertools import product
from unittest.mock import patch

import pytest
import torch

from qvision_lab.captioning import cached_attention
from qvision_lab.captioning.cached_attention import attend_to_cache, launch


def compare_kernel(sizes: list, dtypes: tuple, device: str, tolerance: float) -> None:
    """The kernel against PyTorch; sizes are rows, heads, width, length and window."""
    draw = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    run = attend_to_cache if device == "cuda" else launch
    for dtype, (rows, heads, width, length, window) in product(dtypes, sizes):
        mine = torch.randn(rows, 2, heads, length, width, **draw).to(dtype)  # of an earlier batch
        theirs = mine.float().clone()
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
        for place in range(length):
            made = torch.randn(rows, 3, heads, width, **draw).mul(0.5).to(dtype)
            position = torch.tensor([place], device=device)
            read = run(made, mine, position, window)
            with patch.object(cached_attention, "triton", None):
                expected = attend_to_cache(made.float(), theirs, position, window)
            close = {"atol": tolerance, "rtol": tolerance + rounding}
            torch.testing.assert_close(read.float(), expected, **close)
            assert mine.float().equal(theirs)


# Triton reads its environment when it is imported, which this process may have done already.
INTERPRETED = """
import torch
from test_cached_attention import compare_kernel
sizes = [(1, 1, 4, 1, 1), (2, 2, 8, 20, 20), (1, 3, 24, 16, 5), (1, 2, 64, 33, 1), (2, 4, 6, 9, 4)]
compare_kernel(sizes, (torch.float32, torch.bfloat16), "cpu", tolerance=1e-5)
print("the same")
"""


@pytest.mark.skipif(cached_attention.triton is None, reason="no triton here")
def test_the_kernel_equals_pytorch():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", INTERPRETED]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.stdout == "the same\n", ran.stderr
