"""Learn the variables of some layers against a loss: the rounding of their weights, and whatever else moves with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dq_plugins.errors import RecipeError
from dq_plugins.quantized.soft_rounding import SoftRounding

Key = TypeVar("Key", bound=Hashable)
Loss = Callable[[dict[Key, Tensor], int], Tensor]


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
class Verdict:
    """Nearest against learned rounding of some weights, by their mean loss over the probes."""

    nearest_loss: float
    learned_loss: float

    @property
    def kept_nearest(self) -> bool:
        """The learned rounding is worse, so rounding to nearest stays."""
        return not self.learned_loss <= self.nearest_loss


@dataclass(frozen=True)
class Learned(Generic[Key]):
    """What the optimisation found.

    Attributes:
        codes: integer codes by key; those of weights that keep rounding to nearest are left out.
        verdicts: by what was decided together.
        start_loss: loss of the relaxed weights at the first iteration, without regulariser.
    """

    codes: dict[Key, Tensor] = field(default_factory=dict)
    verdicts: dict[Hashable, Verdict] = field(default_factory=dict)
    start_loss: float = float("nan")

    @property
    def verdict(self) -> Verdict:
        """The only verdict, where everything was decided together."""
        (verdict,) = self.verdicts.values()
        return verdict


class Learner(Generic[Key]):
    """One optimisation.

    Args:
        variables: rounding variables by key: the name of a layer, or more where a layer has several.
        loss: ``loss(weights, iteration)`` with relaxed (or hard) weights by key; a scalar.
        options: settings.
        others: further parameter groups of the optimiser, which the loss depends on.
        drawn: variables that an iteration learns; all of them by default. What is not drawn does not move.
        together: what the verdict on a variable is shared with: variables of one value are decided together. All of
            them by default.
        judge: the loss that decides, if it is another: of hard weights, over the first ``probes`` iterations.
        probes: iterations whose loss is averaged to compare nearest with learned rounding.
    """

    def __init__(
        self,
        variables: Mapping[Key, SoftRounding],
        loss: Loss[Key],
        options: RoundingOptions,
        *,
        others: Iterable[dict[str, Any]] = (),
        drawn: Callable[[int], Collection[Key]] | None = None,
        together: Callable[[Key], Hashable] | None = None,
        judge: Loss[Key] | None = None,
        probes: int = 4,
    ) -> None:
        self.variables, self.loss, self.options = variables, loss, options
        self.drawn = drawn or (lambda _: variables.keys())
        self.together = together or (lambda _: "all")
        self.judge, self.probes = judge or loss, probes
        rounding = {"params": [v.alpha for v in variables.values()], "lr": options.learning_rate}
        self._optimiser = torch.optim.Adam([rounding, *others])

    def run(self) -> Generator[int, None, Learned[Key]]:
        """Learn; yields the number of finished iterations.

        The judge decides in the end: where hard learned rounding is worse than nearest rounding, the codes are
        left out (nearest rounding needs none).

        Returns:
            (of the generator) the decided codes and the losses.

        Raises:
            RecipeError: the loss is not finite.
        """
        task_unit, count = 1.0, 1
        if self.options.relative:
            nearest = self._mean_loss({k: v.nearest() for k, v in self.variables.items()})
            task_unit = max(nearest, torch.finfo(torch.float32).tiny)
            count = sum(v.alpha.numel() for v in self.variables.values())
        start_loss, used = float("nan"), dict[Key, None]()
        for iteration in range(self.options.iterations):
            drawn = self.drawn(iteration)
            used |= dict.fromkeys(drawn)
            task = self._step(iteration, drawn, task_unit, count)
            start_loss = task if iteration == 0 else start_loss
            yield iteration + 1
        return self._decide(used, start_loss)

    @torch.enable_grad()
    def _step(self, iteration: int, drawn: Collection[Key], task_unit: float, count: int) -> float:
        """One step of the optimiser; returns the loss without regulariser."""
        task = self.loss({k: self.variables[k].soft() for k in drawn}, iteration)
        if not bool(torch.isfinite(task)):
            names = ", ".join(str(k) for k in list(self.variables)[:3])
            raise RecipeError(f"the reconstruction loss of {names} is {task.item()} at iteration {iteration}")
        total, beta = task / task_unit, self.options.beta(iteration)
        if beta is not None and drawn:
            undecided = torch.stack([self.variables[k].undecided(beta) for k in drawn]).sum() / count
            total = total + self.options.weight * undecided
        self._optimiser.zero_grad()  # to None: what was not drawn does not move
        if total.requires_grad:  # binary weights alone leave nothing to learn
            total.backward()
            self._optimiser.step()
        return task.item()

    def _decide(self, used: Iterable[Key], start_loss: float) -> Learned[Key]:
        found: Learned[Key] = Learned(start_loss=start_loss)
        groups: dict[Hashable, list[Key]] = {}
        for key in used:
            groups.setdefault(self.together(key), []).append(key)
        for group, keys in groups.items():
            variables = {k: self.variables[k] for k in keys}
            nearest, learned = (
                self._mean_loss(weights)
                for weights in (
                    {k: v.nearest() for k, v in variables.items()},
                    {k: v.hard() for k, v in variables.items()},
                )
            )
            found.verdicts[group] = Verdict(nearest, learned)
            if not found.verdicts[group].kept_nearest:
                found.codes.update({k: v.codes() for k, v in variables.items()})
        return found

    @torch.no_grad()
    def _mean_loss(self, weights: dict[Key, Tensor]) -> float:
        return sum(float(self.judge(weights, i)) for i in range(self.probes)) / self.probes
