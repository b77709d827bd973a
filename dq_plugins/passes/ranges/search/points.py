"""Loss of the search on the layers' own inputs: the error of their quantization, from weighted values.

No denoiser runs: a few dozen values of each layer and timestep stand for its distribution, so an iteration sees every
timestep and takes milliseconds.

Shapes: ``L`` layers, ``T`` timesteps, ``N`` values, ``G`` groups, ``Q`` sets of groups (1 or L).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dq_plugins.passes.ranges.search.mixture import mixture
from dq_plugins.passes.ranges.search.relaxation import Relaxation

POINTS = 128


def representative(values: Tensor, weights: Tensor, count: int = POINTS) -> tuple[Tensor, Tensor]:
    """At most ``count`` weighted values that stand for many: runs of neighbours, each as its mean.

    Runs are of equal weight, but a value that alone lies in a tail keeps to itself, because clipping is about tails.

    Args:
        values: ascending ``[n]``.
        weights: how often each occurs ``[n]``.
        count: N.

    Returns:
        Values and weights ``[N]``, both float32; weights sum to 1, and entries left over have weight 0.
    """
    weights = weights.double() / weights.double().sum()
    # half of the runs divide the mass, half the range
    mass = ((weights.cumsum(0) - weights / 2) * (count // 2)).long()
    span = (values.double() - values[0]) / (values[-1] - values[0]).double().clamp(min=1e-30)
    cell = mass + (span * (count - count // 2 - 1)).long()
    _, run = cell.unique_consecutive(return_inverse=True)
    size = int(run[-1]) + 1
    total = torch.zeros(max(size, count), dtype=torch.float64).index_add_(0, run, weights)
    mean = torch.zeros_like(total).index_add_(0, run, weights * values.double()) / total.clamp(min=1e-30)
    return mean[:count].float(), total[:count].float()


class PointsLoss:
    """Squared error of quantized values, relative to each layer's power, mean over layers.

    Args:
        values: ``[L, T, N]``.
        weights: how often each occurs, ``[L, T, N]``; they sum to 1 over N, or to 0 at a timestep not seen yet.
        bits: width by layer ``[L]``.
        symmetric: whether zero points are 0.
        power: mean square of each layer ``[L]``; None: that of the values.

    Attributes:
        power: the same.
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor,
        bits: Sequence[int],
        *,
        symmetric: bool,
        power: Tensor | None = None,
    ) -> None:
        self.values, self.mass, self.symmetric = values.float(), weights.float(), symmetric
        # the layers of each width, by index
        self.widths = {w: torch.tensor([i for i, b in enumerate(bits) if b == w]) for w in sorted(set(bits))}
        if power is None:
            power = (self.mass * self.values.square()).sum((1, 2)) / self.mass.sum((1, 2)).clamp(min=1e-30)
        self.power = power
        # every layer counts alike, whatever its scale; every timestep as much as its error
        self.share = (self.mass / power.clamp(min=1e-30).reshape(-1, 1, 1)) / len(bits)

    @property
    def per_round(self) -> int:
        """Every iteration sees every timestep."""
        return 1

    def timesteps(self, iteration: int) -> list[int]:
        """Indices of the timesteps that an iteration sees: all that hold values."""
        return self.mass.sum((0, 2)).nonzero().flatten().tolist()

    def loss(self, iteration: int, weights: Tensor, relaxation: Relaxation) -> Tensor:
        """Mean relative error over the timesteps of this iteration.

        Args:
            iteration: its number.
            weights: ``[Q, n, G]`` for the n timesteps of `timesteps`.
            relaxation: the ranges.
        """
        seen = self.timesteps(iteration)
        low, high = relaxation.ranges()
        total = torch.zeros(())
        for width, layers in self.widths.items():
            x = self.values[layers][:, seen]
            w = weights.movedim(-1, 0).unsqueeze(-1)  # [G, Q, n, 1]
            w = w if w.shape[1] == 1 else w[:, layers]
            ends = (end[layers].T.reshape(relaxation.groups, -1, 1, 1) for end in (low, high))
            mixed = mixture(x, w, *ends, bits=width, symmetric=self.symmetric)
            total = total + (self.share[layers][:, seen] * (mixed - x).square()).sum()
        return total / max(len(seen), 1)

    @torch.no_grad()
    def judge(self, weights: Tensor, relaxation: Relaxation) -> float:
        """Mean relative error over the timesteps; ``weights`` is ``[Q, T, G]``."""
        return float(self.loss(0, weights[:, self.timesteps(0)], relaxation))
