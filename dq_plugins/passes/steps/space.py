"""What a joint search chooses from: one timestep in each interval, one width for each operand of each layer.

    cost(candidate) = K * (overhead + sum_l  cost_l[w_l, a_l])      <= budget

with K steps, the cost of one denoiser call by layer and pair of widths (BitOps, or measured time), and the overhead of
a call outside these layers. K is part of the choice, so steps and bits are traded against each other.

Source: TMPQ-DM (Sun et al. 2024), whose shipped mode fixes K and gives all steps the same widths, as here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dq_plugins.errors import BudgetError
from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.quantized.width import Width

KEEP_STEPS = 0.8
"""How often a mutation leaves the number of steps alone."""


class Candidate(NamedTuple):
    """A point of a `Space`, as positions.

    Attributes:
        steps: in each interval of timesteps, which member; interval 0 is the last step of sampling.
        widths: weight and input of each layer in turn, positions among their choices.
    """

    steps: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in stores and checkpoints."""
        return ".".join(map(str, self.steps)) + "|" + ".".join(map(str, self.widths))

    @classmethod
    def parse(cls, key: str) -> Candidate:
        """The candidate of a key."""
        steps, widths = (tuple(int(v) for v in part.split(".") if v) for part in key.split("|"))
        return cls(steps, widths)


