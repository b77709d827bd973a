from __future__ import annotations

import pytest
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.allocation.exempt_layers import ExemptionFindings
from dq_plugins.recipe import Recipe, Step

RANGES = (Step("weight-ranges"), Step("timestep-groups", {"groups": 2}), Step("activation-ranges"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


def make(case, *, edge_bits: int = 3, **options) -> dq.QuantPlan:
    """Eight bits but for the edges, which have so few that they make most of the error."""
    steps = (*RANGES, Step("exempt-layers", {"most_cost": 2.0, "worst": 0, **options}))
    return dq.make_plan(*case, Recipe("r", "", steps), edge_bits=edge_bits, weight_bits=3, act_bits=8, progress=False)


def findings(plan: dq.QuantPlan) -> ExemptionFindings:
    return plan.sections["exempt-layers"].read(ExemptionFindings, "exempt-layers")


def test_a_layer_that_makes_most_of_the_error_stays_in_full_precision_and_says_why(case):
    plan = make(case, least_gain=0.3)
    found = findings(plan)
    exempt = {each.layer for each in found.tried if each.exempt}
    assert exempt
    assert {each.layer for each in found.tried} == {"enter", "leave"}
    for each in found.tried:
        layer = plan.layers[each.layer]
        assert layer.quantized is not each.exempt
        assert each.exempt is (each.gain >= 0.3)
        if each.exempt:
            assert layer.unquantized_reason.code == "measured"
            assert f"{each.gain:.1%} of the output's error" in layer.why
            assert f"{each.bytes:.2%} more bytes" in layer.why
    applied = dq.apply(case[0], plan, "simulate")
    calls = list(case[1].spread(8, 8).calls())
    error = sum(float((call.run(applied) - call.output).square().sum()) for call in calls)
    assert error / sum(float(call.output.square().sum()) for call in calls) == pytest.approx(found.error[1], rel=1e-4)
    assert found.error[1] < 0.7 * found.error[0]


def test_nothing_is_exempt_that_costs_too_much_or_gains_too_little(case):
    for plan in (make(case, most_cost=0.0), make(case, least_gain=1.0, most_cost=1e-6)):
        assert all(layer.quantized for layer in plan.layers.values())
        assert findings(plan).error[0] == findings(plan).error[1]


def test_any_layer_can_be_named(case):
    found = findings(make(case, roles=(), layers=("body.1.gamma",), least_gain=0.0))
    (tried,) = found.tried
    assert tried.layer == "body.1.gamma"
    whole = sum(p.numel() * 3 for n, p in case[0].named_parameters() if n.endswith("weight"))
    assert tried.bytes == pytest.approx(case[0].body[1].gamma.weight.numel() * (32 - 3) / whole)


def test_a_cheap_layer_may_gain_less(case):
    (tried,) = findings(make(case, roles=("last",), least_gain=0.9, most_cost=4.0)).tried
    assert 0.9 / 5 < tried.gain < 0.9
    price = max(tried.bytes, tried.time)
    line = tried.gain / 0.9 * 4.0  # what it may cost at this gain
    assert tried.exempt is (price <= line)
    dearer = findings(make(case, roles=("last",), least_gain=0.9, most_cost=4.0 * 0.99 * price / line)).tried[0]
    assert not dearer.exempt
    cheaper = findings(make(case, roles=("last",), least_gain=0.9, most_cost=4.0 * 1.01 * price / line)).tried[0]
    assert cheaper.exempt


def test_parts_of_a_run_are_enough(case):
    calibration = case[1].subset(timesteps=case[1].timesteps[:2])
    assert any(each.exempt for each in findings(make((case[0], calibration))).tried)
