"""Rotated inputs, directions in floating point and low-rank branches in integer layers: what is simulated, to a tie in
rounding."""

from __future__ import annotations

import copy
from dataclasses import replace

import dq_torchao
import pytest
import torch
from dq_torchao import restoring
from dq_torchao.intx import intx_tensor
from dq_torchao.kernels import Kernel
from dq_torchao.lowering import lower_layer
from plans import corrected
from torch import nn
from torch._inductor import config as inductor_config
from torchao_models import GROUPS, TIMESTEPS, build, denoiser_plan, layer_plan, sqnr

from dq_plugins.affine import integer_range
from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.plan import DynamicActivationQuant, LayerPlan, LowRank, QuantPlan, Reason, Rotation, Subspace
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.layer_transform import transform_of, transformed_weight
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.timesteps import TimestepContext

LAYERS = {
    "linear": lambda: (nn.Linear(32, 10), (4, 5, 32)),
    "conv": lambda: (nn.Conv2d(8, 16, 3, padding=1), (4, 8, 7, 9)),
    "conv1d": lambda: (nn.Conv1d(8, 16, 3, padding=1), (4, 8, 7)),
    "conv3d": lambda: (nn.Conv3d(8, 16, 3, padding=1), (4, 8, 4, 5, 6)),
    "strided conv": lambda: (nn.Conv2d(8, 16, 3, stride=2, bias=False), (4, 8, 7, 9)),
    "other border": lambda: (nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (4, 8, 7, 9)),
}


def transformed(
    plan: LayerPlan, layer: nn.Module, *, kind: str = "hadamard", balanced: bool = True, branch_bits: int = 16
) -> LayerPlan:
    """The same plan, with everything that a layer's input and weight may go through."""
    g = torch.Generator().manual_seed(0)
    plan = corrected(plan, layer) if balanced else plan
    channels, outputs = layer.weight.shape[1], len(layer.weight)
    matrix = None
    if kind == "matrix":
        matrix = torch.linalg.qr(torch.randn(channels // 4, 4, 4, generator=g).double()).Q
    rank = LowRank(
        (torch.randn(2, layer.weight[0].numel(), generator=g) / 8).half(), torch.randn(outputs, 2, generator=g).half()
    )
    rank = rank.in_8_bits() if branch_bits == 8 else rank
    loud = Subspace(torch.linalg.qr(torch.randn(channels, 3, generator=g)).Q.T.contiguous().half())
    plan = replace(plan, rotation=Rotation(kind, 4, matrix), low_rank=rank, subspace=loud)
    largest = transformed_weight(layer, transform_of(plan)).detach().flatten(1).abs().amax(1).float()
    plan.weight = replace(plan.weight, scale=largest / integer_range(plan.weight.bits)[1])
    return plan


def transformed_plan(model: nn.Module, **options) -> QuantPlan:
    plan = denoiser_plan(model)
    for name, layer in plan.layers.items():
        if layer.quantized:
            plan.layers[name] = transformed(layer, model.get_submodule(name), **options)
    return plan


@pytest.mark.parametrize("timesteps", [[500.0], [100.0, 900.0, 500.0, 900.0]], ids=["batch", "per-sample"])
@pytest.mark.parametrize("kind", ["hadamard", "regular-hadamard", "matrix"])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_simulation(name, kind, timesteps):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    x, context = torch.randn(shape) * 3, TimestepContext({"all": GROUPS})
    plan = transformed(layer_plan(layer), layer, kind=kind, branch_bits=8 if kind == "matrix" else 16)
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    assert lower_layer(layer, plan, context).state == "integer"
    with torch.no_grad(), context.select(torch.tensor(timesteps)):
        assert sqnr(simulated(x), layer(x)) > 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["weights alone", "16-bit inputs", "dynamic"])
def test_other_forms(form, dtype):
    torch.manual_seed(0)
    layer, shape = LAYERS["linear"]()
    layer, x, context = layer.to(dtype), torch.randn(shape).to(dtype), TimestepContext({"all": GROUPS})
    plan = transformed(layer_plan(layer), layer, branch_bits=8)
    if form == "weights alone":
        plan = replace(plan, activation=None, unquantized_reason=Reason("weights alone"))
    else:
        activation = DynamicActivationQuant(8) if form == "dynamic" else replace(plan.activation, bits=16)
        plan = replace(plan, activation=activation)
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    states = {"weights alone": "weight-only", "16-bit inputs": "simulated", "dynamic": "integer"}
    assert lower_layer(layer, plan, context).state == states[form]
    with torch.no_grad(), context.select(500.0):
        assert sqnr(simulated(x).float(), layer(x).float()) > (60 if dtype == torch.float32 else 30)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor(t)) for t in (*TIMESTEPS, [100.0, 900.0])]


