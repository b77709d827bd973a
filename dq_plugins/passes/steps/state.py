"""What a search knows: scored candidates, and everything it needs to go on after an interruption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dq_plugins.artifact import STRICT, Format
from dq_plugins.passes.steps.space import Candidate


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
