"""Balanced input channels and bias corrections in integer layers: what is simulated, to a tie in rounding."""

from __future__ import annotations

import copy
from dataclasses import replace

import dq_torchao
import pytest
import torch
from dq_torchao import restoring
from dq_torchao.intx import intx_tensor
from dq_torchao.kernels import Kernel, native
from dq_torchao.lowering import lower_layer
from plans import corrected
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torchao_models import GROUPS, TIMESTEPS, build, corrected_plan, denoiser_plan, layer_plan, sqnr

from dq_plugins.errors import CheckpointError, DQError
from dq_plugins.plan import BiasCorrection, LayerPlan, QuantPlan, Reason
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.timesteps import TimestepContext, TimestepGroups

LAYERS = {
    "linear": lambda: (nn.Linear(24, 10), (4, 5, 24)),
    "linear without bias": lambda: (nn.Linear(24, 10, bias=False), (4, 24)),
    "conv": lambda: (nn.Conv2d(8, 16, 3, padding=1), (4, 8, 7, 9)),
    "conv without bias": lambda: (nn.Conv2d(8, 16, 3, stride=2, bias=False), (4, 8, 7, 9)),
    "grouped conv": lambda: (nn.Conv2d(8, 16, 3, padding=1, groups=4), (4, 8, 7, 9)),
    "depthwise conv": lambda: (nn.Conv2d(8, 8, 3, padding="same", groups=8), (4, 8, 7, 9)),
    "other border": lambda: (nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (4, 8, 7, 9)),
}
ONE, PER_SAMPLE = [[100.0], [500.0], [900.0]], [[100.0, 900.0], [500.0, 100.0, 900.0, 100.0]]


def made(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    return layer, torch.randn(shape) * 3


def agree(layer: nn.Module, plan: LayerPlan, x: torch.Tensor, timesteps: list[list[float]], least: float = 90) -> None:
    context = TimestepContext({"all": GROUPS, "coarse": TimestepGroups((600.0,))})
    integer, simulated = copy.deepcopy(layer), copy.deepcopy(layer)
    assert lower_layer(integer, plan, context).state == "integer"
    simulate_layer(simulated, plan, context)
    for t in timesteps:
        with torch.no_grad(), context.select(torch.tensor(t)):
            expected, found = simulated(x), integer(x)
            assert found.dtype == expected.dtype
            assert sqnr(expected, found) > least, t


@pytest.mark.parametrize("timesteps", [ONE, PER_SAMPLE], ids=["batch", "per-sample"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_group_agrees_with_simulation(kind, timesteps):
    layer, x = made(kind)
    agree(layer, corrected(layer_plan(layer), layer), x, timesteps)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_widths(kind, bits, symmetric):
    layer, x = made(kind)
    plan = layer_plan(layer, act_bits=bits, weight_bits=bits, symmetric=symmetric)
    agree(layer, corrected(plan, layer), x, [*ONE, *PER_SAMPLE])


@pytest.mark.parametrize("timesteps", [ONE, PER_SAMPLE], ids=["batch", "per-sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "conv", "linear without bias"])
def test_dtypes(kind, dtype, timesteps):
    layer, x = made(kind)
    layer = layer.to(dtype)
    least = 90 if dtype == torch.float64 else 45
    agree(layer, corrected(layer_plan(layer), layer), x.to(dtype), timesteps, least)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv"])
def test_a_correction_of_one_row_is_part_of_the_bias(kind):
    layer, x = made(kind)
    plan = corrected(layer_plan(layer), layer, groups=None)
    agree(layer, plan, x, [*ONE, *PER_SAMPLE])
    lower_layer(layer, plan, TimestepContext({"all": GROUPS}))
    assert "bias_correction" not in layer.state_dict()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("few", ["ranges", "corrections"])
def test_ranges_and_corrections_may_have_groups_of_their_own(kind, few):
    layer, x = made(kind)
    plan = corrected(layer_plan(layer), layer)
    table = torch.randn(2, len(plan.bias_correction.values[0]))
    if few == "corrections":
        plan.bias_correction = BiasCorrection(table, "coarse")
    else:
        plan = replace(plan, bias_correction=replace(plan.bias_correction, groups="all"))
        plan.activation = replace(
            plan.activation,
            groups="coarse",
            scale=plan.activation.scale[:2],
            zero_point=plan.activation.zero_point[:2],
        )
    agree(layer, plan, x, [*ONE, *PER_SAMPLE])


def test_one_row_of_ranges_takes_corrections_per_sample():
    layer, x = made("conv")
    plan = corrected(layer_plan(layer, groups=1), layer, groups=None)
    plan.activation.groups = "none"
    plan.bias_correction = BiasCorrection(torch.randn(3, 16), "all")
    context = TimestepContext({"all": GROUPS, "none": TimestepGroups(())})
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    lower_layer(layer, plan, context)
    with torch.no_grad(), context.select(torch.tensor([100.0, 900.0])):
        assert sqnr(simulated(x), layer(x)) > 90


def test_tables_stay_float32_and_follow_copies():
    layer, _ = made("conv")
    lower_layer(layer, corrected(layer_plan(layer), layer), TimestepContext({"all": GROUPS}))
    cast = copy.deepcopy(layer).bfloat16()
    assert cast.bias.dtype == torch.bfloat16
    for name in ("inverse_balance", "bias_correction"):
        assert torch.equal(getattr(cast, name), getattr(layer, name))
        assert getattr(cast, name).data_ptr() != getattr(layer, name).data_ptr()


def test_simulated_tables_stay_float32():
    layer, _ = made("conv")
    simulate_layer(layer, corrected(layer_plan(layer), layer), TimestepContext({"all": GROUPS}))
    layer.bfloat16()
    kept = (layer.input_quantizer.scale, layer.input_quantizer.balance, layer.output_correction.values)
    assert [table.dtype for table in kept] == [torch.float32] * 3
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "grouped conv"])
def test_weights_alone(kind, dtype):
    layer, x = made(kind)
    layer, x = layer.to(dtype), x.to(dtype)
    plan = corrected(layer_plan(layer, weight_bits=4), layer, groups=None)
    plan = replace(plan, activation=None, unquantized_reason=Reason("weights alone"))
    context = TimestepContext({"all": GROUPS})
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    assert lower_layer(layer, plan, context).state == "weight-only"
    assert layer.weight.dtype == dtype
    with torch.no_grad(), context.select(100.0):
        assert sqnr(simulated(x), layer(x)) > (90 if dtype == torch.float32 else 45)
    assert not layer.output_correction  # it is part of the bias


def unlike(plan: QuantPlan) -> QuantPlan:
    """Layers of every form: integer, simulated in floating point, weights alone, full precision."""
    plan.layers["up"] = replace(plan.layers["up"], activation=None, unquantized_reason=Reason("weights alone"))
    plan.layers["up"].bias_correction = BiasCorrection(plan.layers["up"].bias_correction.values[:1])
    plan.layers["down"].activation.bits = 16
    plan.layers["conv_out"] = LayerPlan("conv2d", unquantized_reason=Reason("it makes the image"))
    return plan


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor(t)) for t in (*TIMESTEPS, [100.0, 900.0])]


@pytest.mark.parametrize("change", [lambda plan: plan, unlike], ids=["integer", "of every form"])
def test_a_denoiser_agrees_with_simulation_and_comes_back_from_disk_bit_for_bit(change, tmp_path):
    model, simulated = build(), build()
    plan = change(corrected_plan(model))
    SimulateAdapter().apply(simulated, plan)
    dq_torchao.apply(model, plan)
    expected = outputs(model)
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(simulated), expected, strict=True))
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded) == dq_torchao.execution_report(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(loaded), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("freezing", [False, True])
def test_compiled_graph_selects_every_row_without_recompiling(freezing, dtype):
    model = build().to(dtype)
    dq_torchao.apply(model, corrected_plan(model))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for t in (*TIMESTEPS, 120.0):
            t = torch.tensor(t)
            assert sqnr(model(x, t).float(), compiled(x, t).float()) > (60 if dtype == torch.float32 else 35)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("freezing", [False, True])
def test_compiled_with_a_timestep_for_every_sample(freezing):
    model = build()
    dq_torchao.apply(model, corrected_plan(model))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for t in ([100.0, 900.0], [500.0, 500.0]):
            assert sqnr(model(x, torch.tensor(t)), compiled(x, torch.tensor(t))) > 60


@pytest.mark.parametrize("freezing", [False, True])
def test_compiled_in_the_bias_of_the_kernels_and_nothing_packed_again(freezing):
    model = build()
    dq_torchao.apply(model, corrected_plan(model))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500.0)
    torch.compiler.reset()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model)
        compiled(x, t)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(x, t)
    calls = {event.key: event.count for event in profile.key_averages()}
    if native.why_not():
        assert (calls["onednn::qlinear_pointwise"], calls["onednn::qconv_pointwise"]) == (2, 2)
    else:
        assert calls["dq_torchao::product"] == 4
    assert not any("pack" in name or "layout" in name for name in calls)


