"""Tests that need a GPU; everywhere else they are skipped."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def needs_gpu() -> None:
    """Before all other fixtures, so that nothing is made for a test that is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("on a machine with a GPU, run `make test-gpu`")
