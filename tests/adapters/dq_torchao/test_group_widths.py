"""Inputs with a width for each timestep group, in integers: what is simulated, in every group and whatever the rows."""

from __future__ import annotations

from dataclasses import replace

import dq_torchao
import pytest
import torch
from dq_torchao import restoring
from dq_torchao.kernels import Kernel
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torchao_models import TIMESTEPS, build, corrected_plan, denoiser_plan, sqnr

from dq_plugins.affine import affine_parameters
from dq_plugins.plan import ActivationQuant, QuantPlan
from dq_plugins.quantized.simulate import SimulateAdapter

WIDTHS = {"narrower": (4, 8, 6), "partly floating": (None, 4, 8), "floating at two": (None, 5, None)}


def with_widths(plan: QuantPlan, widths: tuple[int | None, ...], symmetric: bool = False) -> QuantPlan:
    """The ranges of every group at its width."""
    widest = max(w for w in widths if w is not None)
    for name, layer in plan.layers.items():
        if layer.activation is None:
            continue
        scales, zero_points = [], []
        for g, width in enumerate(widths):
            ends = torch.tensor([-1.0 - g]), torch.tensor([2.0 + 3 * g])
            scale, zero_point = affine_parameters(*ends, widest if width is None else width, symmetric=symmetric)
            scales.append(scale)
            zero_points.append(zero_point)
        tables = torch.cat(scales), torch.cat(zero_points)
        assert isinstance(layer.activation, ActivationQuant)
        quant = replace(layer.activation, bits=widest, scale=tables[0], zero_point=tables[1], group_bits=widths)
        plan.layers[name] = replace(layer, activation=quant)
    return plan


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor(t)) for t in (*TIMESTEPS, list(TIMESTEPS))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("planned", [denoiser_plan, corrected_plan])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_integers_equal_the_simulation_and_come_back_from_disk_bit_for_bit(widths, planned, symmetric, tmp_path):
    model, simulated = build(), build()
    plan = with_widths(planned(model), widths, symmetric)
    SimulateAdapter().apply(simulated, plan)
    dq_torchao.apply(model, plan)
    expected = outputs(model)
    assert {e.state for e in dq_torchao.execution_report(model).values()} == {"integer", "full precision"}
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(simulated), expected, strict=True))
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(loaded), strict=True))


def test_one_width_in_all_groups_is_the_plain_quantizer_bit_for_bit():
    plain, grouped = build(), build()
    dq_torchao.apply(plain, with_widths(denoiser_plan(plain), (6, 6, 6)))
    plan = with_widths(denoiser_plan(grouped), (6, 6, 6))
    for layer in plan.layers.values():
        if layer.activation is not None:
            layer.activation = replace(layer.activation, group_bits=None)
    dq_torchao.apply(grouped, plan)
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(grouped), strict=True))


def test_floating_groups_compute_with_the_dequantized_weight():
    model = build()
    plan = with_widths(denoiser_plan(model), (None, 4, None))
    weights_only = build()
    bare = denoiser_plan(weights_only)
    for layer in bare.layers.values():
        if layer.weight is not None:
            layer.activation, layer.unquantized_reason = None, plan.layers["time"].unquantized_reason
    SimulateAdapter().apply(weights_only, bare)
    dq_torchao.apply(model, plan)
    for t, found, expected in zip(TIMESTEPS, outputs(model), outputs(weights_only), strict=False):
        assert (sqnr(expected, found) > 100) == (t != 500.0)


def test_without_the_kernel_the_layer_is_simulated(tmp_path, monkeypatch):
    model = build()
    dq_torchao.apply(model, with_widths(corrected_plan(model), (None, 4, 8)))
    dq_torchao.save(model, tmp_path)
    monkeypatch.setattr(restoring, "kernel_for", lambda *_: Kernel("", "", "this processor cannot"))
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded)["up"].state == "simulated"
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(model), outputs(loaded), strict=True))


@pytest.mark.parametrize("freezing", [False, True])
def test_compiled_without_recompiling(freezing):
    model = build()
    dq_torchao.apply(model, with_widths(corrected_plan(model), (None, 4, 8)))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for t in (*TIMESTEPS, 120.0):
            assert sqnr(model(x, torch.tensor(t)), compiled(x, torch.tensor(t))) > 45
    assert counters["stats"]["unique_graphs"] == 1
