from __future__ import annotations

import numpy as np
import pytest

from dq_plugins.errors import BudgetError
from dq_plugins.solvers import ChoiceProgram


def program() -> ChoiceProgram:
    return ChoiceProgram.of({"a": [9.0, 1.0], "b": [4.0, 0.5, 0.1]}, {"bits": ({"a": [2, 4], "b": [2, 4, 8]}, 6.0)})


def test_cheapest_takes_the_first_of_equal_columns():
    assert program().cheapest(np.array([1.0, 1.0, 3.0, 2.0, 2.0])).tolist() == [0, 3]


def test_ties_are_broken_by_a_second_value():
    ties = np.array([2.0, 1.0, 0.0, 5.0, 4.0])
    assert program().cheapest(np.array([1.0, 1.0, 3.0, 2.0, 2.0]), ties).tolist() == [1, 4]


def test_columns_that_a_choice_takes():
    assert program().taken(np.array([1, 2])) == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("errors", "budgets", "message"),
    [
        ({}, {}, "at least one choice set"),
        ({"a": []}, {}, "choice set of 'a' is empty"),
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
