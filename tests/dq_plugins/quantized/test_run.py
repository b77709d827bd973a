from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from attention_models import attention_denoiser, attention_inputs, attention_plan

import dq_plugins as dq
from dq_plugins.errors import PlanError
from dq_plugins.plan import AttentionPlan, DynamicActivationQuant, LayerPlan, OutlierRows, Reason
from dq_plugins.quantized.attention import site_name
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.run import QuantizedRun, narrow_inputs, planned_run, planned_states, sees_quantized_inputs
from dq_plugins.quantized.table_lookup import tabulated
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser, example_inputs
from dq_plugins.testing.plans import handmade_plan


@pytest.fixture
def denoiser() -> TinyDenoiser:
    return TinyDenoiser()


def inputs(t: int = 300) -> dict:
    return {**example_inputs(), "timestep": torch.tensor(t)}


def test_it_computes_what_the_applied_plan_computes(denoiser):
    plan = handmade_plan(denoiser, bits=5)
    expected = [dq.apply(denoiser, plan, "simulate")(**inputs(t)) for t in (900, 300)]
    with torch.no_grad(), planned_run(denoiser, plan) as run:
        states = planned_states(run, plan)
        run.use(states)
        found = [denoiser(**inputs(t)) for t in (900, 300)]
        run.use({})
        full = denoiser(**inputs())
        run.use(states)
        again = denoiser(**inputs(900))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(again, expected[0])
    with torch.no_grad():
        assert torch.equal(full, denoiser(**inputs()))


