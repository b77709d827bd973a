from __future__ import annotations

import pytest
from attention_models import RECIPE, attention_calls_recorded, attention_inputs, loud_keys_denoiser
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.passes.allocation.exempt_layers import ExemptionFindings
from dq_plugins.quantized.attention import site_name
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


def output_error(case, plan: dq.QuantPlan) -> float:
    """Squared error of the denoiser's output with a plan over its power, on the calls that the pass looks at."""
    applied, calls = dq.apply(case[0], plan, "simulate"), list(case[1].spread(8, 8).calls())
    error = sum(float((call.run(applied) - call.output).square().sum()) for call in calls)
    return error / sum(float(call.output.square().sum()) for call in calls)


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
    assert output_error(case, plan) == pytest.approx(found.error[1], rel=1e-4)
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


@pytest.fixture(scope="module")
def attending(tmp_path_factory):
    denoiser = loud_keys_denoiser("near")
    return denoiser, attention_calls_recorded(denoiser, tmp_path_factory.mktemp("attending"))


def with_attention(case, **options) -> dq.QuantPlan:
    steps = (*RECIPE.steps, Step("exempt-layers", {"roles": (), "least_gain": 0.4, **options}))
    return dq.make_plan(*case, Recipe("r", "", steps), progress=False)


def test_the_attention_that_does_harm_stays_in_floating_point_and_says_why(attending):
    plan = with_attention(attending, worst=1, most_cost=0.5)  # the worst of all layers and attentions
    (exempt,) = [each for each in findings(plan).tried if each.exempt]
    assert exempt.layer == site_name("near")
    assert exempt.bytes == 0
    near, far = plan.attention["near"], plan.attention["far"]
    assert far.quantized
    assert not near.quantized
    assert near.unquantized_reason.code == "measured"
    assert f"{exempt.gain:.1%} of the output's error" in near.why
    assert all(layer.quantized for layer in plan.layers.values())
    assert plan.features["attention"] == ("far",)
    calls = list(attending[1].spread(8, 8).calls())
    applied = dq.apply(attending[0], plan, "simulate")
    error = sum(float((call.run(applied) - call.output).square().sum()) for call in calls)
    assert error / sum(float(call.output.square().sum()) for call in calls) == pytest.approx(
        findings(plan).error[1], rel=1e-4
    )
    assert findings(plan).error[1] == pytest.approx((1 - exempt.gain) * findings(plan).error[0])


def test_an_attention_costs_the_speed_of_its_products(attending):
    (tried,) = findings(with_attention(attending, worst=0, layers=("near",), most_cost=2.0)).tried
    inputs = attention_inputs()
    partition = dq.partition(attending[0], inputs)
    rows = 3 * 36 * 24  # samples, tokens, channels of all heads
    near, far = (2 * rows * keys for keys in (36, 7))
    layers = sum(info.macs for info in partition.layers.values())
    assert tried.layer == site_name("near")
    assert tried.time == pytest.approx(near * (32 - 8) / (8 * (layers + near + far)))
    assert not any(each.exempt for each in findings(with_attention(attending, most_cost=0.01)).tried)


def test_without_quantized_attention_none_is_tried(attending):
    steps = (*RECIPE.steps[:-1], Step("exempt-layers", {"most_cost": 0.5}))
    plan = dq.make_plan(*attending, Recipe("r", "", steps), progress=False)
    assert {each.layer for each in findings(plan).tried} <= plan.layers.keys()


def test_an_input_that_does_harm_alone_is_made_wider_and_costs_no_byte(case):
    """Weights of 8 bits and inputs of 3: whatever errs is an input."""
    steps = (*RANGES, Step("exempt-layers", {"worst": 4, "least_gain": 0.05, "most_cost": 0.5}))
    plan = dq.make_plan(*case, Recipe("r", "", steps), edge_bits=3, weight_bits=8, act_bits=3, progress=False)
    found = findings(plan)
    wider = {each.layer for each in found.tried if each.exempt}
    assert wider
    for each in found.tried:
        layer = plan.layers[each.layer]
        assert each.bytes == 0 or not each.input_alone
        assert layer.activation.bits == (8 if each.layer in wider else 3)
    assert all(each.input_alone for each in found.tried if each.exempt)
    assert "with an input of 8 bits it takes" in found.tried[0].why
    assert output_error(case, plan) == pytest.approx(found.error[1], rel=1e-4)
    assert found.error[1] < 0.9 * found.error[0]


def test_wide_inputs_of_layers_with_branches_in_floating_point(case):
    """Their states are made of the full-precision weight, though the search has left others in the layers."""
    branches = Step("low-rank", {"ranks": (6,), "most": 1.0, "methods": ("principal",), "least_gain": 0.0})
    plan = dq.make_plan(*case, Recipe("r", "", (branches, *RANGES)), weight_bits=3, act_bits=3, progress=False)
    split = tuple(name for name, layer in plan.layers.items() if layer.subspace is not None)
    tries = Step("exempt-layers", {"layers": split, "worst": 4, "least_gain": 0.01, "most_cost": 0.5})
    plan = dq.make_plan(*case, Recipe("r", "", (branches, *RANGES, tries)), weight_bits=3, act_bits=3, progress=False)
    found = findings(plan)
    wider = [each.layer for each in found.tried if each.exempt and each.input_alone]
    assert any(plan.layers[name].subspace is not None for name in wider)
    assert output_error(case, plan) == pytest.approx(found.error[1], rel=1e-4)


def test_an_input_that_is_narrow_in_some_timestep_groups_is_tried_wider(case):
    widths = Step("group-widths", {"choices": (3, 8), "act_bits": 5.5, "seconds": 0.2, "probes": 2, "runs": 1})
    targets = {"edge_bits": 3, "weight_bits": 8, "act_bits": 3, "progress": False}
    before = dq.make_plan(*case, Recipe("r", "", (*RANGES, widths)), **targets)
    mixed = {n: layer.activation for n, layer in before.layers.items() if layer.activation.group_bits is not None}
    assert mixed
    tries = Step("exempt-layers", {"layers": tuple(mixed), "worst": 0, "least_gain": 0.0, "most_cost": 0.0})
    plan = dq.make_plan(*case, Recipe("r", "", (*RANGES, widths, tries)), **targets)
    wider = {each.layer: each for each in findings(plan).tried if each.input_alone}
    assert mixed.keys() <= wider.keys()
    for name, quant in mixed.items():
        assert wider[name].time == 0  # a narrower group uses fewer of the codes of the same kernel
        now = plan.layers[name].activation
        assert (now.bits, now.group_bits) == (8, None if wider[name].exempt else quant.group_bits)
    assert any(wider[name].exempt for name in mixed)


def test_a_wide_input_costs_the_speed_of_its_products(case):
    def tried(weight_bits: int) -> list:
        steps = (*RANGES, Step("exempt-layers", {"roles": (), "layers": ("body.1.gamma",), "worst": 0}))
        widths = {"weight_bits": weight_bits, "act_bits": 4, "edge_bits": 4}
        return findings(dq.make_plan(*case, Recipe("r", "", steps), **widths, progress=False)).tried

    macs = {name: info.macs for name, info in dq.partition(case[0], next(iter(case[1].calls())).kwargs).layers.items()}
    wide = tried(4)[0]
    assert wide.input_alone
    assert wide.time == pytest.approx(macs["body.1.gamma"] / sum(macs.values()))  # 8 bits for 4
    assert tried(8)[0].time == 0  # the weight has 8 bits, so the product has them already
