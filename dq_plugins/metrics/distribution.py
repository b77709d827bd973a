"""Distance between two sets of samples as distributions. Computed in float64.

Shapes: ``N`` samples, ``D`` features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.metrics.base import metric


@metric(higher_is_better=False)
def frechet(reference: Tensor, output: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    With Inception features this is the FID (Heusel et al. 2017). Needs more samples than features to mean much; with
    fewer the covariances are of low rank, and it still ranks.

    Args:
        reference: ``[N, ...]``, flattened to ``[N, D]``.
        output: the same shape.
    """
    x, y = (t.reshape(len(t), -1) for t in (reference, output))
    means = float((x.mean(0) - y.mean(0)).square().sum())
    # C = A' A with A = (x - mean) / sqrt(n - 1); tr (C1 C2)^(1/2) is the sum of singular values of A1 A2', and of the
    # product of the triangular factors, which are no larger than min(N, D)
    a, b = (torch.linalg.qr((t - t.mean(0)) / max(len(t) - 1, 1) ** 0.5, mode="r").R for t in (x, y))
    cross = float(torch.linalg.svdvals(a @ b.T).sum())
    return max(means + float(a.square().sum() + b.square().sum()) - 2 * cross, 0.0)
