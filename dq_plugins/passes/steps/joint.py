"""Both searches over one space: the exact program proposes, evolution looks further, what measures best is taken."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dq_plugins.errors import BudgetError
from dq_plugins.passes.steps.baselines import Point, baselines, measured, seeds
from dq_plugins.passes.steps.evolution import Evolution, EvolutionOptions, Scored, SearchState
from dq_plugins.passes.steps.fitness import SamplingFitness
from dq_plugins.passes.steps.joint_program import JointProgram, JointSolution
from dq_plugins.passes.steps.space import Candidate, Space
from dq_plugins.passes.steps.transitions import Transitions
from dq_plugins.progress import Progress
from dq_plugins.quantized.candidates import Entry


class JointOptions(EvolutionOptions):
    """Settings of both searches.

    Attributes:
        search: which of them run.
        seconds: CP-SAT's deterministic time for each number of steps.
    """

    search: Literal["exact", "evolution", "both"] = "both"
    seconds: float = Field(5.0, gt=0)


@dataclass(frozen=True)
class JointResult:
    """What a joint search found.

    Attributes:
        best: the better of the two answers on the images that judge.
        chosen_by: ``"exact"`` or ``"evolution"``.
        scored: the answers, measured on the images that judge: the best of the program's optima, one for each number of
            steps, and the best of evolution's parents.
        solution: of the exact program, if it ran.
        state: of the evolutionary search, if it ran.
    """

    best: Scored
    chosen_by: str
    scored: Mapping[str, Scored]
    solution: JointSolution | None
    state: SearchState | None


@dataclass(frozen=True, eq=False)
class JointSearch:
    """A search for timesteps and widths within a budget.

    Attributes:
        fitness: measures candidates; its space is searched.
        noise: sensitivities by entry.
        transitions: costs of steps; None without the exact program.
        options: settings.
        folder: for checkpoints; None: the search cannot be resumed.
        signature: what scores depend on beside the candidate.
        seed: of the evolutionary search.
        judged: measures the answers on images that the searches have not seen; None: on theirs.
    """

    fitness: SamplingFitness
    noise: Mapping[Entry, float]
    transitions: Transitions | None
    options: JointOptions
    folder: Path | None = None
    signature: Any = None
    seed: int = 0
    judged: SamplingFitness | None = None

    @property
    def judge(self) -> SamplingFitness:
        """What decides between answers: a search finds what suits its own images, and other images tell."""
        return self.judged or self.fitness

    @property
    def space(self) -> Space:
        """What is searched."""
        return self.fitness.space

    def run(self) -> Generator[Progress, None, JointResult]:
        """Search; iterate to run, the generator returns the result."""
        solution = (yield from self._exact()) if self.options.search != "evolution" else None
        state = (yield from self._evolve(solution)) if self.options.search != "exact" else None
        proposals = {} if solution is None else {"exact": list(solution.optima.values())}
        proposals |= {} if state is None else {"evolution": self._leaders(state)}
        scored = {who: min(map(self._scored, each), key=lambda s: s.order) for who, each in proposals.items() if each}
        who = min(scored, key=lambda name: scored[name].order)
        return JointResult(scored[who], who, scored, solution, state)

    def _scored(self, candidate: Candidate) -> Scored:
        last = self.judge.rungs - 1
        return Scored(candidate, last, self.judge(candidate, last)["loss"])

    def _leaders(self, state: SearchState) -> list[Candidate]:
        """The best of evolution; several where other images judge."""
        return [s.candidate for s in state.population[: self.options.parents if self.judged else 1]]

    def front(
        self, shares: Sequence[float], known: JointResult | None = None
    ) -> Generator[Progress, None, dict[str, list[Point]]]:
        """Error against cost: measured points of the joint search and of what it is compared with, by rule.

        Args:
            shares: budgets as multiples of the space's; those that nothing fits are left out.
            known: result at the budget itself, not searched again.
        """
        joint, limits = [], []
        for share in sorted(shares):
            try:
                search = self.within(share)
            except BudgetError:
                continue
            found = known if share == 1.0 and known is not None else (yield from search.run())
            chosen = found.best.candidate
            joint.append(measured(self.space, self.judge, self.space.timesteps(chosen), chosen.widths))
            limits.append(search.space.budget)
        return {"joint": joint, **baselines(self.space, self.judge, self.noise, limits)}

    def within(self, share: float) -> JointSearch:
        """The same search at a multiple of the budget.

        Raises:
            BudgetError: nothing fits it.
        """
        space = replace(self.space, budget=share * self.space.budget)
        folder = self.folder.with_name(f"{self.folder.name}-{share:g}") if self.folder else None
        judged = self.judged and replace(self.judged, space=space)
        return replace(self, fitness=replace(self.fitness, space=space), folder=folder, judged=judged)

    def program(self) -> JointProgram:
        """The exact program, its noise scaled by one measured run."""
        assert self.transitions is not None
        program = JointProgram(self.space, self.transitions, self.noise)
        predicted = program.predicted(self._seeds[0])[1] if self._seeds else 0.0
        if predicted <= 0:
            return program
        timesteps, widths = self.space.timesteps(self._seeds[0]), self.space.widths(self._seeds[0])
        moved = self.fitness.final(timesteps, widths) - self.fitness.final(timesteps, {})
        return replace(program, scale=float(moved.double().square().mean()) / predicted)

    @cached_property
    def _seeds(self) -> list[Candidate]:
        return seeds(self.space, self.noise, self.fitness.stepper)

    def _exact(self) -> Generator[Progress, None, JointSolution]:
        yield Progress(0, 1, "exact program")
        solution = self.program().solve(seconds=self.options.seconds)
        yield Progress(1, 1, "exact program")
        return solution

    def _evolve(self, solution: JointSolution | None) -> Generator[Progress, None, SearchState]:
        optima = [] if solution is None else list(solution.optima.values())
        first = [*optima, *self._seeds]
        search = Evolution(self.space, self.fitness, self.options, first, self.folder, self.signature, self.seed)
        return (yield from search.run())
