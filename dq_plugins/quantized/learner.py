"""Learn variables of some layers against a loss: the rounding of weights, clip ranges, scales, corrections."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.artifact.optimizers import OptimizerState, optimizer_state, restore_optimizer
from dq_plugins.errors import RecipeError
from dq_plugins.quantized.rounding_variables import RoundingMethod, RoundingVariables
from dq_plugins.quantized.variables import Smooth, Variables

Key = TypeVar("Key", bound=Hashable)
Loss = Callable[[dict[Key, Tensor], int], Tensor]


@dataclass(frozen=True)
class Verdict:
    """Some variables before learning and learned.

    Attributes:
        start: losses of the probes before, float64 ``[P]``.
        learned: and after; infinite before the first look.
    """

    start: Tensor
    learned: Tensor

    @property
    def start_loss(self) -> float:
        """Mean over the probes."""
        return float(self.start.mean())

    @property
    def learned_loss(self) -> float:
        """Mean over the probes."""
        return float(self.learned.mean())

    @property
    def kept_start(self) -> bool:
        """All stays as it was: what was learned is not better by more than the standard error of the mean gain.

        Few probes judge, and the best of several looks is partly luck. A gain within chance is as likely a loss on
        other images.
        """
        gain = self.start - self.learned
        chance = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        return not float(gain.mean()) > chance


@dataclass(frozen=True)
class Learned(Generic[Key]):
    """What the optimisation found.

    Attributes:
        decided: what was learned, by key: integer codes of a weight, the value of any other variable. What stays as it
            was is left out.
        verdicts: by what was decided together.
    """

    decided: dict[Key, Tensor] = field(default_factory=dict)
    verdicts: dict[Hashable, Verdict] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The only verdict, where everything was decided together."""
        (verdict,) = self.verdicts.values()
        return verdict


@dataclass(frozen=True)
class Best:
    """The best so far of variables that are decided together.

    Attributes:
        losses: of the probes before learning and of these values, float64 ``[2, P]``.
        decided: by the place of the variable.
    """

    __pydantic_config__ = STRICT

    losses: StoredTensor
    decided: dict[str, StoredTensor]


@dataclass(frozen=True)
class LearnerState:
    """An optimisation that was interrupted.

    Attributes:
        iteration: number of finished ones.
        parameters: of the variables, by their place.
        others: further parameters, in the order of their groups.
        optimisers: their states.
        drawn: places of the variables that were drawn so far, in the order in which they first were.
        best: of everything that was judged.
    """

    __pydantic_config__ = STRICT

    iteration: int
    parameters: dict[str, StoredTensor]
    others: list[StoredTensor]
    optimisers: list[OptimizerState]
    drawn: list[str]
    best: list[Best]


