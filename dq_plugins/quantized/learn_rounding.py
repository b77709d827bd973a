"""Optimise rounding variables against a loss."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.errors import RecipeError
from dq_plugins.quantized.soft_rounding import SoftRounding

Loss = Callable[[dict[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class RoundingOptions:
    """Settings of the optimisation; the defaults are those of BRECQ and TFMQ-DM's code except for the length.

    Attributes:
        iterations: optimiser steps.
        learning_rate: of Adam.
        weight: factor of the regulariser.
        relative: divide the loss by that of nearest rounding, and the regulariser by the number of variables, so that
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

    def beta(self, iteration: int) -> float | None:
        """Exponent at an iteration; None during the warm-up."""
        start = self.warmup * self.iterations
        if iteration < start:
            return None
        share = (iteration - start) / max(self.iterations - start, 1)
        return self.beta_start + (self.beta_end - self.beta_start) * share


@dataclass(frozen=True)
class RoundingResult:
    """What the optimisation found.

    Attributes:
        codes: integer codes by layer; empty when nearest rounding was kept.
        start_loss: loss of the relaxed weights at the first iteration, without regulariser.
        nearest_loss: mean loss with nearest rounding, over the probe iterations.
        learned_loss: mean loss with the learned rounding, over the same iterations.
        kept_nearest: the learned rounding was worse than nearest, so nearest was kept.
    """

    codes: dict[str, Tensor]
    start_loss: float
    nearest_loss: float
    learned_loss: float
    kept_nearest: bool


def _mean_loss(loss: Loss, weights: dict[str, Tensor], probes: int) -> float:
    with torch.no_grad():
        return sum(float(loss(weights, i)) for i in range(probes)) / probes


def learn_rounding(
    variables: Mapping[str, SoftRounding], loss: Loss, options: RoundingOptions, *, probes: int = 4
) -> Generator[int, None, RoundingResult]:
    """Learn the rounding of several weights jointly; yields the number of finished iterations.

    The loss decides in the end: if hard learned rounding is worse than nearest rounding on the probe iterations, the
    codes are left out (nearest rounding needs none) and the result says so.

    Args:
        variables: rounding variables by layer name.
        loss: ``loss(weights, iteration)`` with relaxed (or hard) weights by layer name; a scalar.
        options: settings.
        probes: iterations whose loss is averaged to compare nearest with learned rounding.

    Returns:
        (of the generator) the decided codes and the losses.

    Raises:
        RecipeError: the loss is not finite.
    """
    nearest_loss = _mean_loss(loss, {k: v.nearest() for k, v in variables.items()}, probes)
    task_unit, count = 1.0, 1
    if options.relative:
        task_unit = max(nearest_loss, torch.finfo(torch.float32).tiny)
        count = sum(v.alpha.numel() for v in variables.values())
    start_loss = float("nan")
    with torch.enable_grad():
        optimiser = torch.optim.Adam([v.alpha for v in variables.values()], lr=options.learning_rate)
        for iteration in range(options.iterations):
            task = loss({k: v.soft() for k, v in variables.items()}, iteration)
            if not bool(torch.isfinite(task)):
                names = ", ".join(list(variables)[:3])
                raise RecipeError(f"the reconstruction loss of {names} is {task.item()} at iteration {iteration}")
            start_loss = task.item() if iteration == 0 else start_loss
            beta = options.beta(iteration)
            total = task / task_unit
            if beta is not None:
                undecided = torch.stack([v.undecided(beta) for v in variables.values()]).sum() / count
                total = total + options.weight * undecided
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            yield iteration + 1
    learned_loss = _mean_loss(loss, {k: v.hard() for k, v in variables.items()}, probes)
    kept_nearest = learned_loss > nearest_loss
    codes = {} if kept_nearest else {k: v.codes() for k, v in variables.items()}
    return RoundingResult(codes, start_loss, nearest_loss, learned_loss, kept_nearest)
