from __future__ import annotations

import unittest

import pytest

from dq_plugins.testing.conformance import Conformance, ConformanceError, expect
from dq_plugins.testing.running import run_suite


class Sample(Conformance):
    kind, name = "metric", "sample"
    runs = 0

    def test_it_is_registered_and_loads(self):
        pass

    def test_it_says_what_it_is(self):
        pass

    def test_a_state_of_its_own(self):
        self.runs += 1
        expect(self.runs == 1, "state leaked")

    def test_b_state_of_its_own(self):
        self.test_a_state_of_its_own()

    def test_c_fails(self):
        expect(False, "two\nlines")

    def test_d_raises(self):
        raise KeyError("surprise")

    def test_e_is_skipped(self):
        raise unittest.SkipTest("not today")


def test_every_outcome_is_reported_in_order_with_its_reason():
    results = [(result.test, result.outcome, result.message) for result in run_suite(Sample)]
    assert results[:3] == [
        ("a state of its own", "passed", ""),
        ("b state of its own", "passed", ""),
        ("c fails", "failed", "two lines"),
    ]
    assert results[3][:2] == ("d raises", "error")
    assert results[3][2].startswith("KeyError: 'surprise' (")
    assert f"{__file__}:" in results[3][2]
    assert results[4] == ("e is skipped", "skipped", "not today")


def test_a_result_comes_before_the_next_test_runs():
    ran = []

    class Slow(Conformance):
        kind = "metric"

        def test_a_first(self):
            ran.append("first")

        def test_b_second(self):
            ran.append("second")

    results = run_suite(Slow)
    assert ran == []
    assert next(results).test == "a first"
    assert ran == ["first"]
    list(results)
    assert ran == ["first", "second"]


def test_suite_without_a_name_says_what_to_write():
    class Nameless(Conformance):
        kind = "metric"

    outcomes = {result.test: result.message for result in run_suite(Nameless)}
    assert "write: name = 'the-registered-name'" in outcomes["it is registered and loads"]


def test_expectations_hold_without_assert_statements():
    with pytest.raises(ConformanceError, match="seen"):
        expect(0, "seen")
    expect(1, "not seen")
