from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from plans import corrected
from torchao_models import build, denoiser_plan

from dq_plugins.errors import PlanError
from dq_plugins.plan import DynamicActivationQuant, QuantPlan
from dq_plugins.plan.step_policy import StepPolicy, policy_of, with_policy
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.timesteps import Schedule

PUBLISHED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 3, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}
"""What the checkpoints of diffusers#14664 and vllm-omni#6560 hold."""
STEPS = (950.0, 800.0, 650.0, 500.0, 350.0, 200.0, 50.0)


def planned(model) -> QuantPlan:
    plan = denoiser_plan(model)
    plan.layers["up"] = corrected(plan.layers["up"], model.up)
    return replace(plan, schedule=Schedule(STEPS))


def test_the_published_policy_is_read_and_written_as_it_is():
    config = {"quant_method": "modelopt", "runtime": {"other": 1, "diffusion_step_policy": PUBLISHED}}
    policy = StepPolicy.from_config(config)
    assert policy == StepPolicy(3, 3, reasoner="a16")
    assert policy.into({"quant_method": "modelopt", "runtime": {"other": 1}}) == config
    assert StepPolicy.from_config({"quant_method": "modelopt"}) is StepPolicy.from_config(None) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("type", "sigmoid"),
        ("index_space", "sigma"),
        ("default_mode", "a16"),
        ("overlap", "a8"),
        ("reasoner", "a8"),
        ("first_steps", {"count": -1, "mode": "a16"}),
        ("first_steps", {"count": True, "mode": "a16"}),
        ("last_steps", {"count": 3, "mode": "a8"}),
        ("last_steps", {"count": 3}),
        ("scope", []),
        ("surprise", 1),
    ],
)
def test_another_schema_is_refused_with_its_field(field, value):
    data = copy.deepcopy(PUBLISHED) | {field: value}
    name = {"overlap": "modes", "reasoner": "modes", "first_steps": "first"}.get(field, field)
    with pytest.raises(PlanError, match=name):
        StepPolicy.of(data)


def test_the_steps_are_those_that_engines_take():
    assert StepPolicy(2, 1).high(5) == [True, True, False, False, True]
    assert StepPolicy(3, 3).high(1) == [False]
    assert StepPolicy(2, 2).high(3) == [True] * 3
    assert StepPolicy(2, 2, overlap="native").high(3) == [True, False, True]


@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (0, 2), (2, 3), (1, 1)])
def test_a_plan_follows_a_policy_and_says_which(ends, tmp_path):
    model = build()
    plan = planned(model)
    followed = with_policy(plan, StepPolicy(*ends))
    assert policy_of(followed) == StepPolicy(*ends)
    assert QuantPlan.load(followed.save(tmp_path)) == followed
    one, other, none = build(), build(), build()
    SimulateAdapter().apply(one, plan)
    SimulateAdapter().apply(other, followed)
    for layer in (bare := planned(none)).layers.values():
        if layer.activation is not None:
            layer.activation, layer.unquantized_reason = None, plan.layers["time"].unquantized_reason
    SimulateAdapter().apply(none, bare)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, high in zip(STEPS, StepPolicy(*ends).high(len(STEPS)), strict=True):
        expected = none if high else one
        assert torch.equal(other(x, torch.tensor(t)), expected(x, torch.tensor(t)))


