"""The best of the min-max range shrunk in steps."""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.errors import DQError
from dq_plugins.observers.distribution import BINS, DistributionObserver
from dq_plugins.observers.error import range_errors


class ShrinkObserver(DistributionObserver):
    """Shrinks the min-max range in equal steps and keeps the one with the least ``mean |x - x^|^power``.

    The defaults, 80 steps of 1 % and power 2.4, are those of BRECQ (arXiv 2102.05426) and Q-Diffusion
    (arXiv 2302.04304). Both ends shrink together.

    Args:
        power: p of the error norm.
        steps: number of ranges tried, the unshrunk one among them.
        step: how much of the min-max range each step takes away.
    """

    name = "shrink"

    def __init__(
        self,
        bits: int = 8,
        symmetric: bool = True,
        *,
        power: float = 2.4,
        steps: int = 80,
        step: float = 0.01,
        bins: int = BINS,
    ) -> None:
        super().__init__(bits, symmetric, bins=bins)
        if power <= 0 or steps < 1 or not 0 < step * max(steps - 1, 1) < 1:
            raise DQError(
                f"a shrink search needs power > 0 and steps that leave some range, got power={power}, "
                f"steps={steps} of {step}"
            )
        self.power, self.steps, self.step = float(power), int(steps), float(step)

    def range_of(self, values: Tensor, weights: Tensor) -> tuple[float, float]:
        """The shrunk range with the least error; the widest of equal ones."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if self.symmetric:
            low, high = -max(-low, high), max(-low, high)
        factor = 1 - self.step * torch.arange(self.steps, dtype=torch.float64)
        lows, highs = (low * factor).float(), (high * factor).float()
        errors = range_errors(values, weights, lows, highs, self.bits, symmetric=self.symmetric, power=self.power)
        best = int(errors.argmin())
        return float(lows[best]), float(highs[best])
