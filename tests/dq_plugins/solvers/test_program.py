from __future__ import annotations

import numpy as np
import pytest

from dq_plugins.errors import BudgetError
from dq_plugins.solvers import Budget, ChoiceProgram
from dq_plugins.solvers.integers import to_integers


def program() -> ChoiceProgram:
    return ChoiceProgram.of({"a": [9.0, 1.0], "b": [4.0, 0.5, 0.1]}, {"bits": ({"a": [2, 4], "b": [2, 4, 8]}, 6.0)})


def test_cheapest_takes_the_first_of_equal_columns():
    assert program().cheapest(np.array([1.0, 1.0, 3.0, 2.0, 2.0])).tolist() == [0, 3]


def test_restricting_keeps_the_meaning_of_columns():
    smaller, columns = program().restrict(np.array([False, True, True, False, True]))
    assert columns.tolist() == [1, 2, 4]
    assert smaller.start.tolist() == [0, 1, 3]
    assert smaller.value(np.array([0, 2])) == program().value(columns[[0, 2]])


@pytest.mark.parametrize(
    ("errors", "budgets", "message"),
    [
        ({}, {}, "at least one menu"),
        ({"a": []}, {}, "menu of 'a' is empty"),
        ({"a": [float("nan")]}, {}, "'error' of 'a' is nan"),
        ({"a": [1.0]}, {"bits": ({"a": [1, 2]}, 3)}, "'bits' has 2 values for 1 options"),
        ({"a": [1.0]}, {"bits": ({"a": [1]}, float("inf"))}, "limit of budget 'bits' is inf"),
    ],
)
def test_contradictions_are_refused_by_name(errors, budgets, message: str):
    with pytest.raises(BudgetError, match=message):
        ChoiceProgram.of(errors, budgets)


def test_unknown_limit_is_refused():
    with pytest.raises(BudgetError, match="no budget 'bytes'; there are: bits"):
        program().with_limits({"bytes": 3})


def test_integer_budgets_are_divided_not_rounded():
    rows = to_integers(ChoiceProgram.of({"a": [1.0, 0.0]}, {"bits": ({"a": [600, 1200]}, 1100)})).rows
    (costs, limit), *_ = rows
    assert costs.tolist() == [0, 1]
    assert limit == 0


def test_float_budgets_round_costs_up_and_the_limit_down():
    cost, limit = np.array([0.1, 0.3, 0.2, 0.7]), 0.6
    integers = to_integers(ChoiceProgram(("a", "b"), np.array([0, 2, 4]), np.arange(4.0), (Budget("ms", cost, limit),)))
    (costs, bound), *_ = integers.rows
    scale = costs[3] / 0.5
    assert costs[1] / scale >= 0.2
    assert bound / scale <= 0.3


def test_rounding_of_the_objective_is_within_the_stated_bound():
    rng = np.random.default_rng(0)
    wide = ChoiceProgram(tuple(map(str, range(50))), np.arange(51) * 3, 10.0 ** rng.uniform(-9, 3, 150))
    integers = to_integers(wide)
    for _ in range(20):
        choice = wide.start[:-1] + rng.integers(0, 3, 50)
        value = integers.error[choice].sum() / integers.scale + integers.offset
        assert abs(value - wide.value(choice)) <= integers.rounding
