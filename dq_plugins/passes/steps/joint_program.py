"""The joint program: timesteps and widths in one exact model, from costs that are measured once.

With one node chosen in each interval (``x_e`` the steps between them) and one option of every layer (``z``),

    minimise    sum_e d_e^2 x_e  +  k (sum_e q_e x_e) (sum_l n_l z_l)
    subject to  K (overhead + sum_l cost_l z_l)  <=  budget

- ``d_e``: root mean square error of the final image that step e makes, `dq_plugins.passes.steps.Transitions`. Errors of
  successive steps are taken as independent, which predicts the size of the whole error best;
- ``n_l``: noise power of the denoiser's output by layer and width, as bit allocation uses it;
- ``q_e``: what noise of the output at step e becomes in the final image; ``k`` corrects it by a measured run.

K is tried in turn, and the best K wins: the answer is the optimum over all. CP-SAT solves each model to proven
optimality of the program; whether the program is right about the images is for the search beside it to find out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dq_plugins.passes.allocation.problem import error_of
from dq_plugins.passes.steps.intervals import StepIntervals
from dq_plugins.passes.steps.space import Candidate, Space
from dq_plugins.passes.steps.transitions import END, Transitions
from dq_plugins.quantized.candidates import Entry
from dq_plugins.quantized.width import Width
from dq_plugins.solvers.cp_sat import cp_sat
from dq_plugins.solvers.integers import add_choice_sets, chosen_columns, power_of_two, to_integers
from dq_plugins.solvers.program import ChoiceProgram, Floats

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

LEVELS = 2**13
"""Integer levels of each of the three sums; their products stay far below 2^63."""


@dataclass(frozen=True)
class JointSolution:
    """What the program says.

    Attributes:
        candidate: timesteps and widths; None when nothing fits.
        status: ``optimal``, ``feasible`` (out of time) or ``infeasible``.
        predicted: mean square error of the final images that it predicts.
        bound: no candidate has a lower prediction, up to the rounding of the model.
        by_steps: prediction for every number of steps that fits.
        optima: best candidate of every number of steps that fits.
    """

    candidate: Candidate | None
    status: Literal["optimal", "feasible", "infeasible"]
    predicted: float
    bound: float
    by_steps: Mapping[int, float]
    optima: Mapping[int, Candidate]

    def as_data(self, transitions: Transitions | None = None) -> dict[str, Any]:
        """JSON data for a plan's section, with the cost of what was measured."""
        finite = math.isfinite(self.predicted)
        return {
            "status": self.status,
            "predicted": self.predicted if finite else None,
            "bound": self.bound if finite else None,
            "by_steps": {str(count): value for count, value in self.by_steps.items()},
            "calls": None if transitions is None else transitions.calls,
        }


@dataclass(frozen=True, eq=False)
class JointProgram:
    """A joint program.

    Attributes:
        space: timesteps, choices and budget.
        transitions: costs of steps; its nodes are the candidates of the space's intervals.
        noise: noise power by entry; full precision has none.
        scale: ``k``.
    """

    space: Space
    transitions: Transitions
    noise: Mapping[Entry, float]
    scale: float = 1.0

    def predicted(self, candidate: Candidate) -> tuple[float, float]:
        """Mean square error of the final images that the program predicts: of the steps, and of the widths."""
        nodes = [self.transitions.nodes.index(t) for t in self.space.timesteps(candidate)]
        steps = [*pairwise(nodes), (nodes[-1], END)]
        sizes = [self.transitions.start(nodes[0]), *(self.transitions.error(*s) for s in steps)]
        gain = sum(self.transitions.gain(*s) for s in steps)
        noise = sum(error_of(self.noise, name, width) for name, width in self.space.widths(candidate).items())
        return sum(s * s for s in sizes), self.scale * gain * noise

    def solve(self, *, seconds: float = 5.0, only: Sequence[int] | None = None) -> JointSolution:
        """The best of all numbers of steps (or ``only`` these), each solved in CP-SAT's deterministic ``seconds``."""
        counts = sorted(self.space.intervals if only is None else only)
        found = {count: solved for count in counts if (solved := _solve(self, count, seconds)) is not None}
        if not found:
            return JointSolution(None, "infeasible", math.inf, math.inf, {}, {})
        optima = {count: candidate for count, (candidate, _, _) in found.items()}
        predictions = {count: sum(self.predicted(candidate)) for count, candidate in optima.items()}
        best = min(predictions, key=lambda count: (predictions[count], count))
        status = "optimal" if all(proven for _, _, proven in found.values()) else "feasible"
        bound = min(predictions[best], *(bound for _, bound, _ in found.values()))
        return JointSolution(optima[best], status, predictions[best], bound, predictions, optima)


def widths_program(
    space: Space, noise: Mapping[Entry, float], count: int
) -> tuple[ChoiceProgram, list[tuple[int, int]]]:
    """The choice program of the widths for ``count`` steps, and each column's positions among its layer's choices.

    Raises:
        BudgetError: a width among the choices has no measured noise.
    """
    errors, costs, columns = {}, {}, []
    for layer in space.layers:
        pairs = [(w, a) for w in range(len(layer.weights)) for a in range(len(layer.inputs))]
        errors[layer.name] = [error_of(noise, layer.name, Width(layer.weights[w], layer.inputs[a])) for w, a in pairs]
        costs[layer.name] = [float(layer.cost[pair]) for pair in pairs]
        columns += pairs
    return ChoiceProgram.of(errors, {space.unit: (costs, space.budget / count - space.overhead)}), columns


