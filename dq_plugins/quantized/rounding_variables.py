"""What learned rounding has in common, whatever its variables are.

Shapes: everything has the weight's shape ``[O, ...]``; scale and zero point broadcast from ``[O, 1, ...]``.
Precision: float32 throughout. ``w / s`` is computed as ``w * (1 / s)``, as everywhere in this library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.affine import integer_range, per_row
from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.variables import Variables


class RoundingVariables(Variables):
    """Rounding variables of one weight.

    Args:
        weight: full-precision weight ``[O, ...]``.
        quant: its quantizer; scale and zero point stay as they are, only the rounding is learned.
    """

    def __init__(self, weight: Tensor, quant: WeightQuant) -> None:
        self.quant = quant
        self.q_min, self.q_max = integer_range(quant.bits)
        self.scale = quant.steps(weight)
        zero_point = torch.zeros_like(quant.scale) if quant.zero_point is None else quant.zero_point.float()
        self.zero_point = per_row(zero_point, weight)
        self.ratio = weight.detach().float() * (1.0 / self.scale)

    @abstractmethod
    def rounded(self) -> Tensor:
        """Whole numbers that ``w / s`` is rounded to as the parameter stands, before clipping."""

    def hard(self) -> Tensor:
        """Weight with every rounding decided."""
        return self.weight(self.rounded())

    def start(self) -> Tensor:
        """Weight before learning: of the quantizer's codes where it has some, else rounded to nearest."""
        return self.scale * (self._start_codes() - self.zero_point)

    def decided(self) -> Tensor:
        """Decided integer codes, int8 (int16 above 8 bits)."""
        return self._codes(self.rounded()).to(torch.int8 if self.quant.bits <= 8 else torch.int16)

    def weight(self, rounded: Tensor) -> Tensor:
        """The weight that ``rounded`` values of ``w / s`` stand for, clipped to the codes there are."""
        return self.scale * (self._codes(rounded) - self.zero_point)

    def _codes(self, rounded: Tensor) -> Tensor:
        return (rounded + self.zero_point).clamp(self.q_min, self.q_max)

    def _start_codes(self) -> Tensor:
        if self.quant.codes is None:
            return self._codes(torch.round(self.ratio))
        return self.quant.codes.to(self.ratio)


@dataclass(frozen=True)
class RoundingMethod(ABC):
    """How rounding is learned: which variables, and how they move.

    Attributes:
        iterations: optimiser steps.
        learning_rate: of the first step.
    """

    iterations: int = 400
    learning_rate: float = 1e-2

    @abstractmethod
    def variables(self, weight: Tensor, quant: WeightQuant) -> RoundingVariables:
        """Variables for one weight."""

    @abstractmethod
    def optimiser(self, parameters: Collection[Tensor]) -> torch.optim.Optimizer:
        """What moves the parameters of the variables."""

    @property
    def checks(self) -> frozenset[int]:
        """Numbers of finished iterations after which the decided weights are judged; the best are kept."""
        return frozenset({self.iterations})

    def unit(self, start: Callable[[], float]) -> float:
        """What the loss is divided by; ``start`` computes the loss before learning."""
        return 1.0

    def rate(self, iteration: int) -> float:
        """Learning rate of an iteration."""
        return self.learning_rate

    def objective(self, task: Tensor, drawn: Collection[RoundingVariables], iteration: int, variables: int) -> Tensor:
        """What an iteration lowers.

        Args:
            task: the loss, in the method's `unit`.
            drawn: what the iteration learns.
            iteration: its number.
            variables: how many numbers are learned in all.
        """
        return task
