from __future__ import annotations

import numpy as np

from dq_plugins import registry
from dq_plugins.passes.allocation.front import draw, fronts, mean_weight_bits, predicted_error, uniform_points
from dq_plugins.passes.allocation.problem import AllocationProblem, LayerCost, allocate
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import WidthChoices
from dq_plugins.solvers.cp_sat import cp_sat

BITS = (2, 3, 4, 6, 8)


def problem() -> AllocationProblem:
    rng = np.random.default_rng(0)
    layers = {f"l{i}": LayerCost(int(n), 10, 100) for i, n in enumerate(np.exp(rng.normal(7, 1, 12)))}
    scale = {n: float(np.exp(rng.normal(0, 2))) for n in layers}
    errors = {Entry(n, "weight", b): scale[n] * 4.0**-b for n in layers for b in BITS}
    return AllocationProblem(layers, errors, default_choices=WidthChoices(BITS))


def test_the_exact_front_is_below_every_rule_at_every_size():
    limits = (2.5, 3.0, 4.0, 5.0)
    found = {front.rule: front for front in fronts(problem(), limits)}
    exact = found.pop("exact (ours)")
    assert all(size <= limit for (size, _), limit in zip(exact.points, limits, strict=True))
    for other in found.values():
        for size, error in other.points:
            budgeted = next(iter(fronts(problem(), [size], {"cp-sat": "exact"})))
            assert budgeted.points[0][1] <= error * (1 + 1e-9)


def test_every_search_starts_from_the_solution_of_the_tighter_budget(monkeypatch):
    hints = []

    def counting(program, *, hint=None):
        hints.append(hint if hint is None else program.feasible(hint))
        return cp_sat(program, hint=hint)

    monkeypatch.setattr(registry, "function", lambda kind, name: counting)
    exact, _ = fronts(problem(), (1.0, 2.5, 3.0, 4.0), {"cp-sat": "exact"})
    assert hints == [None, None, True, True]  # the first cannot be met, and does not end the sweep
    errors = [error for _, error in exact.points]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)


def test_uniform_points_have_one_width():
    front = uniform_points(problem())
    assert tuple(size for size, _ in front.points) == BITS
    for bits, widths in zip(BITS, front.widths, strict=True):
        assert {w.weight for w in widths.values()} == {bits}


def test_uniform_points_keep_layers_at_their_least_bits():
    p = problem()
    first = next(iter(p.layers))
    for bits, widths in zip(BITS, uniform_points(p, {first: 8}).widths, strict=True):
        assert widths[first].weight == 8
        assert {w.weight for name, w in widths.items() if name != first} == {bits}


def test_sizes_and_errors_are_those_of_the_widths():
    p = problem()
    found = allocate(p)
    assert mean_weight_bits(p, found.widths) == 8
    assert predicted_error(p, found.widths) == found.error


def test_the_plot_has_a_line_for_every_rule_and_marks_the_chosen_point():
    found = {front.rule: front.points for front in fronts(problem(), (3.0, 4.0))}
    figure = draw(found, found["exact (ours)"][1])
    (axis,) = figure.axes
    labels = [line.get_label() for line in axis.lines]
    assert labels == [*found, "chosen"]
    assert axis.get_yscale() == "log"
