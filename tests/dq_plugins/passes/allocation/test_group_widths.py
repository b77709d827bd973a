from __future__ import annotations

import copy

import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.errors import BudgetError, CalibrationError
from dq_plugins.passes.allocation.group_widths import GroupWidthFindings
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant
from dq_plugins.recipe import Recipe, Step

RANGES = (Step("weight-ranges"), Step("timestep-groups", {"groups": 3}), Step("activation-ranges"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


PLANS: dict[str, dq.QuantPlan] = {}
"""Plans that were made, by what they were asked for: a test that changes one makes it anew."""


def make(case, **options) -> dq.QuantPlan:
    key = f"{len(case[1])} {sorted(options.items())}"
    if key not in PLANS:
        PLANS[key] = made(case, **options)
    return PLANS[key]


def made(case, **options) -> dq.QuantPlan:
    steps = (
        *RANGES,
        Step("group-widths", {"seconds": 0.3, "probes": 2, "runs": 1, **options}),
        Step("bias-correction"),
    )
    return dq.make_plan(*case, Recipe("r", "", steps), weight_bits=8, act_bits=6, progress=False)


def findings(plan: dq.QuantPlan) -> GroupWidthFindings:
    return plan.sections["group-widths"].read(GroupWidthFindings, "group-widths")


def mean_bits(plan: dq.QuantPlan, case, float_bits: int = 16) -> float:
    """Over layers' input values and the steps of sampling."""
    layers = dq.partition(case[0], case[1].example_inputs()).layers
    spent = size = 0.0
    for name, layer in plan.layers.items():
        values = torch.Size(layers[name].input_shape).numel()
        for t in plan.schedule.timesteps:
            if isinstance(layer.activation, ActivationQuant):
                width = layer.activation.widths[plan.groups[layer.activation.groups].of(t)]
            else:
                width = None
            spent, size = spent + values * (width or float_bits), size + values
    return spent / size


def test_the_budget_holds_and_groups_differ_and_no_search_is_better(case):
    plan = make(case, act_bits=5.5)
    found = findings(plan)
    assert mean_bits(plan, case) <= 5.5 + 1e-9
    assert found.budgets[0].used <= found.budgets[0].limit
    assert any(layer.activation.group_bits for layer in plan.layers.values())
    assert found.bound <= found.error <= min(found.greedy, found.beam)
    for name, widths in found.widths.items():
        assert plan.layers[name].activation.widths == widths
        if plan.layers[name].roles & {"first", "last"}:
            assert min(widths) >= 8


def test_quantizers_are_those_of_their_width_and_group(case):
    plan = make(case, act_bits=5.5)
    plain = {bits: make(case, choices=(bits,), act_bits=8) for bits in (4, 6, 8)}
    for name, layer in plan.layers.items():
        for group, width in enumerate(layer.activation.widths):
            same = plain[width].layers[name].activation
            assert layer.activation.scale[group] == same.scale[group]
            assert layer.activation.zero_point[group] == same.zero_point[group]


def test_floating_point_is_a_choice_that_counts_and_more_room_is_less_error(case):
    errors = []
    for budget in (5.5, 8.0, 12.0):
        plan = make(case, act_bits=budget, floating=True)
        assert mean_bits(plan, case) <= budget + 1e-9
        errors.append(findings(plan).error)
    assert errors[0] > errors[1] > errors[2]
    assert any(None in layer.activation.widths for layer in plan.layers.values() if layer.activation)


def test_a_group_that_only_the_last_call_of_an_unknown_sampler_visits_has_its_neighbours_width(case):
    count = len(case[1].timesteps)
    groups = Step("timestep-groups", {"groups": count, "method": "uniform"})
    steps = (RANGES[0], groups, RANGES[2], Step("group-widths", {"act_bits": 5.5, "probes": 2, "runs": 1}))
    plan = dq.make_plan(*case, Recipe("r", "", steps), weight_bits=8, act_bits=6, progress=False)
    assert all(len(widths) == count and widths[0] == widths[1] for widths in findings(plan).widths.values())
    assert mean_bits(plan, case) <= 5.5 + 1e-9


@pytest.mark.parametrize("solver", ["beam", "greedy"])
def test_other_searches_are_there_for_comparison(case, solver):
    found = findings(make(case, act_bits=5.5, solver=solver))
    assert found.error == getattr(found, solver)
    assert found.error >= findings(make(case, act_bits=5.5)).error


def test_bitops_and_latency_count_the_weights_width_and_the_steps(case):
    layers = dq.partition(case[0], case[1].example_inputs()).layers
    table = {n: {f"W8A{a}": float(a) for a in (4, 6, 8)} for n in layers}
    plan = make(case, bitops=8 * 6 * sum(layer.macs for layer in layers.values()), latency=6.5 * len(layers),
                latency_table=table)  # fmt: skip
    by_name = {use.name: use for use in findings(plan).budgets}
    assert set(by_name) == {"BitOps", "latency"}
    assert all(use.used <= use.limit for use in by_name.values())
    of_a_mean_call = sum(
        table[n][f"W8A{plan.layers[n].activation.widths[plan.groups[plan.layers[n].activation.groups].of(t)]}"]
        for n in layers
        for t in plan.schedule.timesteps
    ) / len(plan.schedule)
    assert by_name["latency"].used == pytest.approx(of_a_mean_call)


def test_a_plan_comes_back_from_disk_and_runs_as_planned(case, tmp_path):
    plan = make(case, act_bits=5.5, floating=True)
    assert dq.QuantPlan.load(plan.save(tmp_path)) == plan
    dq.apply(case[0], plan, backend="simulate")


def test_dynamic_ranges_take_part_and_have_no_floating_point(case, tmp_path):
    ranges = Step("activation-ranges", {"ranges": "dynamic"})
    widths = Step("group-widths", {"act_bits": 5.5, "floating": True, "seconds": 0.3, "probes": 2, "runs": 1})
    plan = dq.make_plan(
        *case, Recipe("r", "", (*RANGES[:2], ranges, widths)), weight_bits=8, act_bits=4, progress=False
    )
    found = findings(plan)
    assert found.bound <= found.error <= min(found.greedy, found.beam)
    assert found.budgets[0].used <= found.budgets[0].limit
    several = {name for name, chosen in found.widths.items() if len(set(chosen)) > 1}
    assert several
    for name, chosen in found.widths.items():
        quant = plan.layers[name].activation
        assert isinstance(quant, DynamicActivationQuant)
        assert None not in chosen
        assert tuple(form.bits for form in quant.forms) == (chosen if name in several else chosen[:1])
        assert all(form.clip == 1 for form in quant.forms if form.bits > 4)
    assert dq.QuantPlan.load(plan.save(tmp_path)) == plan
    models = [dq.apply(copy.deepcopy(case[0]), plan, backend=backend) for backend in ("simulate", "torchao")]
    for call in case[1].calls():
        simulated, integer = (call.run(model) for model in models)
        torch.testing.assert_close(simulated, integer, rtol=1e-2, atol=1e-2)


def test_what_the_plan_has_is_a_budget_that_can_be_met(case):
    before = dq.make_plan(*case, Recipe("r", "", RANGES), weight_bits=8, act_bits=6, progress=False)
    after, wide = make(case, act_bits="plan", choices=(4, 6, 8)), make(case, act_bits=8, choices=(4, 6, 8))
    (budget,) = findings(after).budgets
    values = sum(
        torch.Size(n.input_shape).numel() for n in dq.partition(case[0], case[1].example_inputs()).layers.values()
    )
    assert budget.limit == pytest.approx(mean_bits(before, case) * values)
    assert mean_bits(after, case) == pytest.approx(mean_bits(before, case), rel=0.02)
    assert mean_bits(after, case) <= mean_bits(before, case) + 1e-9
    assert findings(wide).error < findings(after).error


def test_recipes_leave_plans_as_they_are_where_nothing_can_be_chosen(case):
    wide = make(case, act_bits="plan", choices=(4, 6), where_possible=True)
    part = make((case[0], case[1].subset(timesteps=case[1].timesteps[:2])), where_possible=True)
    for plan in (wide, part):
        assert "group-widths" not in plan.sections
        assert all(layer.activation.group_bits is None for layer in plan.layers.values())
    assert "group-widths" in make(case, act_bits=5.5, where_possible=True).sections


def test_what_cannot_be_met_is_refused(case):
    with pytest.raises(BudgetError, match="nearest budget"):
        make(case, act_bits=3.0)
    with pytest.raises(CalibrationError, match="no complete sampling run"):
        make((case[0], case[1].subset(timesteps=case[1].timesteps[:2])))
