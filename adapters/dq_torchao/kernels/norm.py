"""The statistics of layer and group normalisation by kernels of ours, in graphs for inference.

The compiler's loops compute 1 / sqrt(variance + eps) of a row again for every 16 of its values, which takes longer than
the rest, and take a group of a channels-last image in steps of its few channels. As two small tensors the statistics
are loaded instead (`dq_torchao.kernels.merging` puts them there).

Shapes: of rows, ``x [..., K]``, both results ``[..., 1]``; of ``G`` groups of channels, ``x [N, C, H, W]``, both
results ``[N, G, 1, 1]``.
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


torch.library.define(
    "dq_torchao::group_statistics",
    "(Tensor x, int groups, float eps) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides,),
)


@torch.library.register_fake("dq_torchao::group_statistics")
def _(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), groups, 1, 1)), x.new_empty((len(x), groups, 1, 1))


def group_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every sample's groups of channels.

    Args:
        x: float32 ``[N, C, H, W]``, not empty.
        groups: G, which divides C.
        eps: what is added to the variance.
    """
    samples, channels, height, width = x.shape
    if x.is_contiguous():
        mean, inverse = row_statistics(x.view(samples, groups, 1, -1), eps)
        return mean, inverse
    mean, inverse = (x.new_empty((samples, groups, 1, 1)) for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last)
    sizes, results = (samples, height * width, channels, groups), (mean.data_ptr(), inverse.data_ptr())
    if not native.library().dq_group_statistics(x.data_ptr(), *sizes, eps, *results, torch.get_num_threads()):
        raise MemoryError("no memory for the sums of channels")
    return mean, inverse


torch.library.impl("dq_torchao::group_statistics", "CPU")(group_statistics)