@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (0, 2), (2, 3)])
def test_steps_may_have_more_bits_instead(ends, tmp_path):
    """`up` has dynamic ranges, `down` a table, and `conv_in` keeps its width."""

    def inputs(bits: int) -> QuantPlan:
        plan = planned(build())
        plan.layers["up"] = replace(
            plan.layers["up"], activation=DynamicActivationQuant(bits, clip=1.0 if bits == 8 else 0.7)
        )
        table = plan.layers["down"].activation
        coarse = replace(table, bits=bits, scale=table.scale * 2 ** (8 - bits), zero_point=0 * table.zero_point)
        plan.layers["down"] = replace(plan.layers["down"], activation=coarse)
        return plan

    narrow, wide = inputs(4), inputs(8)
    followed = with_policy(narrow, StepPolicy(*ends), {n: wide.layers[n].activation for n in ("up", "down")})
    assert QuantPlan.load(followed.save(tmp_path)) == followed
    assert policy_of(followed) == StepPolicy()  # engines have none for it
    assert followed.layers["up"].width == ("W8A4 dynamic" if ends == (0, 0) else "W8A4/8 dynamic")
    one, other, more = build(), build(), build()
    for model, plan in ((one, narrow), (other, followed), (more, wide)):
        SimulateAdapter().apply(model, plan)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, high in zip(STEPS, StepPolicy(*ends).high(len(STEPS)), strict=True):
        expected = more if high else one
        assert torch.equal(other(x, torch.tensor(t)), expected(x, torch.tensor(t)))


def test_dynamic_ranges_that_have_groups_already_are_split_as_tables_are():
    """Of three groups, with edges at 300 and 700, the first and the last have 4 bits."""
    plan = planned(build())
    quant = DynamicActivationQuant(6, True, 1.0, "all", (4, 6, 4), (0.7, 1.0, 0.7))
    plan.layers["up"] = replace(plan.layers["up"], activation=quant)

    def widths(policy: StepPolicy, wide: dict) -> list[tuple[int, float]]:
        followed = with_policy(plan, policy, wide)
        found = followed.layers["up"].activation
        forms = found.forms if found.groups else found.forms * len(followed.groups["all"])
        return [(f.bits, f.clip) for f in (forms[followed.groups["all"].of(t)] for t in STEPS)]

    narrow, middle, wide = (4, 0.7), (6, 1.0), (8, 1.0)
    between = [narrow, narrow, middle, middle, middle, narrow, narrow]
    assert widths(StepPolicy(), {}) == between
    assert widths(StepPolicy(1, 1), {}) == between
    eight = {"up": DynamicActivationQuant(8)}
    twice = with_policy(with_policy(plan, StepPolicy(1, 0), eight), StepPolicy(0, 1), eight)
    assert [twice.layers["up"].activation.forms[twice.groups["all"].of(t)].bits for t in STEPS] == [8, 4, 6, 6, 6, 4, 8]
    assert widths(StepPolicy(1, 1), eight) == [wide, *between[1:-1], wide]
    assert widths(StepPolicy(2, 2), eight) == [wide, wide, middle, middle, middle, wide, wide]  # none has 4 bits


def test_the_widest_groups_may_be_the_exceptions():
    plan = planned(build())
    for layer in plan.layers.values():
        if layer.activation is not None:
            layer.activation = replace(
                layer.activation, group_bits=(4, 4, 8), zero_point=torch.tensor([1, 2, 100]).int()
            )
    followed = with_policy(plan, StepPolicy(3, 0))
    assert {p.activation.bits for p in followed.layers.values() if p.activation} == {4}
    assert followed.layers["up"].activation.zero_point.tolist()[:2] == [1, 2]


def test_all_steps_in_floating_point_cannot_be_told_in_a_table():
    with pytest.raises(PlanError, match="group_bits"):
        with_policy(planned(build()), StepPolicy(4, 3))


def test_what_a_policy_cannot_say_is_refused():
    model = build()
    plan = with_policy(planned(model), StepPolicy(1, 0))
    plan.layers["down"] = planned(model).layers["down"]
    plan.layers["down"] = replace(
        plan.layers["down"], activation=replace(plan.layers["up"].activation, group_bits=None, bits=8)
    )
    with pytest.raises(PlanError, match="whole steps"):
        policy_of(plan)
    middle = planned(model)
    for layer in middle.layers.values():
        if layer.activation is not None:
            layer.activation = replace(layer.activation, group_bits=(8, None, 8))
    with pytest.raises(PlanError, match="middle"):
        policy_of(middle)
    dynamic = planned(model)
    dynamic.layers["up"] = replace(dynamic.layers["up"], activation=DynamicActivationQuant(8))
    with pytest.raises(PlanError, match="no steps in floating point"):
        with_policy(dynamic, StepPolicy(1, 1))
