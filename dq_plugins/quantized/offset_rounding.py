"""Rounding learned through rounding itself: an offset for each weight, moved by the sign of its gradient.

    q  = round(w / s + v),    w^ = s * (clip(q + z, q_min, q_max) - z)     d q / d v = 1 (straight through)
    v <- v - rate * (1 - i / n) * sign(dL / dv)                            in iteration i of n

The loss is that of the weights which are stored in the end, not of a relaxation; there is nothing to decide. Signs
make one rate fit all weights, and its sum over the iterations is how far an offset can go. Because the loss jumps
where a weight tips over, the last offsets are not the best: some on the way are judged as well, and the best kept.

Source: Cheng et al. 2023 (SignRound), with the offsets in [-0.5, 0.5].
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.rounding_variables import RoundingMethod, RoundingVariables
from dq_plugins.quantized.straight_through import round_ste

REACH = 0.5


class OffsetRounding(RoundingVariables):
    """``v``, for one weight.

    It starts at 0, so that weights are rounded to nearest; where the quantizer has another code, at the offset that
    puts ``w / s + v`` on this code. It may go to the neighbours of ``w / s``, and, if the code is further away, to the
    code.
    """

    def __init__(self, weight: Tensor, quant: WeightQuant) -> None:
        super().__init__(weight, quant)
        start = self._start_codes() - self.zero_point
        nearest = self._codes(torch.round(self.ratio)) - self.zero_point
        offset = torch.where(start == nearest, 0.0, start - self.ratio)
        self.low, self.high = offset.clamp(max=-REACH), offset.clamp(min=REACH)
        self.parameter = offset.requires_grad_(True)

    def soft(self) -> Tensor:
        """The weight as it is rounded now; its gradient passes straight through the rounding."""
        return self.weight(round_ste(self.ratio + self.parameter))

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """``round(w / s + v)``."""
        return torch.round(self.ratio + self.parameter)

    @torch.no_grad()
    def project(self) -> None:
        """Keep offsets in their reach."""
        self.parameter.clamp_(self.low, self.high)


@dataclass(frozen=True)
class SignSteps(RoundingMethod):
    """Sign steps on straight-through offsets.

    Attributes:
        looks: times that the decided weights are judged on the way, evenly.
    """

    looks: int = 8

    @property
    def checks(self) -> frozenset[int]:
        """Evenly spread; the last iteration is one of them."""
        return frozenset(-(-self.iterations * look // self.looks) for look in range(1, self.looks + 1))

    def variables(self, weight: Tensor, quant: WeightQuant) -> OffsetRounding:
        """Offsets of one weight."""
        return OffsetRounding(weight, quant)

    def optimiser(self, parameters: Collection[Tensor]) -> torch.optim.Optimizer:
        """Sign descent."""
        return SignDescent(parameters, self.learning_rate)

    def rate(self, iteration: int) -> float:
        """Falls linearly, to 0 after the last iteration."""
        return self.learning_rate * (1 - iteration / self.iterations)


class SignDescent(torch.optim.Optimizer):
    """``p <- p - lr * sign(gradient)``."""

    def __init__(self, parameters: Collection[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient; there is no closure to call."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
