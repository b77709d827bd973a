from __future__ import annotations

import pytest
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.allocation.exempt_layers import ExemptionFindings, ExemptLayers
from dq_plugins.passes.allocation.harm import harm
from dq_plugins.progress import finish
from dq_plugins.quantized.run import planned_run, planned_states
from dq_plugins.recipe import PassContext, Recipe, Step

BAD = "body.1.gamma"
RANGES = Step("weight-ranges"), Step("activation-ranges")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


@pytest.fixture
def plan(case):
    """Eight bits, but for one layer in the middle that has two."""
    made = dq.make_plan(*case, Recipe("r", "", RANGES), weight_bits=8, act_bits=8, progress=False)
    worse = dq.make_plan(*case, Recipe("r", "", RANGES), weight_bits=2, act_bits=8, progress=False)
    made.layers[BAD] = worse.layers[BAD]
    return made


def test_the_layer_that_was_spoilt_is_found_and_no_other(case, plan) -> None:
    run = planned_run(case[0], plan)
    states = planned_states(run, plan)
    with run:
        shares = harm(run, states, case[1], 3, 0.7)
        every = harm(run, states, case[1], 100, 0.0)
        assert harm(run, states, case[1], 0, 0.0) == {}
        assert harm(run, {}, case[1], 3, 0.0) == {}
    assert list(shares) == [BAD]
    assert 0.7 < shares[BAD] <= 1
    assert next(iter(every)) == BAD


def test_a_second_layer_is_found_behind_the_worst(case, plan) -> None:
    plan.layers["leave"] = dq.make_plan(
        *case, Recipe("r", "", RANGES), edge_bits=4, weight_bits=4, act_bits=8, progress=False
    ).layers["leave"]
    run = planned_run(case[0], plan)
    with run:
        shares = harm(run, planned_states(run, plan), case[1], 8, 0.4)
    assert set(list(shares)[:2]) == {BAD, "leave"}


def test_it_is_exempt_by_measurement_though_it_has_no_role(case, plan) -> None:

    finish(ExemptLayers(roles=(), worst=1, most_cost=2.0).run(plan, PassContext(*case)))
    found = plan.sections["exempt-layers"].read(ExemptionFindings, "exempt-layers")
    assert [each.layer for each in found.tried if each.exempt] == [BAD]
    assert not plan.layers[BAD].quantized
    assert found.error[1] < 0.3 * found.error[0]
