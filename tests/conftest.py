"""Where there is no GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is imported.

Property tests draw the same examples in every run, so that a change is judged by what it changed. To look for new
ones: `pytest --hypothesis-profile=default`.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from warm_python import WarmPython

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs scripts, each in a process of its own that need not import torch and diffusers again."""
    with WarmPython() as python:
        yield python
