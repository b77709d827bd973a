from __future__ import annotations

import pytest
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.allocation.exempt_layers import ExemptionFindings, ExemptLayers
from dq_plugins.passes.allocation.harm import harm, own_errors
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


def test_the_layer_that_was_spoilt_is_found_first(case, plan) -> None:
    run = planned_run(case[0], plan)
    states = planned_states(run, plan)
    with run:
        own = own_errors(run, states, case[1].calls())
        shares = harm(run, states, case[1], 3)
    assert max(own, key=own.__getitem__) == BAD
    assert own[BAD] > 100 * sorted(own.values())[-2]
    assert own.keys() == plan.layers.keys()
    assert next(iter(shares)) == BAD
    assert len(shares) == 3
    assert 0.7 < shares[BAD] <= 1


def test_it_is_exempt_by_measurement_though_it_has_no_role(case, plan) -> None:

    finish(ExemptLayers(roles=(), worst=1, most_cost=2.0).run(plan, PassContext(*case)))
    found = plan.sections["exempt-layers"].read(ExemptionFindings, "exempt-layers")
    assert [each.layer for each in found.tried if each.exempt] == [BAD]
    assert not plan.layers[BAD].quantized
    assert found.error[1] < 0.3 * found.error[0]
