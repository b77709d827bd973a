"""Weights in groups of inputs: one integer product, the values that are simulated."""

from __future__ import annotations

import copy
from dataclasses import replace

import dq_torchao
import pytest
import torch
from dq_torchao.intx import intx_tensor
from dq_torchao.lowering import lower_layer
from torch import nn
from torch._inductor import config as inductor_config
from torchao_models import GROUPS, TIMESTEPS, build, denoiser_plan, layer_plan, sqnr

from dq_plugins.plan import LayerPlan, QuantPlan, Reason
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.quantized.weight_groups import grouped_quantizer
from dq_plugins.timesteps import TimestepContext

LAYERS = {
    "linear": lambda: (nn.Linear(24, 10), (4, 5, 24)),
    "conv": lambda: (nn.Conv2d(8, 16, 3, padding=1), (4, 8, 7, 9)),
    "grouped conv": lambda: (nn.Conv2d(8, 16, 3, padding=1, groups=2), (4, 8, 7, 9)),
}


def grouped(plan: LayerPlan, layer: nn.Module, *, bits: int = 4, symmetric: bool = True) -> LayerPlan:
    """The same plan, its weight in groups of two or four inputs."""
    count = 6 if isinstance(layer, nn.Linear) and layer.weight.shape[1] == 24 else 2
    return replace(plan, weight=grouped_quantizer(layer.weight, count, bits, symmetric=symmetric))


def grouped_plan(model: nn.Module) -> QuantPlan:
    plan = denoiser_plan(model)
    for name, layer in plan.layers.items():
        if layer.quantized:
            plan.layers[name] = grouped(layer, model.get_submodule(name))
    return plan


@pytest.mark.parametrize("timesteps", [[500.0], [100.0, 900.0, 500.0, 900.0]], ids=["batch", "per-sample"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_agrees_with_simulation(kind, bits, symmetric, timesteps):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    x, context = torch.randn(shape) * 3, TimestepContext({"all": GROUPS})
    plan = grouped(layer_plan(layer), layer, bits=bits, symmetric=symmetric)
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    assert lower_layer(layer, plan, context).state == "integer"
    with torch.no_grad(), context.select(torch.tensor(timesteps)):
        assert sqnr(simulated(x), layer(x)) > 90
    assert torch.allclose(layer.weight, simulated.weight, atol=1e-7)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_alone(kind):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    x, context = torch.randn(shape), TimestepContext({"all": GROUPS})
    plan = grouped(layer_plan(layer), layer)
    plan = replace(plan, activation=None, unquantized_reason=Reason("weights alone"))
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    assert lower_layer(layer, plan, context).state == "weight-only"
    assert layer.weight_packed.nbytes == layer.weight.numel() // 2
    assert layer.execution.scale_bytes == plan.weight.scale.nbytes + plan.weight.group_scale.nbytes
    with torch.no_grad():
        assert sqnr(simulated(x), layer(x)) > 90


def test_codes_that_do_not_fit_are_simulated():
    layer = nn.Linear(24, 10)
    plan = layer_plan(layer)
    plan.weight.group_scale = torch.full((10, 2), 2, dtype=torch.uint8)  # 8-bit codes
    execution = lower_layer(layer, plan, TimestepContext({"all": GROUPS}))
    assert (execution.state, execution.reason) == (
        "simulated",
        "8-bit weight codes less the zero points of the plan, times the scales of groups, do not fit int8",
    )


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor(t)) for t in (*TIMESTEPS, [100.0, 900.0])]


def test_a_denoiser_agrees_with_simulation_comes_back_from_disk_and_survives_release(tmp_path):
    model, simulated = build(), build()
    SimulateAdapter().apply(simulated, plan := grouped_plan(model))
    assert set(plan.features) == {"group_scale"}
    dq_torchao.apply(model, plan)
    expected = outputs(model)
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(simulated), expected, strict=True))
    assert dq_torchao.release_weights(model)
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(loaded), strict=True))


@pytest.mark.parametrize("freezing", [False, True])
def test_compiled(freezing):
    model = build()
    dq_torchao.apply(model, grouped_plan(model))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for t in map(torch.tensor, TIMESTEPS):
            assert sqnr(model(x, t), compiled(x, t)) > 60


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_as_torchaos_tensor(kind, symmetric):
    torch.manual_seed(0)
    layer, _ = LAYERS[kind]()
    plan = grouped(layer_plan(layer), layer, symmetric=symmetric)
    lower_layer(layer, plan, TimestepContext({"all": GROUPS}))
    assert torch.allclose(intx_tensor(layer).dequantize(), layer.weight, atol=1e-6)
