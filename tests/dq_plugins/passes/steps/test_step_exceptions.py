from __future__ import annotations

import copy

import pytest
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.errors import CalibrationError
from dq_plugins.passes.steps.step_exceptions import StepExceptions
from dq_plugins.plan.step_policy import StepPolicy, policy_of
from dq_plugins.recipe import Recipe, Step
from dq_plugins.sensitivity.exact_noise import replayed_errors
from dq_plugins.sensitivity.trajectory import trajectories_of


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


def make(case, ranges: str = "static", **options) -> dq.QuantPlan:
    steps = (
        Step("weight-ranges"),
        Step("timestep-groups", {"groups": 1, "method": "uniform"}),
        Step("activation-ranges", {"ranges": ranges}),
        Step("bias-correction"),
        Step("step-exceptions", options),
    )
    return dq.make_plan(*case, Recipe("r", "", steps), weight_bits=8, act_bits=3, edge_bits=3, progress=False)


def test_steps_are_added_where_they_are_worth_most_and_the_error_is_what_was_measured(case):
    plan = make(case, most=2, least_gain=0.0, runs=1)
    found = plan.sections["step-exceptions"].read(StepExceptions, "step-exceptions")
    assert found.tried[0][:2] == (0, 0)
    assert found.first + found.last == 2
    assert policy_of(plan) == StepPolicy(found.first, found.last)
    errors = {(first, last): error for first, last, error in found.tried}
    best = errors[found.first, found.last]
    assert best == min(e for (a, b), e in errors.items() if a + b == 2) < errors[0, 0]
    applied = dq.apply(case[0], plan, "simulate")
    assert float(replayed_errors(applied, trajectories_of(case[1], "sample")).mean()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_more_bits_instead_stay_in_integers(case, ranges: str):
    plan = make(case, ranges, most=2, least_gain=0.0, runs=1, bits=8)
    found = plan.sections["step-exceptions"].read(StepExceptions, "step-exceptions")
    assert (found.first + found.last, found.bits) == (2, 8)
    errors = {(first, last): error for first, last, error in found.tried}
    assert errors[found.first, found.last] < errors[0, 0]
    for layer in plan.layers.values():
        assert layer.activation.group_bits.count(8) >= 1
        assert {*layer.activation.group_bits} == {3, 8}
    simulated, integer = (dq.apply(copy.deepcopy(case[0]), plan, backend) for backend in ("simulate", "torchao"))
    runs = trajectories_of(case[1], "sample")
    assert float(replayed_errors(simulated, runs).mean()) == pytest.approx(errors[found.first, found.last], rel=1e-4)
    assert float(replayed_errors(integer, runs).mean()) == pytest.approx(errors[found.first, found.last], rel=1e-2)


def test_where_no_input_is_narrower_nothing_is_tried(case):
    plan = make(case, bits=3)
    assert "fewer than 3 bits" in plan.sections["step-exceptions"].data["why_not"]
    assert all(layer.activation.group_bits is None for layer in plan.layers.values())


def test_parts_of_runs_are_refused_unless_it_is_said_that_they_may_be(case, tmp_path):
    part = case[1].subset(per_timestep=1, timesteps=case[1].timesteps[1:])
    with pytest.raises(CalibrationError, match="complete"):
        make((case[0], part))
    plan = make((case[0], part), bits=8, where_possible=True)
    assert "complete" in plan.sections["step-exceptions"].data["why_not"]


def test_no_step_is_kept_that_gains_too_little(case):
    plan = make(case, least_gain=1.0)
    assert policy_of(plan) == StepPolicy()
    assert len(plan.groups["default"]) == 1