def best_widths(space: Space, noise: Mapping[Entry, float], count: int) -> tuple[int, ...] | None:
    """Genes of the widths with the least noise within the budget of ``count`` steps; None: nothing fits."""
    if not space.layers:
        return ()
    program, columns = widths_program(space, noise, count)
    solution = cp_sat(program)
    return tuple(gene for c in solution.choice for gene in columns[int(c)]) if solution.choice.size else None


def _solve(program: JointProgram, count: int, seconds: float) -> tuple[Candidate, float, bool] | None:
    """Best candidate of ``count`` steps, a bound on its prediction, and whether it is proven; None: none fits."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    paths = _Paths(model, program, program.space.intervals[count])
    widths = _Widths(model, program, count)
    noise = model.new_int_var(0, LEVELS**2, "")
    model.add_multiplication_equality(noise, [paths.gain, widths.noise])
    # both terms in units of the final image's mean square error, brought to one integer scale
    units = (paths.error_unit / LEVELS, program.scale * paths.gain_unit * widths.unit)
    largest = max(units)
    factors = [max(round(unit / largest * 2**20), 0) for unit in units]
    model.minimize(factors[0] * LEVELS * paths.error + factors[1] * noise)
    paths.hint(model)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_deterministic_time = seconds
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    candidate = Candidate(paths.chosen(solver), widths.chosen(solver))
    return candidate, solver.best_objective_bound * largest / 2**20, status == cp_model.OPTIMAL


class _Paths:
    """One node in every interval, and the sums of what the steps between them cost."""

    def __init__(self, model: cp_model.CpModel, program: JointProgram, intervals: StepIntervals) -> None:
        t = program.transitions
        self.nodes = [[t.nodes.index(value) for value in intervals.members(k)] for k in range(len(intervals))]
        self.picked = [[model.new_bool_var("") for _ in members] for members in self.nodes]
        for members in self.picked:
            model.add_exactly_one(members)
        steps: list[tuple[Any, float, float]] = []
        for node, picked in zip(self.nodes[-1], self.picked[-1], strict=True):
            steps.append((picked, t.start(node), 0.0))
        for node, picked in zip(self.nodes[0], self.picked[0], strict=True):
            steps.append((picked, t.error(node, END), t.gain(node, END)))
        for k in range(1, len(intervals)):
            steps += self._between(model, t, k)
        taken, error, gain = zip(*steps, strict=True)
        self.error, self.error_unit = _total(model, list(taken), np.array(error) ** 2)
        self.gain, self.gain_unit = _total(model, list(taken), np.array(gain))

    def _between(self, model: cp_model.CpModel, t: Transitions, k: int) -> list[tuple[Any, float, float]]:
        """Steps from interval k to interval k - 1: as many units of flow as nodes: one step leaves, one arrives."""
        arcs: dict[tuple[int, int], Any] = {}
        for i, start in enumerate(self.nodes[k]):
            for j, end in enumerate(self.nodes[k - 1]):
                arcs[i, j] = (model.new_bool_var(""), t.error(start, end), t.gain(start, end))
        for i, picked in enumerate(self.picked[k]):
            model.add(sum(arc[0] for (a, _), arc in arcs.items() if a == i) == picked)
        for j, picked in enumerate(self.picked[k - 1]):
            model.add(sum(arc[0] for (_, b), arc in arcs.items() if b == j) == picked)
        return list(arcs.values())

    def hint(self, model: cp_model.CpModel) -> None:
        """Begin at the middle of every interval."""
        for members in self.picked:
            for place, variable in enumerate(members):
                model.add_hint(variable, place == len(members) // 2)

    def chosen(self, solver: cp_model.CpSolver) -> tuple[int, ...]:
        return tuple(next(i for i, v in enumerate(members) if solver.value(v)) for members in self.picked)


class _Widths:
    """One pair of widths for every layer within the budget, and the sum of their noise."""

    def __init__(self, model: cp_model.CpModel, program: JointProgram, count: int) -> None:
        from ortools.sat.python import cp_model

        self.columns: list[tuple[int, int]] = []
        self.picked: list[Any] = []
        self.noise, self.unit = model.new_constant(0), 0.0
        if not program.space.layers:
            return
        choice, self.columns = widths_program(program.space, program.noise, count)
        self.picked = add_choice_sets(model, choice)
        for costs, limit, _ in to_integers(choice).rows:
            model.add(cp_model.LinearExpr.weighted_sum(self.picked, costs.tolist()) <= limit)
        self.noise, self.unit = _total(model, self.picked, choice.error)

    def chosen(self, solver: cp_model.CpSolver) -> tuple[int, ...]:
        return tuple(gene for column in chosen_columns(solver, self.picked) for gene in self.columns[column])


def _total(model: cp_model.CpModel, variables: list[Any], values: Floats) -> tuple[Any, float]:
    """An integer variable equal to ``sum values variables`` in steps of a unit, and that unit.

    Each value is rounded to nearest, so it is off by at most 2^-13 of the largest; the total is rounded up to at most
    `LEVELS` units, so that products of totals stay small, and is off by less than one unit more.
    """
    from ortools.sat.python import cp_model

    scale = power_of_two(values, LEVELS.bit_length() - 1)
    fine = np.rint(values * scale).astype(np.int64)
    divisor = max(math.ceil(int(fine.sum()) / LEVELS), 1)
    total = model.new_int_var(0, LEVELS, "")
    model.add(divisor * total >= cp_model.LinearExpr.weighted_sum(variables, fine.tolist()))
    return total, divisor / scale
