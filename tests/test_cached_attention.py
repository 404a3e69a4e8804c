"""The Triton kernel of cached attention, interpreted without a GPU, equals PyTorch's."""

import importlib.util
import os
import subprocess
import sys

import pytest

# Triton reads its environment when it is imported, which this process may have done already.
COMPARE = """
import torch
from qvision_lab.captioning.cached_attention import attend_to_cache, launch

SIZES = [(1, 1, 4, 1, 1), (3, 2, 8, 20, 20), (2, 3, 24, 16, 5), (2, 2, 64, 48, 1), (5, 4, 6, 9, 4)]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, heads, width, length, window in SIZES:
        torch.manual_seed(0)
        old = torch.randn(rows, 2, heads, length, width).to(dtype)  # of an earlier batch
        mine, theirs = old.clone(), old.float()
        for place in range(length):
            made = torch.randn(rows, 3, heads, width).mul(0.5).to(dtype)
            position = torch.tensor([place])
            expected = attend_to_cache(made.float(), theirs, position, window)
            read = launch(made, mine, position, window)
            rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(read.float(), expected, atol=1e-5, rtol=1e-5 + rounding)
            assert mine.float().equal(theirs)
print("the same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
def test_the_kernel_equals_pytorch():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", COMPARE], env=env, capture_output=True, text=True)
    assert ran.stdout == "the same\n", ran.stderr
