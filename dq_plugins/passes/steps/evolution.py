"""Joint evolutionary search, with successive halving, a checkpoint after every generation, and exact resume.

One generation: the best ``parents`` of the population have ``mutants`` mutated and ``crossovers`` crossed children;
random candidates fill up to ``population``; nothing is scored twice, nothing over budget is scored at all; the best
``population`` of old and new live on. Scoring is in rungs: all new candidates on the first (a few images), the better
half of them on the next, and so on; who has reached a higher rung comes before who has not.

Whatever happens, a resumed search ends as an uninterrupted one: the state at the start of a generation (random
generator included) is on disk, and each score is kept as soon as it is known.

Source: TMPQ-DM (Sun et al. 2024): population 50, 10 parents, 25 mutants at 0.25, 10 crossovers, 20 generations. Ours:
the rungs; the best of every number of steps among the parents; and a mutation rate drawn for each child between one
gene and the paper's rate (``spread``), because a child that changes a quarter of a hundred genes is hardly related to
its parent.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dq_plugins.artifact import STRICT, Format, UnitResults
from dq_plugins.passes.steps.fitness import SamplingFitness
from dq_plugins.passes.steps.space import Candidate, Space
from dq_plugins.progress import Progress, reported
from dq_plugins.recipe import PassOptions
from dq_plugins.sensitivity.measure import MEASURED, Sums, measure

FILE_NAME = "state.json"
ATTEMPTS = 20
"""How often a new candidate is drawn again when it is known already."""
KEEP = 0.5
"""Share of candidates that go on to the next rung."""


class EvolutionOptions(PassOptions):
    """Settings of the evolutionary search; the defaults are the paper's, except for ``spread``.

    Attributes:
        population: candidates that live on, and candidates of the first generation.
        parents: how many of them have children.
        mutants: mutated children of a generation.
        crossovers: crossed children.
        generations: generations after the first.
        mutation: probability that a gene mutates; the largest one with ``spread``.
        spread: draw each child's rate, log-uniformly, between one gene and ``mutation``.
        workers: processes (joblib), where `dq_plugins.workers` does not say more.
    """

    population: int = Field(50, ge=1)
    parents: int = Field(10, ge=1)
    mutants: int = Field(25, ge=0)
    crossovers: int = Field(10, ge=0)
    generations: int = Field(20, ge=0)
    mutation: float = Field(0.25, gt=0, le=1)
    spread: bool = True
    workers: int = Field(1, ge=1, exclude=True)  # no plan depends on it


@dataclass(frozen=True)
class Scored:
    """A candidate with the highest rung it reached, and its loss there."""

    __pydantic_config__ = STRICT

    candidate: Candidate
    rung: int
    loss: float

    @property
    def order(self) -> tuple[int, float, str]:
        """Sort key: best first; the key breaks ties, so that order never depends on who finished first."""
        return -self.rung, self.loss, self.candidate.key


@dataclass
class SearchState:
    """Everything a search needs to go on.

    Attributes:
        generation: generations that are finished.
        population: best first.
        visited: keys of all candidates ever scored.
        history: least loss on the last rung after each generation.
        evaluations: scores of each rung so far.
        calls: what they cost.
        rng: state of the random generator.
    """

    __pydantic_config__ = STRICT

    generation: int = 0
    population: list[Scored] = field(default_factory=list)
    visited: set[str] = field(default_factory=set)
    history: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    calls: float = 0.0
    rng: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Scored:
        """The best candidate."""
        return self.population[0]

    def summary(self) -> dict[str, Any]:
        """What a plan keeps of a search: how long it was, how it went, and what it cost."""
        return {
            "generations": self.generation - 1,
            "history": self.history,
            "evaluations": self.evaluations,
            "calls": self.calls,
        }


STATE: Format[SearchState] = Format("evolution", 1, SearchState, what="the state of a search")


@dataclass(frozen=True)
class _Rung:
    """Some candidates on one rung, as a measurement."""

    fitness: SamplingFitness
    candidates: tuple[Candidate, ...]
    rung: int

    def units(self) -> list[str]:
        return [f"{self.rung}:{c.key}" for c in self.candidates]

    def __call__(self, unit: str) -> Sums:
        return self.fitness(Candidate.parse(unit.partition(":")[2]), self.rung)


@dataclass
class Evolution:
    """A search.

    Attributes:
        space: what to choose from.
        fitness: the score.
        options: settings.
        seeds: candidates of the first generation; those over budget are left out.
        folder: for checkpoints and scores; None: the search cannot be resumed.
        signature: what the scores depend on beside the candidate; another one does not resume here.
        seed: of every random choice.
    """

    space: Space
    fitness: SamplingFitness
    options: EvolutionOptions
    seeds: Sequence[Candidate] = ()
    folder: Path | None = None
    signature: Any = None
    seed: int = 0

    def run(self) -> Generator[Progress, None, SearchState]:
        """Search; iterate to run, the generator returns the final state."""
        state = self._load() or SearchState(rng=np.random.default_rng(self.seed).bit_generator.state)
        while state.generation <= self.options.generations:
            rng = np.random.default_rng(0)
            rng.bit_generator.state = state.rng
            new = self._first(rng) if state.generation == 0 else self._children(rng, state)
            scored = yield from self._score(new, state)
            everyone = sorted([*state.population, *scored], key=lambda s: s.order)
            state.population = everyone[: self.options.population]
            state.visited |= {c.key for c in new}
            state.generation += 1
            state.rng = rng.bit_generator.state
            state.history.append(state.best.loss)
            self._save(state)
        return state

    def _first(self, rng: np.random.Generator) -> list[Candidate]:
        fitting = [c for c in self.seeds if self.space.fits(c)]
        mutated = (self.space.mutate(rng, c, self._rate(rng)) for c in fitting for _ in range(2))
        return self._filled(rng, [*fitting, *mutated], set())

    def _children(self, rng: np.random.Generator, state: SearchState) -> list[Candidate]:
        o, space = self.options, self.space
        parents = self._parents(state)
        made: list[Candidate] = []

        def add(count: int, child: Any) -> None:
            for _ in range(count):
                for _ in range(ATTEMPTS):
                    new = child()
                    if new.key not in state.visited and new not in made:
                        made.append(new)
                        break

        def pick() -> Candidate:
            return parents[int(rng.integers(len(parents)))]

        add(o.mutants, lambda: space.mutate(rng, pick(), self._rate(rng)))
        add(o.crossovers, lambda: space.cross(rng, pick(), pick()))
        return self._filled(rng, made, state.visited)

    def _parents(self, state: SearchState) -> list[Candidate]:
        """The best, and the best of every number of steps: a number that begins badly is not lost for good."""
        best = [s.candidate for s in state.population[: self.options.parents]]
        first: dict[int, Candidate] = {}
        for scored in state.population:
            first.setdefault(len(scored.candidate.steps), scored.candidate)
        return list(dict.fromkeys([*best, *first.values()]))

    def _filled(self, rng: np.random.Generator, made: Iterable[Candidate], visited: set[str]) -> list[Candidate]:
        """Distinct candidates, filled up with random ones; fewer where the space runs out of new ones."""
        found = list(dict.fromkeys(made))[: self.options.population]
        known = visited | {c.key for c in found}
        for _ in range(ATTEMPTS * self.options.population):
            if len(found) >= self.options.population:
                break
            candidate = self.space.random(rng)
            if candidate.key not in known:
                known.add(candidate.key)
                found.append(candidate)
        return found

    def _rate(self, rng: np.random.Generator) -> float:
        largest = self.options.mutation
        genes = len(self.space.choice_counts) + max(self.space.intervals)
        if not self.options.spread or genes * largest <= 1:
            return largest
        return math.exp(rng.uniform(-math.log(genes), math.log(largest)))

    def _score(self, new: list[Candidate], state: SearchState) -> Generator[Progress, None, list[Scored]]:
        """Score new candidates rung by rung; adds to the counts of ``state``."""
        rungs = self.fitness.rungs
        state.evaluations = state.evaluations or [0] * rungs
        alive, scored = new, {}
        for rung in range(rungs):
            measuring = measure(_Rung(self.fitness, tuple(alive), rung), self._scores, workers=self.options.workers)
            results = yield from reported(measuring, partial(self._in_search, state.generation, rung))
            sums = list(results.values())
            scored |= {c: Scored(c, rung, s["loss"]) for c, s in zip(alive, sums, strict=True)}
            state.evaluations[rung] += len(alive)
            state.calls += sum(s["calls"] for s in sums)
            ranked = sorted(alive, key=lambda c: scored[c].order)
            alive = ranked[: max(math.ceil(len(ranked) * KEEP), 1)] if ranked else []
        return list(scored.values())

    def _in_search(self, generation: int, rung: int, step: Progress) -> Progress:
        """Progress of one rung as part of the whole search."""
        unit = self.options.population
        share = (rung + step.done / max(step.total, 1)) / self.fitness.rungs
        total = (self.options.generations + 1) * unit
        return Progress(int((generation + share) * unit), total, f"generation {generation}, rung {rung}")

    @property
    def _scores(self) -> UnitResults[Sums]:
        return UnitResults(MEASURED, self.folder and self.folder / "scores", {"of": self.signature})

    def _load(self) -> SearchState | None:
        return None if self.folder is None else STATE.find(self.folder / FILE_NAME, self._settings())

    def _save(self, state: SearchState) -> None:
        if self.folder is not None:
            STATE.write(self.folder / FILE_NAME, state, self._settings())

    def _settings(self) -> dict[str, Any]:
        space = {"budget": self.space.budget, "choices": self.space.choice_counts}
        options = self.options.model_dump(include=set(EvolutionOptions.model_fields) - {"workers"})
        return {"scores": self.signature, "options": options, "seed": self.seed, "seeds": self.seeds, **space}
