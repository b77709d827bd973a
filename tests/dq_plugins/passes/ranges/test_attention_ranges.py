from __future__ import annotations

import pytest
import torch
from attention_models import (
    ALONE,
    RECIPE,
    attention_calls_recorded,
    attention_denoiser,
    attention_inputs,
    attention_plan,
)
from torch.nn import functional as F

import dq_plugins as dq
from dq_plugins.errors import PlanError
from dq_plugins.plan import ActivationQuant, AttentionPlan
from dq_plugins.recipe import Recipe, Step


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = attention_denoiser()
    return denoiser, attention_calls_recorded(denoiser, tmp_path_factory.mktemp("calib"))


def make(case, recipe: Recipe = ALONE, **options) -> dq.QuantPlan:
    return dq.make_plan(*case, recipe, progress=False, **options)


def seen(case, module: str, operand: int) -> dict[float, torch.Tensor]:
    """Operands of one module's attention by timestep, watched without anything of ours."""
    denoiser, calibration = case
    found: dict[float, torch.Tensor] = {}
    order = ("near", "far").index(module)
    for t in calibration.timesteps:
        for call in calibration.calls(t):
            kept: list[torch.Tensor] = []
            original = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = lambda *a, k=kept, o=original, **kw: (k.append(a), o(*a, **kw))[1]
            try:
                call.run(denoiser)
            finally:
                F.scaled_dot_product_attention = original
            found[t] = kept[order][operand]
    return found


@pytest.mark.parametrize("module", ["near", "far"])
@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_ranges_are_those_of_what_each_product_sees_at_its_timesteps(case, module: str, operand: str) -> None:
    plan = make(case)
    quant = plan.attention[module].quantizers[operand]
    groups = plan.groups[quant.groups]
    for t, x in seen(case, module, ("query", "key", "value").index(operand)).items():
        width = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
        assert float(quant.scale[groups.of(t)]) == pytest.approx(width / 255, rel=1e-5)
    assert len(quant.scale) == len(groups) == 3


def test_the_plan_says_what_stays_in_floating_point(case) -> None:
    plan = make(case, options={"attention-ranges": {"leave": ("far",)}})
    assert plan.attention["near"].quantized
    assert plan.attention["far"].unquantized_reason.code == "asked"
    assert plan.features["attention"] == ("near",)
    assert make(case, act_bits=None).attention == {}


def test_more_than_one_attention_in_a_call_is_left(tmp_path) -> None:
    denoiser = attention_denoiser()
    own = type(denoiser.near).forward

    class Twice(type(denoiser.near)):
        def forward(self, x, seen, mask=None):
            return own(self, own(self, x, seen, mask), seen, mask)

    denoiser.near.__class__ = Twice
    plan = attention_plan(denoiser, tmp_path, ALONE)
    assert "attends 2 times" in plan.attention["near"].unquantized_reason.text
    assert plan.attention["far"].quantized


def test_the_same_again(case, tmp_path) -> None:
    plan = make(case)
    assert plan == make(case)
    assert dq.QuantPlan.load(plan.save(tmp_path)) == plan


def test_the_denoiser_is_left_as_it_was(case) -> None:
    before = case[0](**attention_inputs())
    make(case)
    assert torch.equal(case[0](**attention_inputs()), before)
    assert type(case[0].near).__dict__.get("_dq_original") is None


def test_simulated_outputs_are_close(case) -> None:
    model = dq.apply(case[0], make(case), backend="simulate")
    for t in (900.0, 500.0, 100.0):
        y, expected = model(**attention_inputs(t)), case[0](**attention_inputs(t))
        assert 0 < float((y - expected).norm() / expected.norm()) < 0.05


def test_fewer_bits_are_worse(case) -> None:
    def error(bits: int) -> float:
        model = dq.apply(case[0], make(case, options={"attention-ranges": {"bits": bits}}), backend="simulate")
        return float((model(**attention_inputs()) - case[0](**attention_inputs())).norm())

    assert error(8) < error(6) < error(4)


def test_a_correction_that_comes_after_sees_quantized_attention(case) -> None:
    recipe = Recipe("corrected", "", (*RECIPE.steps, Step("bias-correction")))
    corrected, plain = (make(case, r, options={"attention-ranges": {"bits": 4}}) for r in (recipe, RECIPE))
    without = Recipe("", "", tuple(step for step in recipe.steps if step.name != "attention-ranges"))
    for name, attention in corrected.attention.items():
        assert torch.equal(attention.key.scale, plain.attention[name].key.scale)
    table = corrected.layers["near.out"].bias_correction.values
    assert not torch.allclose(table, make(case, without).layers["near.out"].bias_correction.values)


def test_operands_are_quantized_together_or_not_at_all() -> None:
    with pytest.raises(PlanError, match="does not say why"):
        AttentionPlan()
    quant = ActivationQuant(8, "default", torch.ones(1), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(PlanError, match="no value"):
        AttentionPlan(query=quant, key=quant)
