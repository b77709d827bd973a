"""What a joint choice is compared with, and where it begins: the sampler's own timesteps, and uniform widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dq_plugins.passes.steps.fitness import SamplingFitness
from dq_plugins.passes.steps.joint_program import best_widths
from dq_plugins.passes.steps.space import Candidate, Space
from dq_plugins.passes.steps.stepper import Stepper
from dq_plugins.plots import lines
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import Width, entries_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Point = tuple[float, float, int]
"""Cost of a sampling run, measured loss, and number of steps."""


def widest(space: Space, count: int, noise: Mapping[Entry, float]) -> tuple[int, ...] | None:
    """Genes of the costliest uniform widths that fit the budget with so many steps; None: none do.

    Weights and inputs may differ; every layer has a width, or the next wider of its choices. Of equal costs (W6A4 and
    W4A6 in BitOps) the one with the least noise is taken.
    """
    fitting = []
    for width in {Width(w, a) for layer in space.layers for w in layer.weights for a in layer.inputs}:
        genes = uniform(space, width)
        cost = count * space.call_cost(genes)
        if cost <= space.budget:
            entries = entries_of(space.widths(Candidate((0,) * count, genes)))
            fitting.append((cost, -sum(noise.get(entry, 0.0) for entry in entries), genes))
    return max(fitting)[-1] if fitting else (None if space.layers else ())


def uniform(space: Space, width: Width) -> tuple[int, ...]:
    """Genes that give every layer a width, or the next wider of its choices (the widest, if there is none)."""
    genes: list[int] = []
    for layer in space.layers:
        for choices, wanted in ((layer.weights, width.weight), (layer.inputs, width.activation)):
            wide = [i for i, bits in enumerate(choices) if (bits or 32) >= (wanted or 32)]
            genes.append(min(wide, default=len(choices) - 1))
    return tuple(genes)


def seeds(space: Space, noise: Mapping[Entry, float], stepper: Stepper) -> list[Candidate]:
    """For every number of steps the sampler's own timesteps (the nearest in each interval), with the best widths."""
    found = []
    for count in sorted(space.intervals):
        own, widths = stepper.own(count), best_widths(space, noise, count)
        if widths is not None and len(own) == count:
            found.append(Candidate(space.intervals[count].nearest(own), widths))
    return found


def measured(space: Space, fitness: SamplingFitness, timesteps: Sequence[float], widths: tuple[int, ...]) -> Point:
    """Measure any schedule with any widths, on all images."""
    stand_in = Candidate((0,) * len(timesteps), widths)
    final = fitness.final(tuple(timesteps), space.widths(stand_in))
    return space.cost(stand_in), fitness.loss(final), len(timesteps)


def baselines(
    space: Space, fitness: SamplingFitness, noise: Mapping[Entry, float], budgets: Sequence[float]
) -> dict[str, list[Point]]:
    """The sampler's own timesteps with uniform and with the best widths: the best number of steps for each budget."""
    rules: dict[str, Callable[[Space, int], tuple[int, ...] | None]] = {
        "own timesteps, uniform bits": lambda limited, count: widest(limited, count, noise),
        "own timesteps, best bits": lambda limited, count: best_widths(limited, noise, count),
    }
    found: dict[str, list[Point]] = {name: [] for name in rules}
    for budget in budgets:
        limited = replace(space, budget=budget)
        for name, points in found.items():
            tried = []
            for count in sorted(space.intervals):
                genes = rules[name](limited, count)
                if genes is not None:
                    tried.append(measured(space, fitness, fitness.stepper.own(count), genes))
            if tried:
                points.append(min(tried, key=lambda point: point[1]))
    return found


def draw(points: Mapping[str, Sequence[Point]], x_label: str, chosen: tuple[float, float] | None = None) -> Figure:
    """Plot points, each with its number of steps; the chosen one is marked.

    Args:
        points: of each rule.
        x_label: what the cost is.
        chosen: cost and error of the plan that was taken.
    """
    ordered = {rule: sorted(each) for rule, each in points.items()}
    series = {rule: ([p[0] for p in each], [p[1] for p in each]) for rule, each in ordered.items()}
    y_label = "error to full precision over all recorded steps"
    figure = lines(series, x_label, y_label, log_x=True, log_y=True, chosen=chosen)
    (axis,) = figure.axes
    for cost, error, steps in (point for each in ordered.values() for point in each):
        axis.annotate(f"{steps}", (cost, error), fontsize=6, xytext=(2, 3), textcoords="offset points")
    return figure