def test_a_state_dict_of_other_tables_is_loaded_and_of_other_shapes_refused():
    model, donor = build(), build()
    plan, other = corrected_plan(model), corrected_plan(donor)
    for layer in other.layers.values():
        if layer.bias_correction is not None:
            layer.bias_correction = BiasCorrection(layer.bias_correction.values + 1, "all")
    dq_torchao.apply(model, plan)
    state = dq_torchao.apply(donor, other).state_dict()
    model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(donor), strict=True))
    state["up.bias_correction"] = state["up.bias_correction"][:, :-1]
    with pytest.raises(RuntimeError, match=r"up.bias_correction"):
        model.load_state_dict(state)


@pytest.mark.parametrize(("part", "value"), [("inverse_balance", -1.0), ("bias_correction", torch.nan)])
def test_impossible_values_in_a_checkpoint_are_refused(part, value, tmp_path):
    model = build()
    dq_torchao.apply(model, corrected_plan(model))
    getattr(model.up, part).view(-1)[0] = value
    dq_torchao.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=f"'up': {part} must be (positive, )?finite"):
        dq_torchao.load(build(seed=1), tmp_path)


def test_without_the_kernel_the_layer_is_simulated(tmp_path, monkeypatch):
    model = build()
    dq_torchao.apply(model, corrected_plan(model))
    dq_torchao.save(model, tmp_path)
    monkeypatch.setattr(restoring, "kernel_for", lambda *_: Kernel("", "", "this processor cannot"))
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded)["up"].state == "simulated"
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(model), outputs(loaded), strict=True))


def test_released_weights_are_made_again():
    model = build()
    dq_torchao.apply(model, corrected_plan(model))
    expected = outputs(model)
    weight = model.up.weight.clone()
    assert dq_torchao.release_weights(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(model), strict=True))
    assert torch.equal(model.up.weight, weight)


def test_the_report_counts_the_tables():
    plain, model = build(), build()
    dq_torchao.apply(plain, denoiser_plan(plain))
    dq_torchao.apply(model, corrected_plan(model))
    before, after = (dq_torchao.execution_report(each)["up"].scale_bytes for each in (plain, model))
    assert after - before == 4 * (8 + 3 * 32)


def test_torchaos_tensor_has_no_place_for_a_balance():
    model = build()
    dq_torchao.apply(model, corrected_plan(model))
    with pytest.raises(DQError, match="'channel-balance'"):
        intx_tensor(model.up)
