from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from brevitas.nn import QuantLinear
from dq_brevitas import BrevitasAdapter, inference_mode
from torch import nn

import dq_plugins as dq
from dq_plugins.errors import PlanError
from dq_plugins.hashing import weights_hash
from dq_plugins.plan import LayerPlan, OutlierRows, Reason
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.quantized.table_lookup import tabulated
from dq_plugins.testing.adapter_conformance import AdapterConformance
from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser
from dq_plugins.testing.plans import handmade_plan
from dq_plugins.timesteps import context_of


class TestConformance(AdapterConformance):
    name = "brevitas"
    simulated_db = 200.0  # bit for bit


def test_it_is_registered():
    model = TinyDenoiser()
    quantized = dq.apply(model, handmade_plan(model), backend="brevitas")
    assert isinstance(quantized.up, QuantLinear)
    assert type(model.up) is nn.Linear


def test_layers_outside_the_plan_keep_their_class():
    model = TinyDenoiser()
    plan = handmade_plan(model)
    plan.layers["up"] = LayerPlan("linear", unquantized_reason=Reason("too precious"))
    del plan.layers["down"]
    quantized = BrevitasAdapter().apply(model, plan)
    assert type(quantized.up) is type(quantized.down) is nn.Linear


def test_a_subclass_that_brevitas_would_skip_is_refused_before_anything_changes():
    class LoudLinear(nn.Linear):
        pass

    model = TinyDenoiser()
    model.up.__class__ = LoudLinear
    plan = handmade_plan(model)
    with pytest.raises(PlanError, match=r"'up', a LoudLinear"):
        BrevitasAdapter().apply(model, plan)
    assert type(model.down) is nn.Linear


def with_table(model: TinyDenoiser):
    plan = handmade_plan(model)
    rows = {"modulation": torch.randn(5, 16)}
    plan.temporal_table = tabulated(tuple(map(float, sorted(TIMESTEPS))), rows, ["time_out"])
    return plan


def test_the_temporal_table_takes_the_place_of_its_layers(calls):
    plan = with_table(TinyDenoiser())
    model, simulated = BrevitasAdapter().apply(TinyDenoiser(), plan), SimulateAdapter().apply(TinyDenoiser(), plan)
    assert all(torch.equal(model(**call), simulated(**call)) for call in calls)
    live = BrevitasAdapter().apply(TinyDenoiser(), plan, temporal_fallback="live")
    assert torch.isfinite(live(**{**calls[0], "timestep": torch.tensor([123.0])})).all()


@pytest.mark.parametrize("kept", [None, "weight", "layer"])
def test_known_rows_of_outlier_tokens_are_kept_exact(kept, calls):
    plan = handmade_plan(TinyDenoiser(), bits=4)
    if kept is not None:
        activation = plan.layers["up"].activation if kept == "weight" else None
        plan.layers["up"] = LayerPlan("linear", activation=activation, unquantized_reason=Reason("this test keeps it"))
    row, value = torch.full((1, 16), 7.0), torch.randn(1, 32)
    plan.outlier_rows = {"up": OutlierRows((2,), row, value)}
    model, simulated = BrevitasAdapter().apply(TinyDenoiser(), plan), SimulateAdapter().apply(TinyDenoiser(), plan)
    expected = [simulated(**call) for call in calls]  # no row is the known one: all are computed live
    assert all(torch.equal(model(**call), e) for call, e in zip(calls, expected, strict=True))
    with torch.no_grad(), inference_mode(model):
        model(**calls[0])
        assert all(torch.equal(model(**call), e) for call, e in zip(calls, expected, strict=True))
    with context_of(model).select(500.0):
        x = torch.randn(2, 64, 16)
        x[:, 2] = row
        assert torch.equal(model.up(x)[:, 2], value.expand(2, -1))


def test_widths_by_timestep_group_are_refused_by_name():
    plan = handmade_plan(TinyDenoiser())
    quant = plan.layers["up"].activation
    plan.layers["up"].activation = replace(quant, group_bits=(*[4] * (len(quant.scale) - 1), quant.bits))
    with pytest.raises(PlanError, match=r"group_widths \(layer 'up'\)"):
        BrevitasAdapter().apply(TinyDenoiser(), plan)


def test_training_and_a_copy_leave_the_plan_alone(calls):
    model = TinyDenoiser()
    plan = handmade_plan(model)
    before = plan.hash
    quantized = copy.deepcopy(BrevitasAdapter().apply(model, plan)).train()
    optimizer = torch.optim.SGD(quantized.parameters(), 0.1)
    quantized(**calls[0]).square().mean().backward()
    optimizer.step()
    assert plan.hash == before
    assert weights_hash(TinyDenoiser()) == plan.model_hash
