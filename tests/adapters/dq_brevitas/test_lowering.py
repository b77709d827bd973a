from __future__ import annotations

import pytest
import torch
from brevitas.graph.quantize import layerwise_quantize
from dq_brevitas import attach_timesteps, layer_map
from dq_brevitas.lowering import weight_quantizer
from torch import nn

from dq_plugins.affine import affine_parameters, integer_range
from dq_plugins.errors import PlanError
from dq_plugins.plan import ActivationQuant, LayerPlan, WeightQuant
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.quantized.weight_scale import weight_parameters
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan

WIDTHS = [(8, 8), (4, 8), (3, 5), (2, 2), (8, 4), (5, 6), (16, 16), (1, 8)]


def varied_plan(denoiser: nn.Module):
    """Another width, symmetry and rounding for every layer; the fourth is weight-only, the fifth activation-only."""
    generator = torch.Generator().manual_seed(3)
    plan = handmade_plan(denoiser)
    for i, (name, (weight_bits, act_bits)) in enumerate(zip(plan.layers, WIDTHS, strict=True)):
        weight = denoiser.get_submodule(name).weight.detach()
        symmetric = i % 2 == 0
        scale, zero_point = weight_parameters(weight, weight_bits, symmetric=symmetric, method="minmax")
        quant = WeightQuant(weight_bits, scale, None if symmetric else zero_point)
        if i % 3 == 1:  # learned rounding: up to one code away from nearest
            moved = quant.quantize(weight).int() + torch.randint(-1, 2, weight.shape, generator=generator)
            quant.codes = moved.clamp(*integer_range(weight_bits)).to(torch.int8)
        if weight_bits == 16:  # one scale for the whole tensor
            quant = WeightQuant(16, weight.abs().max().reshape(1) / 2**15)
        if weight_bits == 1:
            quant = WeightQuant(1, weight.abs().flatten(1).mean(1), scheme="binary")
        low, high = -torch.rand(5, generator=generator) * 3 - 0.1, torch.rand(5, generator=generator) * 3 + 0.1
        act = ActivationQuant(act_bits, "all", *affine_parameters(low, high, act_bits, symmetric=i % 4 < 2))
        kept = "as an exercise" if i in (3, 4) else None
        plan.layers[name] = LayerPlan("x", frozenset(), None if i == 4 else quant, None if i == 3 else act, kept)
    return plan.validate()


@pytest.fixture
def plan():
    return varied_plan(TinyDenoiser())


@pytest.fixture
def model(plan):
    quantized = layerwise_quantize(TinyDenoiser(), compute_layer_map=layer_map(plan))
    return attach_timesteps(quantized, plan.groups, timestep=plan.timestep_argument)


def test_equals_the_simulated_plan_bit_for_bit_at_every_timestep(plan, model, calls):
    simulated = SimulateAdapter().apply(TinyDenoiser(), plan)
    batch = {key: torch.cat([call[key][:1] for call in calls]) for key in calls[0]}
    for call in [*calls, batch]:
        assert torch.equal(model(**call), simulated(**call))


def test_weights_requantize_to_the_codes_of_the_plan(plan, model):
    for name, layer in plan.layers.items():
        if layer.weight is not None:
            before, quantized = TinyDenoiser().get_submodule(name).weight, model.get_submodule(name).quant_weight()
            assert torch.equal(quantized.value, layer.weight.fake_quantize(before)), name
            offset = 0 if layer.weight.symmetric else 2 ** (layer.weight.bits - 1)
            assert torch.equal(quantized.int().long() - offset, layer.weight.quantize(before).long()), name


def test_float_weights_stay_where_rounding_was_not_learned(plan, model):
    for name, layer in plan.layers.items():
        same = torch.equal(model.get_submodule(name).weight, TinyDenoiser().get_submodule(name).weight)
        assert same == (layer.weight is None or layer.weight.codes is None), name


def test_unplanned_parts_have_no_quantizer(model, plan):
    names = list(plan.layers)
    assert not model.get_submodule(names[3]).input_quant.is_quant_enabled
    assert not model.get_submodule(names[4]).weight_quant.is_quant_enabled


def test_every_scale_of_the_plan_trains(model, calls):
    model.train()
    batch = {key: torch.cat([call[key][:1] for call in calls]) for key in calls[0]}
    model(**batch).square().mean().backward()
    scales = {n: p for n, p in model.named_parameters() if n.endswith("scaling_impl.value")}
    assert len(scales) == 14
    assert all(p.grad is not None and bool(p.grad.any()) for p in scales.values())


def test_state_survives_reinitialisation_from_the_injector(model, plan, calls):
    copied = layerwise_quantize(TinyDenoiser(seed=5), compute_layer_map=layer_map(plan))
    attach_timesteps(copied, plan.groups)
    with torch.no_grad():
        model.time_in.input_quant.tensor_quantizer.scaling_impl.value.mul_(1.5)
    copied.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(model(**call), copied(**call)) for call in calls)


def test_a_bfloat16_layer_keeps_float32_scales():
    layer = nn.Linear(8, 4).bfloat16()
    quant = WeightQuant(4, *weight_parameters(layer.weight, 4)[:1])
    from brevitas.nn import QuantLinear

    with torch.no_grad():
        quantized = QuantLinear(8, 4, bias=True, weight_quant=weight_quantizer(quant, layer), dtype=torch.bfloat16)
        quantized.weight = layer.weight
    assert torch.equal(quantized.quant_weight().value, quant.fake_quantize(layer.weight))


def test_what_brevitas_cannot_hold_is_refused():
    with pytest.raises(PlanError, match="transposed"):
        weight_quantizer(WeightQuant(8, torch.ones(4)), nn.ConvTranspose2d(4, 4, 2), "up")
    with pytest.raises(PlanError, match="4 output channels and the plan 3"):
        weight_quantizer(WeightQuant(8, torch.ones(3)), nn.Linear(8, 4), "up")


def test_codes_of_another_shape_are_refused(plan):
    name = next(n for n, layer in plan.layers.items() if layer.weight is not None and layer.weight.codes is not None)
    plan.layers[name].weight.codes = torch.zeros(2, 2, dtype=torch.int8)
    with pytest.raises(PlanError, match=name):
        layerwise_quantize(TinyDenoiser(), compute_layer_map=layer_map(plan))


def test_per_tensor_weight_scales_are_held_too():
    layer = nn.Linear(8, 4)
    quant = WeightQuant(4, layer.weight.detach().abs().max().reshape(1) / 7)
    from brevitas.nn import QuantLinear

    quantized = QuantLinear(8, 4, bias=True, weight_quant=weight_quantizer(quant, layer))
    quantized.weight = layer.weight
    assert torch.equal(quantized.quant_weight().value, quant.fake_quantize(layer.weight))


def test_timesteps_of_the_plan_exercise_every_group(plan):
    assert {plan.groups["all"].of(t) for t in TIMESTEPS} == set(range(5))
