"""The fastest products of exact float32 that this build of PyTorch has on a CPU.

PyTorch multiplies float32 by MKL, which is slow on some processors. oneDNN, in the same wheel, gets float32 products
when it is allowed to use bfloat16 inside, and computes in float32 all the same where the processor has no matrix unit
for bfloat16 (AMX). Whether it does is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

EXACT = 5e-6
"""Largest relative error of a float32 product of a few hundred terms; one of bfloat16 factors has 2e-3."""


@contextmanager
def onednn_float32() -> Iterator[None]:
    """Float32 products of this process go to oneDNN while it is open. A switch of the whole process: for benchmarks."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def why_not_exact() -> str:
    """Why oneDNN's float32 products cannot stand for PyTorch's here; empty when they can."""
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    if torch.cpu._is_amx_tile_supported():
        return "with AMX, oneDNN would compute float32 products in bfloat16"
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=generator), torch.randn(96, 512, generator=generator)
    exact = x.double() @ w.double().T
    with torch.no_grad(), onednn_float32():
        error = float((torch.nn.functional.linear(x, w) - exact).norm() / exact.norm())
    return "" if error < EXACT else f"oneDNN's float32 products have a relative error of {error:.1e} here"
