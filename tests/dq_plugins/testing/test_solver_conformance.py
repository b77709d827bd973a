from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dq_plugins.solvers.program import ChoiceProgram
from dq_plugins.solvers.solution import NO_CHOICE, Solution, Use
from dq_plugins.testing.solver_conformance import SolverConformance, enumerated, random_program


def enumerate_all(program):
    """Exact, by enumeration."""
    choice, best = enumerated(program)
    if best == math.inf:
        dearest = {b.name: b.used(program.cheapest(-b.cost)) for b in program.budgets}
        uses = tuple(Use(b.name, 0.0, b.limit) for b in program.budgets)
        return Solution("infeasible", choice, math.inf, math.inf, uses, nearest=dearest)
    return Solution("optimal", choice, best, best)


def thriftiest(program):
    """Heuristic: the least of the first cost; no proof, no bound."""
    choice = program.cheapest(program.budgets[0].cost if program.budgets else program.error)
    if not program.feasible(choice):
        return Solution("unknown", NO_CHOICE, math.inf, -math.inf)
    return Solution("feasible", choice, program.value(choice), -math.inf)


def altered(change):
    def solver(program):
        """Exact, with a fault."""
        found = enumerate_all(program)
        return change(program, found) if found.status == "optimal" else found

    return solver


def greedy(program, found):
    choice = program.cheapest(program.error)
    return replace(found, choice=choice, objective=program.value(choice))


def second_best(program, found):
    choice, _ = enumerated(ChoiceProgram(program.names, program.start, -program.error, program.budgets))
    return replace(found, choice=choice, objective=program.value(choice))


def in_place(program, found):
    program.error[:] = 0
    return found


def optimist(program):
    """Calls everything optimal."""
    found = enumerate_all(program)
    return replace(found, status="optimal")


def wrong_way_out(program):
    """Points to limits that nobody can meet."""
    found = enumerate_all(program)
    return found if found.status == "optimal" else replace(found, nearest={"bits": 0.0})


def any_option(program, **options):
    """Takes any option."""
    return enumerate_all(program)


FAULTS = {
    "answer is a solution with a status": [
        altered(lambda p, s: s.choice),
        altered(lambda p, s: replace(s, status="ok")),
    ],
    "choice takes one option from every choice set within the budgets": [
        altered(greedy),
        altered(lambda p, s: replace(s, choice=s.choice[:-1])),
        altered(lambda p, s: replace(s, choice=s.choice[::-1])),
    ],
    "objective is the error of the choice": [altered(lambda p, s: replace(s, objective=s.objective * 0.9))],
    "bound holds": [altered(lambda p, s: replace(s, bound=s.bound * 1.1))],
    "optimal means optimal": [altered(second_best)],
    "feasible program is never called infeasible": [altered(lambda p, s: replace(s, status="infeasible"))],
    "without budgets every choice set gives its best": [
        altered(lambda p, s: replace(second_best(p, s), status="feasible"))
    ],
    "impossible budget is an answer with the way out": [optimist, wrong_way_out],
    "same program same answer": [altered(lambda p, s: replace(s, objective=s.objective + 1e-12 * np.random.rand()))],
    "program is left as it is": [altered(in_place)],
    "unknown option is refused": [any_option],
}


@pytest.mark.parametrize("solver", [enumerate_all, thriftiest])
def test_a_sound_solver_passes(failures, solver):
    assert failures(SolverConformance, solver) == set()


@pytest.mark.parametrize(("caught", "solver"), [(name, each) for name, many in FAULTS.items() for each in many])
def test_a_fault_is_caught_by_the_test_that_is_named_after_it(failures, caught, solver):
    assert caught in failures(SolverConformance, solver)


def test_every_check_has_a_fault_that_it_catches():
    own = {name.removeprefix("test_").replace("_", " ") for name in vars(SolverConformance) if "test_" in name}
    assert own == set(FAULTS)


def test_programs_are_worth_solving():
    for seed in range(4):
        program = random_program(seed)
        greedy_choice = program.cheapest(program.error)
        assert program.value(greedy_choice) < enumerated(program)[1] < math.inf
