"""Where there is no GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is imported."""

import os
from collections.abc import Iterator

import pytest
import torch
from warm_python import WarmPython

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs scripts, each in a process of its own that need not import torch and diffusers again."""
    with WarmPython() as python:
        yield python
