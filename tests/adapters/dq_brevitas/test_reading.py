from __future__ import annotations

import math

import pytest
import torch
from brevitas import nn as qnn
from brevitas import quant as stock
from brevitas.quant.scaled_int import Int32Bias
from dq_brevitas import BrevitasAdapter, attach_timesteps, float_model, plan_from_model, quantizers
from torch import nn

import dq_plugins as dq
from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized.table_lookup import tabulated
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import Schedule, TimestepGroups

PER_TIMESTEP = TimestepGroups.one_per_timestep(TIMESTEPS)
SCHEDULE = Schedule(TIMESTEPS)


def decibels(reference, output):
    return 10 * math.log10(float(reference.square().sum() / (reference - output).square().sum().clamp_min(1e-30)))


@pytest.mark.parametrize(
    ("act", "weight"),
    [
        ("Int8ActPerTimestepFloat", "Int8WeightPerChannelFloat"),
        ("ShiftedUint8ActPerTimestepFloat", "ShiftedUint8WeightPerChannelFloat"),
        ("Uint8ActPerTimestepFloat", "Int8WeightPerTensorFloat"),
    ],
)
def test_simulating_the_plan_read_off_equals_the_model(act, weight, quantize, calibrate, calls):
    injector = getattr(quantizers, act)
    model = quantize(injector, getattr(stock, weight), weight_bit_width=4, input_bit_width=6)
    calibrate(attach_timesteps(model, PER_TIMESTEP))
    plan = plan_from_model(model, SCHEDULE)
    assert {layer.width for layer in plan.layers.values()} == {"W4A6"}
    simulated = dq.apply(float_model(model), plan, backend="simulate")
    for call in calls:
        assert decibels(model(**call), simulated(**call)) > 60


def test_a_plan_survives_the_way_there_and_back(tmp_path):
    plan = handmade_plan(TinyDenoiser(), bits=5)
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)
    read = QuantPlan.load(plan_from_model(model, plan.schedule, base=plan).save(tmp_path))
    assert read.model_hash == plan.model_hash
    assert read.groups == plan.groups
    assert read.timestep_argument == plan.timestep_argument
    for name, layer in plan.layers.items():
        other = read.layers[name]
        assert torch.equal(other.weight.scale, layer.weight.scale)
        assert torch.equal(other.weight.codes, layer.weight.quantize(TinyDenoiser().get_submodule(name).weight))
        assert torch.equal(other.activation.scale, layer.activation.scale)
        assert torch.equal(other.activation.zero_point, layer.activation.zero_point)
        assert (other.kind, other.activation.groups) == (layer.kind, layer.activation.groups)


def test_what_was_trained_lowers_to_integer_execution(calls):
    """The whole way of a trained model: plan, training, plan, torchao."""
    pytest.importorskip("torchao")
    plan = handmade_plan(TinyDenoiser())
    model = BrevitasAdapter().apply(TinyDenoiser(), plan).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for call in calls:
        optimizer.zero_grad()
        (model(**call) - call["sample"]).square().mean().backward()
        optimizer.step()
    model.eval()
    trained = plan_from_model(model, plan.schedule, base=plan)
    assert trained.model_hash != plan.model_hash
    integer = dq.apply(float_model(model), trained, backend="torchao")
    for call in calls:
        assert decibels(model(**call), integer(**call)) > 40


def test_stock_quantizers_are_one_group_for_all_timesteps(quantize, calibrate, calls):
    model = calibrate(quantize(stock.ShiftedUint8ActPerTensorFloat))
    plan = plan_from_model(model, SCHEDULE, timestep="timestep")
    assert {len(groups) for groups in plan.groups.values()} == {1}
    simulated = dq.apply(float_model(model), plan, backend="simulate")
    assert decibels(model(**calls[0]), simulated(**calls[0])) > 60


def test_binary_weights_are_read_as_binary(quantize, calibrate):
    model = quantize(None, stock.SignedBinaryWeightPerTensorConst, weight_scaling_init=0.1)
    weight = plan_from_model(model, SCHEDULE, timestep="timestep").layers["up"].weight
    assert (weight.bits, weight.scheme) == (1, "binary")
    assert torch.equal(weight.fake_quantize(model.up.weight), model.up.quant_weight().value)


def test_layers_without_quantizers_say_why(quantize):
    plan = plan_from_model(quantize(None), SCHEDULE, timestep="timestep")
    assert {layer.why for layer in plan.layers.values()} == {"not quantized in the Brevitas model"}


def test_what_the_base_plan_tabulates_is_kept(calls):
    plan = handmade_plan(TinyDenoiser())
    rows = {"modulation": torch.randn(5, 16)}
    plan.temporal_table = tabulated(tuple(map(float, sorted(TIMESTEPS))), rows, ["time_out"])
    model = BrevitasAdapter().apply(TinyDenoiser(), plan)
    read = plan_from_model(model, plan.schedule, base=plan, original=TinyDenoiser())
    assert read.temporal_table is plan.temporal_table
    again = BrevitasAdapter().apply(float_model(model, TinyDenoiser()), read)
    assert all(torch.equal(model(**call), again(**call)) for call in calls)


def test_what_a_plan_cannot_say_is_refused_by_name(quantize, calibrate):
    def reading(model, match):
        with pytest.raises(PlanError, match=match):
            plan_from_model(model, SCHEDULE, timestep="timestep")

    reading(quantize(stock.Int8ActPerTensorFloat), r"'time_in'.*never calibrated")
    reading(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), 4), r"'time_in'.*never calibrated")
    reading(calibrate(quantize(stock.Int8ActPerTensorFloat, bias_quant=Int32Bias)), "bias_quant")
    reading(calibrate(quantize(stock.Int8ActPerTensorFloat, output_quant=stock.Int8ActPerTensorFloat)), "output_quant")
    reading(calibrate(quantize(stock.Int8ActPerTensorFloat, input_narrow_range=True)), "narrow")
    with pytest.raises(PlanError, match="timestep="):
        plan_from_model(quantize(None), SCHEDULE)


def test_grouped_weights_are_refused():
    from brevitas.quant.experimental.mx_quant_ocp import MXInt8Weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = qnn.QuantLinear(32, 32, bias=False, weight_quant=MXInt8Weight)

    with pytest.raises(PlanError, match="'up'"):
        plan_from_model(Model(), SCHEDULE, timestep="timestep")
