"""Distance between two sets of samples as distributions. Computed in float64.

Shapes: ``N`` and ``M`` samples, ``D`` features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.metrics.metric import metric


class _AsTheyAre(nn.Module):
    """Features for a library that would compute them itself."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    With Inception features this is the FID (Heusel et al. 2017). Needs more samples than features to mean much; with
    fewer the covariances are of low rank, and it still ranks.

    Args:
        x: ``[N, D]``.
        y: ``[M, D]``, on the same device.

    Raises:
        DQError: a set holds fewer than two samples, which have no covariance.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(x), len(y)) < 2:
        raise DQError(f"a Frechet distance needs two samples or more on either side; got {len(x)} and {len(y)}")
    x, y = x.double(), y.double()
    # both Gaussians lie in the span of the samples; in its coordinates the covariances are no larger than N + M
    basis = torch.linalg.qr(torch.cat([x, y]).T).Q  # [D, min(N + M, D)]
    distance = FrechetInceptionDistance(_AsTheyAre(basis.shape[1]), normalize=True).to(x.device)
    distance.update(x @ basis, real=True)
    distance.update(y @ basis, real=False)
    return max(float(distance.compute()), 0.0)


@metric(higher_is_better=False)
def frechet(reference: Tensor, output: Tensor) -> float:
    """Frechet distance between two sets of samples as they come, without a network.

    Args:
        reference: ``[N, ...]``, flattened to ``[N, D]``.
        output: the same shape.
    """
    return frechet_distance(reference.flatten(1), output.flatten(1))
