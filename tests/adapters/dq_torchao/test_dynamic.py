"""Layers with a range for each token or sample, in integers: what is simulated, whatever the rows are."""

from __future__ import annotations

import copy
from dataclasses import replace

import dq_torchao
import pytest
import torch
from dq_torchao import restoring
from dq_torchao.kernels import Kernel, dynamic_codes, native
from dq_torchao.layer import IntegerLayer
from dq_torchao.lowering import lower_layer
from plans import corrected
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torchao_models import GROUPS, TIMESTEPS, Denoiser, build, corrected_plan, denoiser_plan, layer_plan, sqnr

from dq_plugins.layer_kinds import kind_name
from dq_plugins.plan import DynamicActivationQuant, LayerPlan, QuantPlan
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.simulate import SimulateAdapter
from dq_plugins.timesteps import TimestepContext

FEWEST = dynamic_codes.__globals__["FEWEST"]
ONE, PER_SAMPLE, PER_TOKEN = [500.0], [100.0, 900.0, 500.0, 500.0], [[100.0, 500.0, 900.0, 900.0, 100.0]] * 4


def dynamic(plan: LayerPlan, bits: int = 8, symmetric: bool = True) -> LayerPlan:
    return replace(plan, activation=DynamicActivationQuant(bits, symmetric, 1.0 if bits == 8 else 0.7))


def dynamic_plan(plan: QuantPlan, symmetric: bool = True, bits: int = 8, by_group: bool = False) -> QuantPlan:
    for name in ("conv_in", "up", "down"):
        plan.layers[name] = dynamic(plan.layers[name], bits, symmetric)
        if by_group:
            plan.layers[name].activation = by_groups(symmetric)
    return plan


def by_groups(symmetric: bool) -> DynamicActivationQuant:
    """4 bits, 8 of them at timesteps from 300 to 700."""
    return DynamicActivationQuant(8, symmetric, 1.0, "all", (4, 8, 4), (0.7, 1.0, 0.8))