@pytest.mark.parametrize(("kind", "branch_bits"), [("hadamard", 8), ("matrix", 16)])
def test_a_denoiser_agrees_with_simulation_and_comes_back_from_disk(kind, branch_bits, tmp_path):
    model, simulated = build(), build()
    plan = transformed_plan(model, kind=kind, branch_bits=branch_bits)
    plan.layers["up"] = replace(plan.layers["up"], activation=None, unquantized_reason=Reason("weights alone"))
    plan.layers["up"].bias_correction = None
    plan.layers["down"].activation.bits = 16
    SimulateAdapter().apply(simulated, plan)
    dq_torchao.apply(model, plan)
    expected = outputs(model)
    assert all(sqnr(a, b) > 35 for a, b in zip(outputs(simulated), expected, strict=True))
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(loaded), strict=True))


@pytest.mark.parametrize("freezing", [False, True])
def test_compiled(freezing):
    model = build()
    plan = transformed_plan(model, branch_bits=8 if freezing else 16)
    plan.layers["up"] = replace(plan.layers["up"], activation=None, unquantized_reason=Reason("weights alone"))
    plan.layers["up"].bias_correction = None
    plan.layers["down"].activation.bits = 16
    dq_torchao.apply(model, plan)
    assert {e.state for e in dq_torchao.execution_report(model).values()} >= {"integer", "weight-only", "simulated"}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for t in map(torch.tensor, TIMESTEPS):
            assert sqnr(model(x, t), compiled(x, t)) > 35


def test_without_the_kernel_the_layer_is_simulated(tmp_path, monkeypatch):
    model = build()
    dq_torchao.apply(model, transformed_plan(model))
    dq_torchao.save(model, tmp_path)
    monkeypatch.setattr(restoring, "kernel_for", lambda *_: Kernel("", "", "this processor cannot"))
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded)["up"].state == "simulated"
    assert all(sqnr(a, b) > 35 for a, b in zip(outputs(model), outputs(loaded), strict=True))


def test_the_report_counts_the_branch_and_stored_rotations():
    plain, model = build(), build()
    dq_torchao.apply(plain, denoiser_plan(plain))
    dq_torchao.apply(model, transformed_plan(model, kind="matrix", balanced=False))
    before, after = (dq_torchao.execution_report(each)["up"].scale_bytes for each in (plain, model))
    low_rank, rotation, subspace = 2 * 2 * (8 + 32), 8 * 2 * 4 * 4, 2 * 3 * (8 + 32)
    assert after - before == low_rank + rotation + subspace


def test_tuning_pays_for_them():
    model = build()
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}
    timings = dq_torchao.tune(model, transformed_plan(model), inputs)
    assert set(timings) == {"conv_in", "up", "down", "conv_out"}


@pytest.mark.parametrize(
    ("field", "message"),
    [("rotation", "'rotation'"), ("low_rank", "'low-rank'"), ("subspace", "stays in floating point")],
)
def test_torchaos_tensor_has_no_place_for_them(field, message):
    layer = nn.Linear(32, 10)
    plan = transformed(layer_plan(layer), layer, balanced=False)
    others = {"rotation": None, "low_rank": None, "subspace": None}
    del others[field]
    lower_layer(layer, replace(plan, **others), TimestepContext({"all": GROUPS}))
    with pytest.raises(DQError, match=message):
        intx_tensor(layer)


def test_groups_in_floating_point_have_the_branch_once():
    layer = nn.Linear(32, 10)
    plan = transformed(layer_plan(layer), layer)
    plan.activation = replace(plan.activation, group_bits=(8, None, 4))
    x, context = torch.randn(3, 5, 32), TimestepContext({"all": GROUPS})
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    lower_layer(layer, plan, context)
    for t in ([100.0], [500.0], [100.0, 500.0, 900.0]):
        with torch.no_grad(), context.select(torch.tensor(t)):
            assert sqnr(simulated(x), layer(x)) > 45


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("low_rank_up", torch.nan),
        ("low_rank_scale", -1.0),
        ("weight_group_scale", 0),
        ("kept_weight", torch.inf),
        ("input_split.basis", torch.nan),
    ],
)
def test_impossible_values_in_a_checkpoint_are_refused(part, value, tmp_path):
    model = build()
    plan = transformed_plan(model, branch_bits=8 if part == "low_rank_scale" else 16)
    plan.layers["up"].weight.group_scale = torch.ones(32, 2, dtype=torch.uint8)
    dq_torchao.apply(model, plan)
    model.up.get_buffer(part).view(-1)[0] = value
    dq_torchao.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=rf"'up.*: {part.split('.')[-1]} must be"):
        dq_torchao.load(build(seed=1), tmp_path)
