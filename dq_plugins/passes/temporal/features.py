"""How far quantized temporal features are from the full-precision ones.

Shapes: a feature is ``[T, ...]``: one row per timestep. Sums are accumulated in float64.
Source: TFMQ-DM (Huang et al. 2024), section 3: temporal feature error and temporal mismatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class FeatureError:
    """Errors of temporal features, averaged over the features.

    Attributes:
        cosine: mean over timesteps of ``1 - cos(e_t, e^_t)``.
        mismatch: share of timesteps whose nearest full-precision feature (by cosine) belongs to another timestep.
        relative: squared error over squared norm.
    """

    cosine: float
    mismatch: float
    relative: float


def _rows(feature: Tensor) -> Tensor:
    return feature.detach().flatten(1).double()


def feature_error(reference: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> FeatureError:
    """Compare features by name; those that do not change with the timestep are left out of the mismatch.

    Args:
        reference: full-precision features ``[T, ...]``.
        quantized: the same names and shapes.
    """
    cosine, mismatch, relative = [], [], []
    for name, feature in reference.items():
        e, e_hat = _rows(feature), _rows(quantized[name])
        cosine.append((1 - F.cosine_similarity(e, e_hat, dim=1)).mean())
        relative.append((e - e_hat).square().sum() / e.square().sum().clamp_min(1e-30))
        if len(e) > 1 and bool((e.std(0) > 0).any()):
            similarity = F.normalize(e_hat, dim=1) @ F.normalize(e, dim=1).T
            mismatch.append((similarity.argmax(1) != torch.arange(len(e), device=e.device)).double().mean())
    mean = lambda values: float(torch.stack(values).mean()) if values else 0.0  # noqa: E731
    return FeatureError(mean(cosine), mean(mismatch), mean(relative))
