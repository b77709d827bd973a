from __future__ import annotations

import pytest
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.steps.step_exceptions import StepExceptions
from dq_plugins.plan.step_policy import StepPolicy, policy_of
from dq_plugins.recipe import Recipe, Step
from dq_plugins.sensitivity.exact_noise import replayed_error
from dq_plugins.sensitivity.trajectory import trajectories_of


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


def make(case, **options) -> dq.QuantPlan:
    steps = (
        Step("weight-ranges"),
        Step("timestep-groups", {"groups": 1, "method": "uniform"}),
        Step("activation-ranges"),
        Step("bias-correction"),
        Step("step-exceptions", options),
    )
    return dq.make_plan(*case, Recipe("r", "", steps), weight_bits=8, act_bits=3, progress=False)


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
    assert replayed_error(applied, trajectories_of(case[1], "sample")) == pytest.approx(best, rel=1e-4)


def test_no_step_is_kept_that_gains_too_little(case):
    plan = make(case, least_gain=1.0)
    assert policy_of(plan) == StepPolicy()
    assert len(plan.groups["default"]) == 1
