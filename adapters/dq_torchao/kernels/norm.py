"""The statistics of layer normalisation by a kernel of ours, in graphs whose weights are frozen.

The compiler's loops compute 1 / sqrt(variance + eps) of a row again for every 16 of its values, which takes longer than
the rest. As two small tensors they are loaded instead (`dq_torchao.kernels.merging` puts them there).

Shapes: ``x [..., K]``, both results ``[..., 1]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_torchao.kernels import native

torch.library.define(
    "dq_torchao::row_statistics",
    "(Tensor x, float eps) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)


@torch.library.register_fake("dq_torchao::row_statistics")
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], 1)), x.new_empty((*x.shape[:-1], 1))


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) over the last dimension.

    Args:
        x: float32 ``[..., K]``, K > 0.
        eps: what is added to the variance.
    """
    x, (mean, inverse) = x.contiguous(), (x.new_empty((*x.shape[:-1], 1)) for _ in range(2))
    rows, columns = mean.numel(), x.shape[-1]
    results = mean.data_ptr(), inverse.data_ptr()
    native.library().dq_row_statistics(x.data_ptr(), rows, columns, eps, *results, torch.get_num_threads())
    return mean, inverse


torch.library.impl("dq_torchao::row_statistics", "CPU")(row_statistics)