def made(bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    """A layer and rows whose ranges are orders of magnitude apart; one is constant, one is zero, one positive."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 24) * torch.logspace(-4, 3, 20).reshape(4, 5, 1)
    x[0, 0], x[1, 1], x[2, 2] = 0.0, 3.0, x[2, 2].abs()
    return nn.Linear(24, 10, bias=bias), x


def made_convolution(kind: str, bias: bool = True) -> tuple[nn.Module, torch.Tensor]:
    """A convolution and samples whose ranges are orders of magnitude apart; one is constant, one zero, one positive."""
    torch.manual_seed(0)
    layer, size = {
        "conv1d": (nn.Conv1d(8, 6, 3, padding=1, bias=bias), (9,)),
        "conv2d": (nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=bias), (7, 6)),
        "1x1": (nn.Conv2d(8, 6, 1, bias=bias), (7, 6)),
        "groups": (nn.Conv2d(8, 6, 3, padding="same", groups=2, bias=bias), (7, 6)),
        "circular": (nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular", bias=bias), (7, 6)),
        "conv3d": (nn.Conv3d(8, 6, (2, 3, 3), padding=(0, 1, 1), bias=bias), (3, 5, 4)),
        "transposed": (nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=bias), (5, 4)),
    }[kind]
    x = torch.randn(6, 8, *size) * torch.logspace(-4, 5, 6).reshape(6, 1, *[1] * len(size))
    x[0], x[1], x[2] = 0.0, 3.0, x[2].abs()
    return layer, x


def both(layer: nn.Module, plan: LayerPlan) -> tuple[IntegerLayer, nn.Module, TimestepContext]:
    context = TimestepContext({"all": GROUPS})
    integer, simulated = copy.deepcopy(layer), copy.deepcopy(layer)
    assert lower_layer(integer, plan, context).state == "integer"
    assert isinstance(integer, IntegerLayer)
    return integer, simulate_layer(simulated, plan, context), context


def agree(layer: nn.Module, plan: LayerPlan, x: torch.Tensor, timesteps: list, least: float = 100) -> None:
    integer, simulated, context = both(layer, plan)
    with torch.no_grad(), context.select(torch.tensor(timesteps)):
        expected, found = simulated(x), integer(x)
    assert found.dtype == expected.dtype
    last = 0 if not isinstance(layer, nn.Linear) else -2
    for row, other in zip(expected.flatten(0, last).double(), found.flatten(0, last).double(), strict=True):
        assert torch.equal(row, other) or sqnr(row, other) > least  # each row by itself: a loud one hides nothing


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("act_bits", "weight_bits"), [(8, 8), (8, 4), (6, 2), (4, 4), (2, 8)])
def test_integers_equal_the_simulation_in_every_row(act_bits, weight_bits, symmetric):
    layer, x = made()
    agree(layer, dynamic(layer_plan(layer, weight_bits=weight_bits), act_bits, symmetric), x, ONE)


@pytest.mark.parametrize("timesteps", [[100.0], ONE, PER_SAMPLE, PER_TOKEN], ids=["4", "8", "per-sample", "per-token"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_widths_by_group(symmetric, timesteps):
    layer, x = made()
    for plan in (layer_plan(layer), corrected(layer_plan(layer), layer)):
        agree(layer, replace(plan, activation=by_groups(symmetric)), x, timesteps)
    samples = timesteps if len(timesteps) == 1 else [100.0, 900.0, 500.0, 500.0, 100.0, 900.0]
    for kind in ("conv2d", "1x1"):
        layer, x = made_convolution(kind)
        agree(layer, replace(layer_plan(layer), activation=by_groups(symmetric)), x, samples)


@pytest.mark.parametrize("timesteps", [ONE, PER_SAMPLE, PER_TOKEN], ids=["batch", "per-sample", "per-token"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_balanced_channels_and_a_correction_by_group(symmetric, bias, timesteps):
    layer, x = made(bias)
    plan = corrected(layer_plan(layer), layer)
    agree(layer, dynamic(plan, 8, symmetric), x, timesteps)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "1x1", "groups", "circular", "conv3d", "transposed"])
@pytest.mark.parametrize("count", [6, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_convolutions_take_each_sample_by_its_own_range(symmetric, count, kind):
    for bias, bits in ((True, 8), (False, 4)):
        layer, x = made_convolution(kind, bias)
        plan = dynamic(replace(layer_plan(layer, weight_bits=bits), kind=kind_name(layer)), bits, symmetric)
        if kind == "transposed":
            plan = replace(plan, weight=replace(plan.weight, scale=plan.weight.scale.max().reshape(1)))
        for sample in x.split(count):
            # a constant sample with a zero point is a small difference of large float32 numbers
            agree(layer, plan, sample, ONE, least=100 if symmetric else 80)


@pytest.mark.parametrize("kind", ["conv2d", "1x1"])
@pytest.mark.parametrize("timesteps", [ONE, [100.0, 900.0, 500.0, 500.0, 100.0, 900.0]], ids=["batch", "per-sample"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_convolutions_with_balanced_channels_and_a_correction_by_group(symmetric, timesteps, kind):
    layer, x = made_convolution(kind)
    plan = dynamic(corrected(layer_plan(layer), layer), 8, symmetric)
    agree(layer, plan, x, timesteps)
    for sample, t in zip(x.split(1), timesteps * 6, strict=False):
        agree(layer, plan, sample, [t])


def test_a_sample_without_a_batch():
    layer, x = made_convolution("conv2d")
    integer, simulated, context = both(layer, dynamic(layer_plan(layer)))
    with context.select(500.0):
        for sample in x:
            assert torch.equal(integer(sample), integer(sample[None])[0])
            assert torch.equal(simulated(sample), simulated(sample[None])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dtypes(symmetric, dtype):
    layer, x = made()
    x = x.clamp(-100, 100)
    plan = dynamic(corrected(layer_plan(layer), layer), 8, symmetric)
    agree(layer.to(dtype), plan, x.to(dtype), ONE, least=90 if dtype == torch.float64 else 35)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 0, 24), (2, 3, 4, 24)])
def test_shapes(shape):
    layer, _ = made()
    x = torch.randn(shape)
    for plan in (layer_plan(layer), dynamic(layer_plan(layer))):
        integer, simulated, context = both(layer, plan)
        with context.select(500.0):
            torch.testing.assert_close(integer(x), simulated(x), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others_nor_on_the_timestep():
    layer, x = made()
    integer, _, _ = both(layer, dynamic(layer_plan(layer)))
    alone = torch.stack([integer(row) for row in x.flatten(0, 1)])  # outside of any call of a denoiser
    assert torch.equal(alone, integer(x).flatten(0, 1))


def test_nothing_is_stored_for_the_input():
    layer, _ = made()
    static, _, _ = both(layer, layer_plan(layer))
    integer, _, _ = both(layer, dynamic(layer_plan(layer)))
    assert set(static.state_dict()) - set(integer.state_dict()) == {"act_scale", "act_zero_point"}
    assert static.execution.scale_bytes - integer.execution.scale_bytes == 3 * (4 + 4)
    assert integer.execution.width == "W8A8 dynamic"
    assert "dynamic" in repr(integer)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return [model(x, torch.tensor(t)) for t in (*TIMESTEPS, [100.0, 900.0])]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("planned", [denoiser_plan, corrected_plan])
@pytest.mark.parametrize("by_group", [False, True])
def test_a_denoiser_agrees_with_simulation_and_comes_back_from_disk_bit_for_bit(by_group, planned, symmetric, tmp_path):
    model, simulated = build(), build()
    plan = dynamic_plan(planned(model), symmetric, by_group=by_group)
    SimulateAdapter().apply(simulated, plan)
    dq_torchao.apply(model, plan)
    expected = outputs(model)
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(simulated), expected, strict=True))
    dq_torchao.save(model, tmp_path)
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    report = dq_torchao.execution_report(loaded)
    assert report == dq_torchao.execution_report(model)
    assert report["up"].width == ("W8A4/8 dynamic" if by_group else "W8A8 dynamic")
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(loaded), strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("by_group", [False, True])
def test_without_the_kernel_the_layer_is_simulated(by_group, symmetric, tmp_path, monkeypatch):
    model = build()
    dq_torchao.apply(model, dynamic_plan(corrected_plan(model), symmetric, by_group=by_group))
    dq_torchao.save(model, tmp_path)
    monkeypatch.setattr(restoring, "kernel_for", lambda *_: Kernel("", "", "this processor cannot"))
    loaded = dq_torchao.load(build(seed=1), tmp_path)
    assert dq_torchao.execution_report(loaded)["up"].state == "simulated"
    assert all(sqnr(a, b) > 45 for a, b in zip(outputs(model), outputs(loaded), strict=True))


def test_too_many_bits_are_simulated_in_floating_point():
    model, simulated = build(), build()
    plan = dynamic_plan(denoiser_plan(model), bits=12)
    SimulateAdapter().apply(simulated, plan)
    dq_torchao.apply(model, plan)
    assert dq_torchao.execution_report(model)["up"].state == "simulated"
    assert all(sqnr(a, b) > 90 for a, b in zip(outputs(simulated), outputs(model), strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize(("freezing", "fewest"), [(False, FEWEST), (False, 0), (True, 0)])
def test_compiled_in_integers_without_recompiling(freezing, fewest, by_group, symmetric, monkeypatch):
    monkeypatch.setitem(dynamic_codes.__globals__, "FEWEST", fewest)  # of values that a kernel of ours takes
    model = build()
    dq_torchao.apply(model, dynamic_plan(corrected_plan(model), symmetric, by_group=by_group))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for t in (*TIMESTEPS, 120.0):
            assert sqnr(model(x, torch.tensor(t)), compiled(x, torch.tensor(t))) > 60
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(x, torch.tensor(500.0))
    assert counters["stats"]["unique_graphs"] == 1
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["onednn::qlinear_pointwise" if native.why_not() else "dq_torchao::product"] >= 2
    assert ("dq_torchao::dynamic_codes" in calls) == (fewest == 0 and not native.why_not())
    assert not any("pack" in name or "layout" in name for name in calls)


def test_a_layer_on_its_own_is_compiled_with_freezing_as_it_has_no_timestep():
    layer, x = made()
    integer, _, _ = both(layer, dynamic(layer_plan(layer)))
    torch.compiler.reset()
    with torch.no_grad(), inductor_config.patch(freezing=True):
        compiled = torch.compile(integer, fullgraph=True)
        torch.testing.assert_close(compiled(x), integer(x), rtol=1e-5, atol=1e-5)


def test_tuning_times_the_dynamic_form():
    model = Denoiser().requires_grad_(False)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}
    choices = dq_torchao.tune(model, dynamic_plan(denoiser_plan(model)), inputs)
    assert {"up", "down", "conv_in"} <= choices.keys()