@dataclass(frozen=True, eq=False)
class LayerChoices:
    """What one layer may be.

    Attributes:
        name: the layer.
        weights: widths of its weight, cheapest first; None is full precision.
        inputs: widths of its input, cheapest first.
        cost: of one denoiser call at each pair, ``[len(weights), len(inputs)]``.
    """

    name: str
    weights: tuple[int | None, ...]
    inputs: tuple[int | None, ...]
    cost: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Space:
    """Everything a search may choose.

    Attributes:
        intervals: by number of steps, the intervals of timesteps.
        layers: the choices.
        budget: limit on the cost of a whole sampling run.
        unit: of costs, for messages.
        overhead: cost of one denoiser call beside the layers.
    """

    intervals: Mapping[int, StepIntervals]
    layers: tuple[LayerChoices, ...]
    budget: float
    unit: str = "BitOps"
    overhead: float = 0.0

    def __post_init__(self) -> None:
        cheapest = min(self.intervals) * self.call_cost(self.cheapest)
        if cheapest > self.budget:
            raise BudgetError(
                f"no schedule fits the budget of {self.budget:.6g} {self.unit}: {min(self.intervals)} steps at the "
                f"cheapest widths cost {cheapest:.6g}. Raise it to that, or allow fewer steps."
            )

    @cached_property
    def choice_counts(self) -> tuple[int, ...]:
        """Number of choices of every gene of ``Candidate.widths``."""
        return tuple(size for layer in self.layers for size in (len(layer.weights), len(layer.inputs)))

    def cost(self, candidate: Candidate) -> float:
        """Cost of the whole sampling run."""
        return len(candidate.steps) * self.call_cost(candidate.widths)

    def call_cost(self, widths: Sequence[int]) -> float:
        """Cost of one denoiser call with the widths of a candidate."""
        pairs = zip(self.layers, widths[::2], widths[1::2], strict=True)
        return self.overhead + sum(float(layer.cost[w, a]) for layer, w, a in pairs)

    def fits(self, candidate: Candidate) -> bool:
        """Whether it is within the budget."""
        return self.cost(candidate) <= self.budget

    def timesteps(self, candidate: Candidate) -> tuple[float, ...]:
        """The schedule of a candidate, descending."""
        return self.intervals[len(candidate.steps)].timesteps(candidate.steps)

    def widths(self, candidate: Candidate) -> dict[str, Width]:
        """The widths of a candidate, by layer."""
        pairs = zip(self.layers, candidate.widths[::2], candidate.widths[1::2], strict=True)
        return {layer.name: Width(layer.weights[w], layer.inputs[a]) for layer, w, a in pairs}

    def random(self, rng: np.random.Generator) -> Candidate:
        """A random candidate within the budget."""
        sizes = self.intervals[int(rng.choice(sorted(self.intervals)))].sizes
        steps = tuple(int(rng.integers(s)) for s in sizes)
        return self.fit(rng, Candidate(steps, tuple(int(rng.integers(m)) for m in self.choice_counts)))

    def fit(self, rng: np.random.Generator, candidate: Candidate) -> Candidate:
        """Make random genes cheaper until the candidate is within the budget; where that is not enough, fewer steps."""
        widths = list(candidate.widths)
        while not self.fits(candidate):
            cheaper = self._cheaper(widths)
            if cheaper:
                gene = int(rng.choice(list(cheaper)))
                widths[gene] = cheaper[gene]
            elif tuple(widths) != self.cheapest:
                widths = list(self.cheapest)  # measured times need not fall with the width, so this is another place
            else:
                fewer = max(k for k in self.intervals if k < len(candidate.steps))
                return self.fit(rng, self.with_steps(candidate, fewer))
            candidate = candidate._replace(widths=tuple(widths))
        return candidate

    @cached_property
    def cheapest(self) -> tuple[int, ...]:
        """Widths with the least cost; among equal costs (measured times tie) the widest, which err least."""
        pairs = (np.unravel_index(_last(layer.cost, layer.cost.min()), layer.cost.shape) for layer in self.layers)
        return tuple(int(gene) for pair in pairs for gene in pair)

    def _cheaper(self, widths: Sequence[int]) -> dict[int, int]:
        """For every gene that another of its choices is cheaper than, the costliest of that (the widest, on ties)."""
        found = {}
        for i, layer in enumerate(self.layers):
            weight, activation = widths[2 * i : 2 * i + 2]
            now = layer.cost[weight, activation]
            for gene, costs in ((2 * i, layer.cost[:, activation]), (2 * i + 1, layer.cost[weight])):
                below = np.where(costs < now, costs, -np.inf)
                if below.max() > -np.inf:
                    found[gene] = _last(below, below.max())
        return found

    def with_steps(self, candidate: Candidate, count: int) -> Candidate:
        """The same widths with another number of steps, spread over time as the candidate's own."""
        own = self.timesteps(candidate)
        spread = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(own)), own) if count > 1 else own[:1]
        return candidate._replace(steps=self.intervals[count].nearest([float(t) for t in spread]))

    def mutate(self, rng: np.random.Generator, parent: Candidate, rate: float) -> Candidate:
        """Draw every gene again with probability ``rate``: widths from their choices, timesteps within their intervals.

        Half of the new timesteps are neighbours of the old ones. One mutation in five also changes the number of steps,
        where there is a choice. The child is within the budget.
        """
        others = sorted(set(self.intervals) - {len(parent.steps)})
        if others and rng.random() > KEEP_STEPS:
            parent = self.with_steps(parent, int(rng.choice(others)))
        sizes = self.intervals[len(parent.steps)].sizes
        steps = tuple(
            _moved(rng, gene, size) if rng.random() < rate else gene
            for gene, size in zip(parent.steps, sizes, strict=True)
        )
        widths = tuple(
            int(rng.integers(count)) if rng.random() < rate else gene
            for gene, count in zip(parent.widths, self.choice_counts, strict=True)
        )
        return self.fit(rng, Candidate(steps, widths))

    def cross(self, rng: np.random.Generator, one: Candidate, other: Candidate) -> Candidate:
        """Every gene from either parent; timesteps as a whole where the parents differ in their number. Fits."""
        steps = (one if rng.random() < 0.5 else other).steps
        if len(one.steps) == len(other.steps):
            steps = _mixed(rng, one.steps, other.steps)
        return self.fit(rng, Candidate(steps, _mixed(rng, one.widths, other.widths)))


def _last(values: NDArray[np.float64], value: float) -> int:
    return int(np.flatnonzero(values == value)[-1])


def _mixed(rng: np.random.Generator, one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True))


def _moved(rng: np.random.Generator, gene: int, size: int) -> int:
    if rng.random() < 0.5:
        return int(rng.integers(size))
    return int(np.clip(gene + rng.choice((-1, 1)), 0, size - 1))
