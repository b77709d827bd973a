"""Toy search spaces whose optimum is known by trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np

from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.passes.steps.space import Candidate, LayerChoices, Space


class ToyFitness:
    """Noise that falls with the width, a schedule with interacting steps; rung 0 sees it with a little noise."""

    def __init__(self, space: Space, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.space = space
        self.sensitivity = np.exp(rng.normal(0, 1.5, len(space.choice_counts)))
        self.ideal = {
            k: [rng.uniform(g.members(i)[0], g.members(i)[-1]) for i in range(k)][::-1]
            for k, g in space.intervals.items()
        }
        self.scored: list[str] = []

    rungs = 2

    def true(self, c: Candidate) -> float:
        bits = [b for w in self.space.widths(c).values() for b in w]
        noise = sum(s * 4.0 ** -float(b) for s, b in zip(self.sensitivity, bits, strict=True)) * 20
        off = np.subtract(self.space.timesteps(c), self.ideal[len(c.steps)]) / 100
        path = float(np.square(off).sum() + np.square(np.diff(off)).sum()) + 4.0 / len(c.steps)
        return noise + path

    def __call__(self, c: Candidate, rung: int) -> dict[str, float]:
        assert self.space.fits(c), "an over-budget candidate was scored"
        self.scored.append(f"{rung}:{c.key}")
        blur = 1 + 0.03 * np.sin(sum(c.widths) + 7 * sum(c.steps)) if rung == 0 else 1.0
        return {"loss": float(self.true(c) * blur), "calls": float(len(c.steps) * (1 + rung))}

    def optimum(self) -> tuple[Candidate, float]:
        everything = (
            Candidate(steps, widths)
            for intervals in self.space.intervals.values()
            for steps in product(*map(range, intervals.sizes))
            for widths in product(*map(range, self.space.choice_counts))
        )
        best = min((c for c in everything if self.space.fits(c)), key=self.true)
        return best, self.true(best)


def toy_space(seed: int = 0, layers: int = 4, budget: float = 0.6) -> Space:
    """Two or three steps of ten timesteps, ``layers`` layers with two widths an operand: a few thousand candidates."""
    rng = np.random.default_rng(seed)
    macs = np.exp(rng.normal(0, 1, layers))
    choices = tuple(
        LayerChoices(f"l{i}", (4, 8), (4, 8), macs[i] * np.outer((4, 8), (4, 8)).astype(float)) for i in range(layers)
    )
    grid = tuple(float(t) for t in range(50, 1000, 100))
    intervals = {2: StepIntervals(grid, (0, 4)), 3: StepIntervals(grid, (0, 2, 5))}
    return Space(intervals, choices, budget * 3 * 64 * float(macs.sum()))
