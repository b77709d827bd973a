"""The ways to learn rounding, by the names that options give them."""

from __future__ import annotations

from typing import Literal

from dq_plugins.quantized.offset_rounding import SignSteps
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.soft_rounding import AdaRound

MethodName = Literal["sign", "adaround"]


def rounding_method(
    name: MethodName, iterations: int, learning_rate: float, weight: float = 0.01, *, relative: bool = False
) -> RoundingMethod:
    """A method with its settings.

    Args:
        name: ``"sign"`` is `SignSteps`, ``"adaround"`` is `AdaRound`.
        iterations: optimiser steps.
        learning_rate: of the first step.
        weight: factor of AdaRound's regulariser; sign steps have none.
        relative: see `AdaRound`.
    """
    if name == "sign":
        return SignSteps(iterations, learning_rate)
    return AdaRound(iterations, learning_rate, weight, relative)