class Learner(Generic[Key]):
    """One optimisation.

    Args:
        variables: by key: the name of a layer, or more where a layer has several.
        loss: ``loss(values, iteration)`` with the values to learn with, by key; a scalar.
        method: how long and how fast they move, and how rounding does; variables of rounding are its own.
        others: further parameter groups, which the loss depends on and Adam moves.
        drawn: variables that an iteration learns; all of them by default. What is not drawn does not move.
        together: what the verdict on a variable is shared with: variables of one value are decided together. All of
            them by default.
        judge: the loss that decides, if it is another: of decided values, ``judge(values, probe)``.
        probes: how many probes the judge averages, ``P``.
        start: losses of the probes before learning, float64 ``[P]``, where they are known.
    """

    def __init__(
        self,
        variables: Mapping[Key, Variables],
        loss: Loss[Key],
        method: RoundingMethod,
        *,
        others: Iterable[dict[str, Any]] = (),
        drawn: Callable[[int], Collection[Key]] | None = None,
        together: Callable[[Key], Hashable] | None = None,
        judge: Loss[Key] | None = None,
        probes: int = 4,
        start: Tensor | None = None,
    ) -> None:
        self.variables, self.loss, self.method = variables, loss, method
        self.drawn = drawn or (lambda _: variables.keys())
        self.together = together or (lambda _: "all")
        self.judge, self.probes, self.start = judge or loss, probes, start
        rounding = [v.parameter for v in variables.values() if isinstance(v, RoundingVariables)]
        self._rounding = [method.optimiser(rounding)] if rounding else []
        smooth = [v for v in variables.values() if isinstance(v, Smooth)]
        self._smooth = (
            [torch.optim.Adam([{"params": [v.parameter], "factor": v.rate} for v in smooth])] if smooth else []
        )
        groups = list(others)
        self._others = [torch.optim.Adam(groups)] if groups else []
        self._best: dict[Hashable, tuple[Verdict, dict[Key, Tensor]]] = {}
        self._used: dict[Key, None] = {}
        self._done = 0

    def state(self) -> LearnerState:
        """How far it is, for `restore`."""
        place = {key: str(i) for i, key in enumerate(self.variables)}
        return LearnerState(
            self._done,
            {place[key]: v.parameter.detach() for key, v in self.variables.items()},
            [parameter.detach() for parameter in self._other_parameters()],
            [optimizer_state(each) for each in self._rounding + self._smooth + self._others],
            [place[key] for key in self._used],
            [
                Best(
                    torch.stack([verdict.start, verdict.learned]),
                    {place[key]: value for key, value in decided.items()},
                )
                for verdict, decided in self._best.values()
            ],
        )

    @torch.no_grad()
    def restore(self, state: LearnerState) -> None:
        """Go on from there; the next `run` yields the iterations that are left."""
        self._done, keys = state.iteration, list(self.variables)
        self._used = {keys[int(place)]: None for place in state.drawn}
        for place, parameter in state.parameters.items():
            self.variables[keys[int(place)]].parameter.copy_(parameter)
        for parameter, value in zip(self._other_parameters(), state.others, strict=True):
            parameter.copy_(value)
        for optimiser, found in zip(self._rounding + self._smooth + self._others, state.optimisers, strict=True):
            restore_optimizer(optimiser, found)
        for best in state.best:
            decided = {keys[int(place)]: value for place, value in best.decided.items()}
            self._best[self.together(next(iter(decided)))] = Verdict(*best.losses), decided

    def _other_parameters(self) -> list[Tensor]:
        return [each for optimiser in self._others for group in optimiser.param_groups for each in group["params"]]

    def run(self) -> Generator[int, None, Learned[Key]]:
        """Learn; yields the number of finished iterations.

        The judge decides: the best values among those of the method's checks are kept, or, where these are not clearly
        better than what learning started from (`Verdict.kept_start`), none.

        Returns:
            (of the generator) what was decided, and the losses.

        Raises:
            RecipeError: the loss is not finite.
        """
        unit = self.method.unit(lambda: float(self._losses({k: v.start() for k, v in self.variables.items()}).mean()))
        rounding = [v for v in self.variables.values() if isinstance(v, RoundingVariables)]
        count = sum(v.parameter.numel() for v in rounding)
        for iteration in range(self._done, self.method.iterations):
            drawn = self.drawn(iteration)
            self._used |= dict.fromkeys(drawn)
            self._step(iteration, drawn, unit, count)
            if iteration + 1 in self.method.checks:
                self._check(self._used)
            self._done = iteration + 1
            yield self._done
        found: Learned[Key] = Learned()
        for group, (verdict, decided) in self._best.items():
            found.verdicts[group] = verdict
            if not verdict.kept_start:
                found.decided.update(decided)
        return found

    @torch.enable_grad()
    def _step(self, iteration: int, drawn: Collection[Key], unit: float, count: int) -> None:
        task = self.loss({k: self.variables[k].soft() for k in drawn}, iteration)
        if not bool(torch.isfinite(task)):
            names = ", ".join(str(k) for k in list(self.variables)[:3])
            raise RecipeError(f"the reconstruction loss of {names} is {task.item()} at iteration {iteration}")
        rounding = [v for k in drawn if isinstance(v := self.variables[k], RoundingVariables)]
        total = self.method.objective(task / unit, rounding, iteration, count)
        if not total.requires_grad:  # binary weights alone leave nothing to learn
            return
        for optimiser in self._rounding + self._smooth:
            for group in optimiser.param_groups:
                group["lr"] = self.method.rate(iteration) * group.get("factor", 1.0)
        optimisers = self._rounding + self._smooth + self._others
        for optimiser in optimisers:
            optimiser.zero_grad()  # to None: what was not drawn does not move
        total.backward()
        for optimiser in optimisers:
            optimiser.step()
        for key in drawn:
            self.variables[key].project()

    def _check(self, used: Iterable[Key]) -> None:
        """Judge the values as they are decided now, and keep those that are the best so far."""
        groups: dict[Hashable, dict[Key, Variables]] = {}
        for key in used:
            groups.setdefault(self.together(key), {})[key] = self.variables[key]
        for group, variables in groups.items():
            best, decided = self._best.get(group, (None, {}))
            if best is None or decided.keys() != variables.keys():  # more has been drawn since: another comparison
                start = self.start
                if start is None:
                    start = self._losses({k: v.start() for k, v in variables.items()})
                best = Verdict(start, torch.full_like(start, torch.inf))
                self._best[group] = best, dict.fromkeys(variables, torch.empty(0))
            losses = self._losses({k: v.hard() for k, v in variables.items()})
            if float(losses.mean()) < best.learned_loss:
                self._best[group] = Verdict(best.start, losses), {k: v.decided() for k, v in variables.items()}

    @torch.no_grad()
    def _losses(self, values: dict[Key, Tensor]) -> Tensor:
        """Of every probe, float64 ``[P]``."""
        return torch.tensor([float(self.judge(values, i)) for i in range(self.probes)], dtype=torch.float64)
