"""The AdaRound relaxation of one weight tensor.

    h(a) = clip(1.2 * sigmoid(a) - 0.1, 0, 1)                        how far up each weight is rounded
    w^   = s * (clip(floor(w / s) + h(a) + z, q_min, q_max) - z)     differentiable in a
    L    = loss + weight * sum(1 - |2 h(a) - 1|^beta)                a is decided in the end

Source: Nagel et al. 2020 (AdaRound), eq. 21-24; used by BRECQ, Q-Diffusion and TFMQ-DM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.rounding_variables import RoundingMethod, RoundingVariables

STRETCH, OFFSET = 1.2, 0.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """``h(a)``: a sigmoid stretched to [-0.1, 1.1] and clipped, so that 0 and 1 are reached at finite ``a``."""
    return (torch.sigmoid(alpha) * STRETCH - OFFSET).clamp(0, 1)


class SoftRounding(RoundingVariables):
    """``a``, for one weight. Learning starts at the full-precision weight, whatever codes the quantizer has."""

    def __init__(self, weight: Tensor, quant: WeightQuant) -> None:
        super().__init__(weight, quant)
        self.floor = torch.floor(self.ratio)
        self.parameter = self._initial(self.ratio - self.floor).requires_grad_(True)

    @staticmethod
    def _initial(fraction: Tensor) -> Tensor:
        """``a`` with ``h(a) = fraction``: the relaxed weight starts at the full-precision one."""
        return -torch.log(STRETCH / (fraction + OFFSET) - 1)

    def up(self) -> Tensor:
        """``h(a)`` in [0, 1]."""
        return rectified_sigmoid(self.parameter)

    def soft(self) -> Tensor:
        """Relaxed weight, differentiable in ``a``."""
        return self.weight(self.floor + self.up())

    def rounded(self) -> Tensor:
        """Up where ``a >= 0``, down elsewhere."""
        return self.floor + (self.parameter.detach() >= 0).float()

    def undecided(self, beta: float) -> Tensor:
        """Regulariser ``sum(1 - |2 h - 1|^beta)``: zero when every variable is 0 or 1 (float32 sum)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


@dataclass(frozen=True)
class AdaRound(RoundingMethod):
    """Adam on the relaxation; apart from the length the defaults are those of BRECQ and TFMQ-DM's code.

    Attributes:
        weight: factor of the regulariser.
        relative: divide the loss by that before learning, and the regulariser by the number of variables, so that
            one factor suits every layer whatever its size and its loss; off: the plain sums of the papers.
        warmup: share of the iterations without regulariser.
        beta_start: exponent of the regulariser after the warm-up.
        beta_end: exponent at the end; it moves linearly.
    """

    iterations: int = 2000
    learning_rate: float = 1e-3
    weight: float = 0.01
    relative: bool = False
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0

    def variables(self, weight: Tensor, quant: WeightQuant) -> SoftRounding:
        """Relaxed rounding of one weight."""
        return SoftRounding(weight, quant)

    def optimiser(self, parameters: Collection[Tensor]) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(parameters, lr=self.learning_rate)

    def unit(self, start: Callable[[], float]) -> float:
        """The loss before learning, or 1."""
        return max(start(), torch.finfo(torch.float32).tiny) if self.relative else 1.0

    def beta(self, iteration: int) -> float | None:
        """Exponent at an iteration; None during the warm-up."""
        start = self.warmup * self.iterations
        if iteration < start:
            return None
        share = (iteration - start) / max(self.iterations - start, 1)
        return self.beta_start + (self.beta_end - self.beta_start) * share

    def objective(self, task: Tensor, drawn: Collection[RoundingVariables], iteration: int, variables: int) -> Tensor:
        """The loss, and the regulariser of what is drawn."""
        beta = self.beta(iteration)
        soft = [each for each in drawn if isinstance(each, SoftRounding)]
        if beta is None or not soft:
            return task
        undecided = torch.stack([each.undecided(beta) for each in soft]).sum()
        return task + self.weight * undecided / (variables if self.relative else 1)
