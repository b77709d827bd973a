"""Learn the variables of some layers against a loss: the rounding of their weights, and whatever else moves with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dq_plugins.errors import RecipeError
from dq_plugins.quantized.rounding_variables import RoundingMethod, RoundingVariables

Key = TypeVar("Key", bound=Hashable)
Loss = Callable[[dict[Key, Tensor], int], Tensor]


@dataclass(frozen=True)
class Verdict:
    """The rounding before learning against the learned one, of some weights, by their mean loss over the probes."""

    start_loss: float
    learned_loss: float

    @property
    def kept_start(self) -> bool:
        """The learned rounding is no better, so weights stay as they were."""
        return not self.learned_loss < self.start_loss


@dataclass(frozen=True)
class Learned(Generic[Key]):
    """What the optimisation found.

    Attributes:
        codes: integer codes by key; those of weights that stay as they were are left out.
        verdicts: by what was decided together.
    """

    codes: dict[Key, Tensor] = field(default_factory=dict)
    verdicts: dict[Hashable, Verdict] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The only verdict, where everything was decided together."""
        (verdict,) = self.verdicts.values()
        return verdict


class Learner(Generic[Key]):
    """One optimisation.

    Args:
        variables: rounding variables by key: the name of a layer, or more where a layer has several.
        loss: ``loss(weights, iteration)`` with the weights to learn with, by key; a scalar.
        method: how they move; the variables are its own.
        others: further parameter groups, which the loss depends on and Adam moves.
        drawn: variables that an iteration learns; all of them by default. What is not drawn does not move.
        together: what the verdict on a variable is shared with: variables of one value are decided together. All of
            them by default.
        judge: the loss that decides, if it is another: of decided weights, ``judge(weights, probe)``.
        probes: how many probes the judge averages.
    """

    def __init__(
        self,
        variables: Mapping[Key, RoundingVariables],
        loss: Loss[Key],
        method: RoundingMethod,
        *,
        others: Iterable[dict[str, Any]] = (),
        drawn: Callable[[int], Collection[Key]] | None = None,
        together: Callable[[Key], Hashable] | None = None,
        judge: Loss[Key] | None = None,
        probes: int = 4,
    ) -> None:
        self.variables, self.loss, self.method = variables, loss, method
        self.drawn = drawn or (lambda _: variables.keys())
        self.together = together or (lambda _: "all")
        self.judge, self.probes = judge or loss, probes
        self._rounding = [method.optimiser([v.parameter for v in variables.values()])] if variables else []
        groups = list(others)
        self._others = [torch.optim.Adam(groups)] if groups else []
        self._best: dict[Hashable, tuple[Verdict, dict[Key, Tensor]]] = {}

    def run(self) -> Generator[int, None, Learned[Key]]:
        """Learn; yields the number of finished iterations.

        The judge decides: the best decided weights among those of the method's checks are kept, or, where none is
        better than what learning started from, none.

        Returns:
            (of the generator) the decided codes and the losses.

        Raises:
            RecipeError: the loss is not finite.
        """
        used = dict[Key, None]()
        unit = self.method.unit(lambda: self._mean_loss({k: v.start() for k, v in self.variables.items()}))
        count = sum(v.parameter.numel() for v in self.variables.values())
        for iteration in range(self.method.iterations):
            drawn = self.drawn(iteration)
            used |= dict.fromkeys(drawn)
            self._step(iteration, drawn, unit, count)
            if iteration + 1 in self.method.checks:
                self._check(used)
            yield iteration + 1
        found: Learned[Key] = Learned()
        for group, (verdict, codes) in self._best.items():
            found.verdicts[group] = verdict
            if not verdict.kept_start:
                found.codes.update(codes)
        return found

    @torch.enable_grad()
    def _step(self, iteration: int, drawn: Collection[Key], unit: float, count: int) -> None:
        task = self.loss({k: self.variables[k].soft() for k in drawn}, iteration)
        if not bool(torch.isfinite(task)):
            names = ", ".join(str(k) for k in list(self.variables)[:3])
            raise RecipeError(f"the reconstruction loss of {names} is {task.item()} at iteration {iteration}")
        total = self.method.objective(task / unit, [self.variables[k] for k in drawn], iteration, count)
        if not total.requires_grad:  # binary weights alone leave nothing to learn
            return
        for optimiser in self._rounding:
            for group in optimiser.param_groups:
                group["lr"] = self.method.rate(iteration)
        optimisers = self._rounding + self._others
        for optimiser in optimisers:
            optimiser.zero_grad()  # to None: what was not drawn does not move
        total.backward()
        for optimiser in optimisers:
            optimiser.step()
        for key in drawn:
            self.variables[key].project()

    def _check(self, used: Iterable[Key]) -> None:
        """Judge the weights as they are decided now, and keep those that are the best so far."""
        groups: dict[Hashable, dict[Key, RoundingVariables]] = {}
        for key in used:
            groups.setdefault(self.together(key), {})[key] = self.variables[key]
        for group, variables in groups.items():
            best, codes = self._best.get(group, (None, {}))
            if best is None or codes.keys() != variables.keys():  # more has been drawn since: another comparison
                best = Verdict(self._mean_loss({k: v.start() for k, v in variables.items()}), math.inf)
                self._best[group] = best, dict.fromkeys(variables, torch.empty(0))
            loss = self._mean_loss({k: v.hard() for k, v in variables.items()})
            if loss < best.learned_loss:
                self._best[group] = Verdict(best.start_loss, loss), {k: v.codes() for k, v in variables.items()}

    @torch.no_grad()
    def _mean_loss(self, weights: dict[Key, Tensor]) -> float:
        return sum(float(self.judge(weights, i)) for i in range(self.probes)) / self.probes
