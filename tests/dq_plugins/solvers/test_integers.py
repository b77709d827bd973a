from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from dq_plugins.solvers import Budget, ChoiceProgram
from dq_plugins.solvers.integers import to_integers


@pytest.mark.parametrize("unit", [1.0, 2.0**45])
def test_integer_costs_lose_nothing(unit: float):
    program = ChoiceProgram.of({"a": [1.0, 0.0]}, {"bits": ({"a": [3 * unit, 5 * unit + 1]}, 5 * unit + 1)})
    ((costs, limit, scale),) = to_integers(program).rows
    assert [Fraction(int(c)) / Fraction(scale) for c in costs] == [0, 2 * Fraction(unit) + 1]
    assert limit == costs[1]


def test_float_budgets_round_costs_up_and_the_limit_down():
    cost, limit = np.array([0.1, 0.3, 0.2, 0.7]), 0.6
    program = ChoiceProgram(("a", "b"), np.array([0, 2, 4]), np.arange(4.0), (Budget("ms", cost, limit),))
    ((costs, bound, scale),) = to_integers(program).rows
    assert costs[0] == costs[2] == 0
    first = Fraction(0.1) + Fraction(0.2)
    for choice in ([0, 2], [0, 3], [1, 2], [1, 3]):
        exact = sum(Fraction(cost[c]) for c in choice)
        rounded = Fraction(int(costs[choice].sum() - bound)) / Fraction(scale)
        assert exact - Fraction(limit) <= rounded <= exact - Fraction(limit) + 3 / Fraction(scale)
    assert Fraction(int(bound)) / Fraction(scale) <= Fraction(limit) - first


def test_rounding_of_the_objective_is_within_the_stated_bound():
    rng = np.random.default_rng(0)
    wide = ChoiceProgram(tuple(map(str, range(50))), np.arange(51) * 3, 10.0 ** rng.uniform(-9, 3, 150))
    integers = to_integers(wide)
    # half a unit for each choice set; a choice and the best one make twice that
    assert integers.rounding <= 50 * 2.0**-39 * wide.error.max()
    for _ in range(20):
        choice = wide.start[:-1] + rng.integers(0, 3, 50)
        value = Fraction(int(integers.error[choice].sum())) / Fraction(integers.scale)
        assert abs(value - sum(map(Fraction, wide.error[choice]))) <= integers.rounding / 2


def test_programs_of_nothing_but_zeros_are_programs():
    integers = to_integers(ChoiceProgram.of({"a": [0.0, 0.0]}, {"bits": ({"a": [0, 0]}, 0.0)}))
    assert integers.error.tolist() == [0, 0]
    assert integers.rows[0].limit == 0