def test_weights_of_a_large_denoiser_are_made_layer_by_layer(denoiser, monkeypatch):
    plan = handmade_plan(denoiser, bits=5)
    with torch.no_grad(), planned_run(denoiser, plan) as run:
        run.use(planned_states(run, plan, spare_memory=True))  # this one is small
        expected = denoiser(**inputs())
    monkeypatch.setattr("dq_plugins.quantized.memory.LARGE", 1)
    own = dict(denoiser.named_parameters())
    with torch.no_grad(), planned_run(denoiser, plan) as run:
        states = planned_states(run, plan, spare_memory=True)
        run.use(states)
        assert all(p is own[name] for name, p in denoiser.named_parameters())  # no second copy
        assert torch.equal(denoiser(**inputs()), expected)
        assert all(p is own[name] for name, p in denoiser.named_parameters())
        with pytest.raises(RuntimeError):
            denoiser(**{**inputs(), "sample": torch.zeros(2, 3)})
        assert all(p is own[name] for name, p in denoiser.named_parameters())
        run.use({name: state for name, state in states.items() if name != "first"})
        assert not torch.equal(denoiser(**inputs()), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


@pytest.mark.parametrize("opens", [True, False])
def test_the_denoiser_is_restored_exactly_whatever_happens(denoiser, opens):
    plan = handmade_plan(denoiser)
    run = planned_run(denoiser, plan)
    if not opens:
        del denoiser.last.weight  # can no longer be wrapped
    weights, kind = dict(denoiser.named_parameters()), type(denoiser)

    def fail():
        with run:
            run.use({"first": LayerState(weight=torch.zeros_like(denoiser.first.weight))})
            raise KeyError

    with pytest.raises(KeyError if opens else PlanError):
        fail()
    assert all(p is weights[n] for n, p in denoiser.named_parameters())
    assert type(denoiser) is kind
    assert not any(m._forward_pre_hooks or "input_quantizer" in m._modules for m in denoiser.modules())
    assert not run.is_open


def test_a_whole_run_has_the_plans_table_and_exact_tokens_too_and_takes_them_away(denoiser):
    plan = handmade_plan(denoiser, bits=4)
    plan.temporal_table = tabulated(
        tuple(map(float, sorted(TIMESTEPS))), {"time_out": torch.randn(len(TIMESTEPS), 16)}, ["time_in"], frozenset()
    )
    for name in plan.tabulated:
        plan.layers[name] = LayerPlan("linear", unquantized_reason=Reason("in the table", "tabulated"))
    seen = []
    with torch.no_grad(), denoiser.up.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, :1])):
        denoiser(**inputs(900))
        expected_full = denoiser(**inputs(900))
    plan.outlier_rows["up"] = OutlierRows((0,), seen[0], torch.full((1, 32), 3.0))
    modules, hooks = dict(denoiser.named_modules()), [len(m._forward_hooks) for m in denoiser.modules()]
    expected = dq.apply(denoiser, plan, "simulate")(**inputs(900))
    with torch.no_grad(), planned_run(denoiser, plan, whole=True) as run:
        run.use(planned_states(run, plan))
        found = denoiser(**inputs(900))
    with torch.no_grad(), planned_run(denoiser, plan) as run:
        run.use(planned_states(run, plan))
        layers_alone = denoiser(**inputs(900))
    assert torch.equal(found, expected)
    assert not torch.equal(found, layers_alone)
    assert dict(denoiser.named_modules()) == modules
    assert [len(m._forward_hooks) for m in denoiser.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(denoiser(**inputs(900)), expected_full)


def test_timesteps_outside_the_calibrated_range_may_take_the_nearest_group(denoiser):
    plan = handmade_plan(denoiser, bits=4)
    plan.groups["all"] = replace(plan.groups["all"], low=100.0, high=900.0)
    expected = dq.apply(denoiser, plan, "simulate", out_of_range="nearest")(**inputs(950))
    with torch.no_grad(), planned_run(denoiser, plan, out_of_range="nearest") as run:
        run.use(planned_states(run, plan))
        assert torch.equal(denoiser(**inputs(950)), expected)


def test_parts_run_by_themselves_at_a_chosen_timestep(denoiser):
    plan = handmade_plan(denoiser, bits=4)
    x = torch.randn(2, 4, 8, 8)
    layer = plan.layers["first"]
    with torch.no_grad(), planned_run(denoiser, plan) as run:
        run.use(planned_states(run, plan))
        with run.at(900):
            found = denoiser.first(x)
    fake = layer.activation.fake_quantize(x, plan.groups["all"].of(900))
    with torch.no_grad():
        expected = torch.func.functional_call(
            denoiser.first, {"weight": layer.weight.fake_quantize(denoiser.first.weight)}, fake
        )
    assert torch.equal(found, expected)


def test_inputs_stay_in_full_precision_where_asked(denoiser):
    plan = handmade_plan(denoiser, bits=4)
    states = planned_states(planned_run(denoiser, plan), plan, quantize_inputs=False)
    assert all(s.quantizer is None and s.weight is not None for s in states.values())


def test_inputs_are_quantized_for_what_learns_where_they_are_narrow(denoiser):
    assert sees_quantized_inputs(handmade_plan(denoiser, bits=4))
    assert not sees_quantized_inputs(handmade_plan(denoiser, bits=8))
    assert sees_quantized_inputs(handmade_plan(denoiser, bits=8), True)
    assert not sees_quantized_inputs(handmade_plan(denoiser, bits=4), False)


def test_an_input_is_narrow_that_is_so_in_one_group(denoiser):
    plan = handmade_plan(denoiser, bits=8)
    names = list(plan.layers)
    for name, last in zip(names, (4, None), strict=False):
        layer = plan.layers[name]
        others = len(layer.activation.scale) - 1
        layer.activation = replace(layer.activation, group_bits=(*[8] * others, last))
    assert narrow_inputs(plan) == names[:1]
    assert sees_quantized_inputs(plan)
    plan.layers[names[0]].activation = DynamicActivationQuant(4)
    assert narrow_inputs(plan) == names[:1]
    plan.layers[names[0]].activation = None
    assert not narrow_inputs(plan)


def test_mistakes_are_named(denoiser):
    plan = handmade_plan(denoiser)
    run = QuantizedRun(denoiser, ["first"], plan.groups, "timestep")
    with pytest.raises(PlanError, match="open the run first"):
        run.use({})
    with run:
        with pytest.raises(PlanError, match="open already"):
            run.__enter__()
        with pytest.raises(PlanError, match="'nowhere' is none of the 1 layers"):
            run.use({"nowhere": LayerState()})
    with pytest.raises(PlanError, match="quantized already"):
        QuantizedRun(dq.apply(denoiser, plan, "simulate"), [], plan.groups, "timestep").__enter__()


def test_an_attention_is_switched_like_a_layer_and_its_module_is_restored(tmp_path):
    denoiser = attention_denoiser()
    plan = attention_plan(denoiser, tmp_path)
    sites, given = [site_name(name) for name in plan.attention], attention_inputs()
    whole, full = dq.apply(denoiser, plan, "simulate")(**given), denoiser(**given)
    one = copy.deepcopy(plan)
    one.attention["far"] = AttentionPlan(unquantized_reason=Reason("not here", "asked"))
    without = dq.apply(denoiser, one, "simulate")(**given)
    classes = [type(module) for module in denoiser.modules()]
    with torch.no_grad(), planned_run(denoiser, plan, sites, whole=True) as run:
        states = planned_states(run, plan)
        assert list(states) == [*plan.layers, *sites]
        for chosen, expected in (
            (states, whole),
            ({name: state for name, state in states.items() if name != site_name("far")}, without),
            ({}, full),
            (states, whole),
        ):
            run.use(chosen)
            assert torch.equal(denoiser(**given), expected)
        with pytest.raises(PlanError, match="is none of the"):
            run.use({site_name("nowhere"): LayerState()})
    assert not torch.equal(whole, without)
    assert [type(module) for module in denoiser.modules()] == classes
    assert torch.equal(denoiser(**given), full)


def test_attention_that_is_not_named_is_there_all_the_time(tmp_path):
    denoiser = attention_denoiser()
    plan, given = attention_plan(denoiser, tmp_path), attention_inputs()
    with torch.no_grad(), planned_run(denoiser, plan, whole=True) as run:
        run.use({})
        assert not torch.equal(denoiser(**given), (full := attention_denoiser()(**given)))
    assert torch.equal(denoiser(**given), full)
