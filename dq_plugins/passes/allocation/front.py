"""Error against size: the exact program beside the rules that others use, at many budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dq_plugins import registry
from dq_plugins.passes.allocation.columns import widths_of
from dq_plugins.passes.allocation.problem import AllocationProblem, error_of, total_bits
from dq_plugins.plots import lines
from dq_plugins.quantized.width import Width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULES = {"cp-sat": "exact (ours)", "greedy": "greedy", "threshold": "one threshold (Apple)"}
"""Solvers that a front compares, and what the plot calls them."""


class Front(NamedTuple):
    """Points of one rule.

    Attributes:
        rule: what the plot calls it.
        points: mean weight bits, and predicted or measured error, of each.
        widths: the widths of each.
    """

    rule: str
    points: tuple[tuple[float, float], ...]
    widths: tuple[Mapping[str, Width], ...]


def mean_weight_bits(problem: AllocationProblem, widths: Mapping[str, Width]) -> float:
    """Mean bits of a weight, full precision counted as it is."""
    layers = problem.layers
    bits = sum(layers[name].weights * problem.bits(width.weight) for name, width in widths.items())
    return bits / sum(layers[name].weights for name in widths)


def predicted_error(problem: AllocationProblem, widths: Mapping[str, Width]) -> float:
    """Sum of the errors of some widths."""
    return sum(error_of(problem.errors, name, width) for name, width in widths.items())


def uniform_points(problem: AllocationProblem, least: Mapping[str, int] | None = None) -> Front:
    """The same weight bits in every layer (the next wider, where it is no choice), inputs at their widest.

    Args:
        problem: the layers and their choices.
        least: weight bits that some layers have at least: 8 for the first and last ones, as quantization scripts do it.
    """
    every = sorted({w for name in problem.layers for w in problem.choices_for(name).weight if w is not None})

    def widths(bits: int) -> dict[str, Width]:
        found = {}
        for name in problem.layers:
            weight, activation = problem.choices_for(name)
            wanted = max(bits, (least or {}).get(name, 0))
            at_least = [w for w in weight if w is None or w >= wanted] or [max(weight, key=problem.bits)]
            found[name] = Width(min(at_least, key=problem.bits), max(activation, key=problem.bits))
        return found

    points = [widths(bits) for bits in every]
    return _front(problem, "uniform", points)


def _front(problem: AllocationProblem, rule: str, points: Sequence[Mapping[str, Width]]) -> Front:
    found = tuple((mean_weight_bits(problem, widths), predicted_error(problem, widths)) for widths in points)
    return Front(rule, found, tuple(points))


def fronts(
    problem: AllocationProblem,
    weight_bits: Sequence[float],
    rules: Mapping[str, str] = RULES,
    least: Mapping[str, int] | None = None,
) -> Iterator[Front]:
    """Fronts over limits on the mean weight bits, best ascending: each solution starts the next search.

    The other budgets are the problem's. Yields a front for each of the ``rules`` (solvers and what to call them), with
    the points that have a solution, then the one of uniform widths (``least``: see `uniform_points`).
    """
    swept = replace(problem, budgets=problem.budgets.model_copy(update={"weight_bits": max(weight_bits)}))
    program, columns = swept.program()
    weights = sum(cost.weights for cost in problem.layers.values())
    limits = [total_bits(bits, weights) for bits in weight_bits]
    for name, rule in rules.items():
        solver, choice, points = registry.function("solver", name), None, []
        for limit in limits:
            solution = solver(program.with_limits({"weight bits": limit}), hint=choice)
            if solution.choice.size:
                choice = solution.choice
                points.append(widths_of(columns, choice))
        yield _front(swept, rule, points)
    yield uniform_points(problem, least)


def draw(
    fronts: Mapping[str, Sequence[tuple[float, float]]],
    chosen: tuple[float, float] | None = None,
    y_label: str = "noise power of the output / signal",
) -> Figure:
    """Plot fronts; the chosen point is marked.

    Args:
        fronts: by rule, mean weight bits and error of each point.
        chosen: mean weight bits and error of the allocation that was taken.
        y_label: what the error is.
    """
    series = {rule: ([p[0] for p in points], [p[1] for p in points]) for rule, points in fronts.items()}
    return lines(series, "mean bits of a weight", y_label, log_y=True, chosen=chosen)
