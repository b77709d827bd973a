"""Conformance of solvers: ``solver(program: ChoiceProgram, **options) -> Solution``, checked against enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import numpy as np
import torch

from dq_plugins.errors import BudgetError
from dq_plugins.registry import Kind
from dq_plugins.solvers.program import Budget, Choice, ChoiceProgram
from dq_plugins.solvers.solution import NO_CHOICE, Solution
from dq_plugins.testing.conformance import Conformance, expect, refused

STATUSES = ("optimal", "feasible", "infeasible", "unknown")


def random_program(seed: int, *, tightness: float = 0.4) -> ChoiceProgram:
    """Six choice sets of two to four widths, an error that falls with the width, and two budgets.

    Args:
        seed: seed of the errors and costs.
        tightness: where the limits lie between the cheapest choice (0) and the dearest (1).
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, size=6)
    start = np.concatenate([[0], np.cumsum(sizes)])
    weights = rng.integers(1, 30, size=6)
    error = np.concatenate([np.sort(rng.random(n))[::-1] * w for n, w in zip(sizes, weights, strict=True)])
    budgets = []
    for name in ("bits", "operations"):
        cost = np.concatenate([np.sort(rng.integers(1, 40, size=n)) for n in sizes]).astype(float)
        low, high = (sum(pick(cost[a:b]) for a, b in itertools.pairwise(start)) for pick in (np.min, np.max))
        budgets.append(Budget(name, cost, float(math.floor(low + tightness * (high - low)))))
    return ChoiceProgram(tuple(f"layer{i}" for i in range(6)), start, error, tuple(budgets))


def enumerated(program: ChoiceProgram) -> tuple[Choice, float]:
    """The best choice within the budgets and its error, by trying all; empty and infinite if there is none."""
    choices = np.array(list(itertools.product(*program.choice_sets())))
    within = np.all([budget.cost[choices].sum(1) <= budget.limit for budget in program.budgets], axis=0)
    errors = np.where(within, program.error[choices].sum(1), math.inf)
    best = choices[errors.argmin()]
    return (best, program.value(best)) if errors.min() < math.inf else (NO_CHOICE, math.inf)


class SolverConformance(Conformance):
    """A solver keeps the budgets, and says truthfully how good its answer is and how good any could be.

    Exact and heuristic solvers pass alike: what is checked is that the answer is what it says it is.
    """

    kind: ClassVar[Kind] = "solver"

    def programs(self) -> list[ChoiceProgram]:
        """Small programs with a feasible choice: tight, loose, and without any budget."""
        programs = [random_program(seed, tightness=t) for seed, t in enumerate((0.05, 0.2, 0.4, 0.4, 0.6, 1.0))]
        free = programs[0]
        return [
            *(each for each in programs if enumerated(each)[1] < math.inf),
            ChoiceProgram(free.names, free.start, free.error),
        ]

    def solve(self, program: ChoiceProgram) -> Solution:
        """The solver's answer, with this suite's options."""
        return self.plugin(program, **self.options)

    def test_answer_is_a_solution_with_a_status(self) -> None:
        for program in self.programs():
            found = self.solve(program)
            expect(isinstance(found, Solution), f"{self.name!r} gave a {type(found).__name__}; expected a Solution")
            expect(found.status in STATUSES, f"status {found.status!r} is none of {', '.join(STATUSES)}")

    def test_choice_takes_one_option_from_every_choice_set_within_the_budgets(self) -> None:
        for program in self.programs():
            found = self.solve(program)
            if found.status in ("optimal", "feasible"):
                one_each = len(found.choice) == len(program.names) and all(
                    column in choice_set for column, choice_set in zip(found.choice, program.choice_sets(), strict=True)
                )
                expect(one_each, f"choice {found.choice} does not take one column of every choice set {program.start}")
                used = {budget.name: (budget.used(found.choice), budget.limit) for budget in program.budgets}
                expect(program.feasible(found.choice), f"status {found.status!r}, but used and limit are {used}")

    def test_objective_is_the_error_of_the_choice(self) -> None:
        for program in self.programs():
            found = self.solve(program)
            if found.status in ("optimal", "feasible"):
                value = program.value(found.choice)
                expect(
                    math.isclose(found.objective, value, rel_tol=1e-9), f"objective {found.objective}, choice {value}"
                )

    def test_bound_holds(self) -> None:
        for program in self.programs():
            found, best = self.solve(program), enumerated(program)[1]
            expect(found.bound <= best + 1e-9 * max(1.0, abs(best)), f"bound {found.bound} above the optimum {best}")

    def test_optimal_means_optimal(self) -> None:
        for program in self.programs():
            found, best = self.solve(program), enumerated(program)[1]
            if found.status == "optimal":
                slack = found.tolerance + 1e-9 * max(1.0, abs(best))
                expect(found.objective <= best + slack, f"'optimal' at {found.objective}; the optimum is {best}")

    def test_feasible_program_is_never_called_infeasible(self) -> None:
        """``unknown`` is honest, ``infeasible`` is a proof."""
        for program in self.programs():
            status = self.solve(program).status
            expect(status != "infeasible", f"called infeasible, with an optimum of {enumerated(program)[1]}")

    def test_without_budgets_every_choice_set_gives_its_best(self) -> None:
        program = self.programs()[-1]
        found = self.solve(program)
        best = program.value(program.cheapest(program.error))
        expect(math.isclose(found.objective, best, rel_tol=1e-9), f"objective {found.objective}; the best is {best}")

    def test_impossible_budget_is_an_answer_with_the_way_out(self) -> None:
        program = random_program(0)
        floor = program.budgets[0].used(program.cheapest(program.budgets[0].cost))
        impossible = program.with_limits({"bits": floor - 5})
        found = self.solve(impossible)
        expect(
            found.status in ("infeasible", "unknown"), f"a budget below the least possible is called {found.status!r}"
        )
        with refused("requiring the answer to an impossible budget", BudgetError):
            found.require()
        if found.nearest:
            eased = impossible.with_limits({name: limit * (1 + 1e-9) for name, limit in found.nearest.items()})
            expect(enumerated(eased)[1] < math.inf, f"no choice meets the nearest limits {found.nearest} either")

    def test_same_program_same_answer(self) -> None:
        for program in self.programs():
            answers = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                np.random.seed(seed)  # the global state is what this is about
                found = self.solve(program)
                answers.append((found.status, found.choice.tolist(), found.objective))
            expect(answers[0] == answers[1], f"one program, two answers: {answers[0]} and {answers[1]}")

    def test_program_is_left_as_it_is(self) -> None:
        for seed in range(3):
            program, again = random_program(seed), random_program(seed)
            self.solve(program)
            same = np.array_equal(program.error, again.error) and np.array_equal(program.start, again.start)
            for one, other in zip(program.budgets, again.budgets, strict=True):
                same = same and np.array_equal(one.cost, other.cost) and one.limit == other.limit
            expect(same, f"{self.name!r} changed the program it was given")

    def test_unknown_option_is_refused(self) -> None:
        options: dict[str, Any] = {**self.options, "no_such_option": 1}
        with refused(f"the option 'no_such_option' by the solver {self.name!r}", Exception):
            self.plugin(random_program(0), **options)
