from __future__ import annotations

import copy
import pickle

import dq_torchao
import pytest
import torch
from dq_torchao.kernels import native
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_
from torchao_models import TIMESTEPS, build, denoiser_plan, sqnr

import dq_plugins.quantized.simulate
from dq_plugins.errors import PlanError
from dq_plugins.plan import LayerPlan, Reason
from dq_plugins.quantized.table_lookup import tabulated
from dq_plugins.testing.adapter_conformance import AdapterConformance
from dq_plugins.timesteps import TimestepGroups


class TestConformance(AdapterConformance):
    name = "torchao"


def batch(timestep: float | list[float], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor(timestep)
    return {"sample": torch.randn(2, 4, 8, 8, generator=generator), "timestep": t}


def test_every_timestep_agrees_with_simulation():
    model, reference = build(), build()
    plan = denoiser_plan(model)
    dq_torchao.apply(model, plan)
    dq_plugins.quantized.simulate.SimulateAdapter().apply(reference, plan)
    for timestep in (*TIMESTEPS, [100.0, 900.0]):
        assert sqnr(reference(**batch(timestep)), model(**batch(timestep))) > 45


def test_one_group_equals_the_static_quantizer_bit_for_bit():
    model, one = build(), build()
    plan = denoiser_plan(model)
    static = denoiser_plan(one, TimestepGroups())
    dq_torchao.apply(model, plan)
    dq_torchao.apply(one, static)
    assert torch.equal(model(**batch(100.0)), one(**batch(100.0)))  # the one group holds the first group's range
    assert not torch.equal(model(**batch(900.0)), one(**batch(900.0)))


def test_one_group_is_torchaos_static_quantizer():
    torch.manual_seed(0)
    ours, stock = nn.Sequential(nn.Linear(32, 16)), nn.Sequential(nn.Linear(32, 16))
    stock.load_state_dict(ours.state_dict())

    def forward(self: nn.Module, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self[0](x)

    class Wrapped(nn.Sequential):
        pass

    Wrapped.forward = forward  # type: ignore[assignment]
    ours = Wrapped(*ours)
    plan = denoiser_plan(ours, TimestepGroups(), symmetric=True)
    scale = plan.layers["0"].activation.scale
    config = Int8StaticActivationInt8WeightConfig(
        act_quant_scale=scale.reshape(1, 1), granularity=[PerTensor(), PerRow()], set_inductor_config=False
    )
    quantize_(stock, config)
    plan.layers["0"].weight.scale = stock[0].weight.scale.flatten().clone()
    dq_torchao.apply(ours, plan)
    x = torch.randn(5, 32) * 3
    torch.testing.assert_close(ours(x, timestep=torch.tensor(3.0)), stock(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("freezing", [False, True])
def test_compiled_graph_selects_every_group_without_recompiling(freezing):
    model = build()
    dq_torchao.apply(model, denoiser_plan(model))
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        for timestep in (*TIMESTEPS, 120.0):
            assert sqnr(model(**batch(timestep)), compiled(**batch(timestep))) > 60
    assert counters["stats"]["unique_graphs"] == 1


def test_regions_compiled_alone_select_every_group_without_recompiling():
    model = build()
    dq_torchao.apply(model, denoiser_plan(model))
    eager = {t: model(**batch(t)) for t in TIMESTEPS}
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        model.up.compile(fullgraph=True)
        model.conv_out.compile(fullgraph=True)
        for t in (*TIMESTEPS, *TIMESTEPS):
            assert sqnr(eager[t], model(**batch(t))) > 60
    assert counters["stats"]["unique_graphs"] == 2


def test_a_region_does_not_freeze_the_group_of_one_call():
    model = build()
    dq_torchao.apply(model, denoiser_plan(model))
    torch.compiler.reset()
    model.up.compile(fullgraph=True)
    with torch.no_grad(), inductor_config.patch(freezing=True), pytest.raises(Exception, match="freezing"):
        model(**batch(500.0))


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("compiler", [False, True])
def test_compiled_model_runs_the_integer_kernels(freezing, compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(native, "why_not", lambda: "as it is without a compiler")
    model = build()
    dq_torchao.apply(model, denoiser_plan(model))
    torch.compiler.reset()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model)
        compiled(**batch(500.0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(**batch(100.0))
    calls = {event.key: event.count for event in profile.key_averages()}
    if native.why_not():
        assert (calls["onednn::qlinear_pointwise"], calls["onednn::qconv_pointwise"]) == (2, 2)
    else:
        assert calls["dq_torchao::product"] == 4
    assert "aten::convolution" not in calls
    assert not any("pack" in name or "layout" in name for name in calls)  # weights are laid out once


def test_copies_are_independent_and_pickle():
    model = build()
    dq_torchao.apply(model, denoiser_plan(model))
    expected = [model(**batch(t)) for t in TIMESTEPS]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.up.context is not model.up.context
        assert all(torch.equal(clone(**batch(t)), e) for t, e in zip(TIMESTEPS, expected, strict=True))


def test_report_says_how_each_layer_runs_and_why():
    model = build()
    plan = denoiser_plan(model)
    plan.layers["down"].weight.bits = 16
    plan.layers["conv_out"] = LayerPlan("conv2d", unquantized_reason=Reason("it makes the image"))
    report = dq_torchao.execution_report(dq_torchao.apply(model, plan))
    assert list(report) == ["time", "conv_in", "up", "down", "conv_out"]
    assert (report["up"].state, report["up"].width, report["up"].compute) == (
        "integer",
        "W8A8",
        "uint8 x int8 -> int32",
    )
    assert report["up"].kernel
    assert (report["up"].bits, report["up"].bytes) == (8, 8 * 32)
    assert report["up"].scale_bytes == 4 * 32 + (4 + 4) * 3  # of the weight, and of three groups of activations
    assert (report["conv_out"].bits, report["conv_out"].bytes) == (32, 4 * 8 * 4 * 9)
    assert (report["down"].state, report["down"].reason) == ("simulated", "W16A8 does not fit int8")
    assert (report["conv_out"].state, report["conv_out"].reason) == ("full precision", "it makes the image")


def test_plan_of_another_model_is_refused():
    with pytest.raises(PlanError, match="other weights"):
        dq_torchao.apply(build(seed=1), denoiser_plan(build(seed=0)))


def test_a_quantized_denoiser_is_refused():
    model = build()
    plan = denoiser_plan(model)
    dq_torchao.apply(model, plan)
    with pytest.raises(PlanError, match="quantized already"):
        dq_torchao.apply(model, plan)


def test_temporal_table_replaces_its_layers():
    model, reference = build(), build()
    plan = denoiser_plan(model)
    t = torch.tensor(TIMESTEPS)
    rows = {"time": reference.time(t[:, None] / 1000)}
    plan.temporal_table = tabulated(TIMESTEPS, rows, [])
    plan.layers["time"] = LayerPlan("linear", unquantized_reason=Reason("looked up in the temporal table"))
    dq_torchao.apply(model, plan)
    dq_plugins.quantized.simulate.SimulateAdapter().apply(reference, denoiser_plan(reference))
    execution = dq_torchao.execution_report(model)["time"]
    assert (execution.kernel, execution.reason) == ("temporal table", "looked up in the temporal table")
    assert sqnr(reference(**batch(500.0)), model(**batch(500.0))) > 45
