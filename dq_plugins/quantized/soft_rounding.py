"""The AdaRound relaxation of one weight tensor.

    h(a) = clip(1.2 * sigmoid(a) - 0.1, 0, 1)                        how far up each weight is rounded
    w^   = s * (clip(floor(w / s) + h(a) + z, q_min, q_max) - z)     differentiable in a

Source: Nagel et al. 2020 (AdaRound), eq. 21-24; used by BRECQ, Q-Diffusion and TFMQ-DM. ``w / s`` is computed as
``w * (1 / s)``, as everywhere in this library.

Shapes: everything has the weight's shape ``[O, ...]``; scale and zero point broadcast from ``[O, 1, ...]``.
Precision: float32 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.affine import integer_range, per_row
from dq_plugins.plan import WeightQuant

STRETCH, OFFSET = 1.2, 0.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """``h(a)``: a sigmoid stretched to [-0.1, 1.1] and clipped, so that 0 and 1 are reached at finite ``a``."""
    return (torch.sigmoid(alpha) * STRETCH - OFFSET).clamp(0, 1)


class SoftRounding:
    """Rounding variables of one weight.

    Args:
        weight: full-precision weight ``[O, ...]``.
        quant: its quantizer; scale and zero point stay as they are, only the rounding is learned.
    """

    def __init__(self, weight: Tensor, quant: WeightQuant) -> None:
        self.quant = quant
        self.q_min, self.q_max = integer_range(quant.bits)
        self.scale = per_row(quant.scale, weight)
        zero_point = torch.zeros_like(quant.scale) if quant.zero_point is None else quant.zero_point.float()
        self.zero_point = per_row(zero_point, weight)
        self.ratio = weight.detach().float() * (1.0 / self.scale)
        self.floor = torch.floor(self.ratio)
        self.alpha = self._initial(self.ratio - self.floor).requires_grad_(True)

    @staticmethod
    def _initial(fraction: Tensor) -> Tensor:
        """``a`` with ``h(a) = fraction``: the relaxed weight starts at the full-precision one."""
        return -torch.log(STRETCH / (fraction + OFFSET) - 1)

    def up(self) -> Tensor:
        """``h(a)`` in [0, 1]."""
        return rectified_sigmoid(self.alpha)

    def soft(self) -> Tensor:
        """Relaxed weight, differentiable in ``alpha``."""
        return self.weight(self.floor + self.up())

    def hard(self) -> Tensor:
        """Weight with every rounding decided: up where ``a >= 0``."""
        return self.weight(self._decided())

    def nearest(self) -> Tensor:
        """Weight with nearest rounding, for comparison."""
        return self.weight(torch.round(self.ratio))

    def codes(self) -> Tensor:
        """Decided integer codes, int8 (int16 above 8 bits)."""
        return self._codes(self._decided()).to(torch.int8 if self.quant.bits <= 8 else torch.int16)

    def _decided(self) -> Tensor:
        return self.floor + (self.alpha.detach() >= 0).float()

    def _codes(self, rounded: Tensor) -> Tensor:
        return (rounded + self.zero_point).clamp(self.q_min, self.q_max)

    def weight(self, rounded: Tensor) -> Tensor:
        """The weight that ``rounded`` values of ``w / s`` stand for, clipped to the codes there are."""
        return self.scale * (self._codes(rounded) - self.zero_point)

    def undecided(self, beta: float) -> Tensor:
        """Regulariser ``sum(1 - |2 h - 1|^beta)``: zero when every variable is 0 or 1 (float32 sum)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()
