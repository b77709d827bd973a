"""Branches of small rank that a layer may have: of its weight, and of its input.

Shapes: ``C`` input channels, ``O`` outputs, ``K`` products per output, ``r`` rank, ``R`` rows of the input.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq_plugins.plan import LowRank, Subspace, Targets
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.quantized.rotate import Rotate
from dq_plugins.quantized.split import Split
from dq_plugins.quantized.weight_scale import layer_quantizer

LowRankMethod = Literal["weight", "error", "weighted-error", "principal"]
"""See `dq_plugins.passes.rotation.low_rank_branch`."""
Branch = LowRank | Subspace
DAMPING = 1e-2
"""Of the second moments, as a share of their mean diagonal."""


def beside(branch: Branch, balance: Tensor | None, rotate: Rotate | None) -> LayerTransform:
    """What a layer does to its input and weight with a branch."""
    if isinstance(branch, Subspace):
        return LayerTransform(balance, rotate, split=Split(branch))
    return LayerTransform(balance, rotate, branch)


def subspace_of(inputs: Tensor, rank: int) -> Subspace | None:
    """The principal directions of an input; None where it has no more channels than that.

    Args:
        inputs: rows, ``[R, C, ...]``; second moments are of the values at all positions, without their mean taken
            away, in float64.
        rank: r.
    """
    values = inputs.double().movedim(1, -1).reshape(-1, inputs.shape[1])  # [.., C]
    if rank >= values.shape[1]:
        return None
    directions = torch.linalg.eigh(values.T @ values).eigenvectors  # ascending
    return Subspace(directions[:, -rank:].flip(1).T.half().contiguous().cpu())


def low_rank_of(
    method: LowRankMethod,
    layer: nn.Module,
    inputs: Tensor,
    rank: int,
    targets: Targets,
    balance: Tensor | None = None,
    rotate: Rotate | None = None,
) -> LowRank | None:
    """A low-rank branch of a layer; None where float16 does not hold it.

    Args:
        method: not ``"principal"``.
        layer: linear, or a convolution without groups.
        inputs: rows of its input, ``[R, C, ...]``.
        rank: r, at most the smaller side of the weight.
        targets: how the weight is quantized.
        balance: what the input is divided by, ``[C]``.
        rotate: what it is rotated by then.
    """
    own: Any = layer.weight
    weight = own.detach().float()
    balanced = LayerTransform(balance)
    if method == "weight":
        wanted, metric = balanced.of_weight(layer, weight), None  # rotations leave singular values as they are
    else:
        transform = LayerTransform(balance, rotate)
        quantized = layer_quantizer(layer, targets.weight_bits, targets, method="coarse", transform=transform)
        fake = transform.weight_restored(layer, quantized.fake_quantize(transformed_weight(layer, transform)))
        wanted, metric = weight - fake.float(), inputs.flatten(1) if method == "weighted-error" else None
    up, down = _truncated(wanted.flatten(1).double(), None if metric is None else metric.double(), rank)
    if method == "weight":
        down = balanced.weight_restored(layer, down.reshape(rank, *weight.shape[1:]).float()).flatten(1).double()
    size = (up.abs().amax(0) / down.abs().amax(1).clamp_min(1e-30)).sqrt()  # alike on both sides: float16 is narrow
    up, down = (up / size).half().cpu(), (down * size[:, None]).half().cpu()
    finite = bool(torch.isfinite(up).all() and torch.isfinite(down).all())
    return LowRank(down, up) if finite else None


def _truncated(matrix: Tensor, rows: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """``up [O, r]`` and ``down [r, K]`` of least ``|(up down - matrix) X^T|``, or without X of least ``|...|``.

    From the smaller of the two Gram matrices. That of few outputs, A S A^T, takes no matrix of K^2 second moments S.
    """
    outputs, products = matrix.shape
    damping = 0.0 if rows is None else DAMPING * float(rows.square().mean())
    if outputs <= products:
        seen = matrix if rows is None else matrix @ rows.T / len(rows) ** 0.5  # [O, K] or [O, R]
        gram = seen @ seen.T + (0.0 if rows is None else damping * matrix @ matrix.T)  # [O, O]
        up = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
        return up, up.T @ matrix
    root = torch.eye(products, dtype=matrix.dtype)
    if rows is not None:
        root = torch.linalg.cholesky(rows.T @ rows / len(rows) + max(damping, 1e-30) * root)
    seen = matrix @ root  # moments = root root^T, so |A X^T|^2 = |A root|^2 R
    right = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -rank:].flip(1)  # [K, r]
    return seen @ right, torch.linalg.solve_triangular(root.T, right, upper=True).T
