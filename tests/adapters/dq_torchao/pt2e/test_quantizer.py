from __future__ import annotations

import pytest
import torch
from dq_torchao.pt2e import TimestepX86Quantizer, shared_calibration
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao_models import Denoiser, sqnr

from dq_plugins.errors import CalibrationError, PlanError, TimestepError
from dq_plugins.plan import DynamicActivationQuant, QuantPlan
from dq_plugins.recipe import make_plan

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


def build() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(width=32).eval().requires_grad_(False)


def inputs(timestep: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(timestep))
    sample = torch.randn(2, 4, 8, 8, generator=generator) * (1 + timestep / 50)  # the range moves with t
    return {"sample": sample, "timestep": torch.tensor(timestep)}


def quantized(model: torch.nn.Module, **options: object) -> torch.fx.GraphModule:
    exported = torch.export.export(model, (), inputs(500.0)).module()
    prepared = prepare_pt2e(exported, TimestepX86Quantizer(**options))
    for t in TIMESTEPS:
        torch.testing.assert_close(prepared(**inputs(t)), model(**inputs(t)), rtol=1e-5, atol=1e-5)
    return convert_pt2e(prepared)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_group_is_close_to_full_precision(symmetric):
    model = build()
    graph = quantized(model, groups=5, symmetric=symmetric, min_inputs=1)
    for t in TIMESTEPS:
        assert sqnr(model(**inputs(t)), graph(**inputs(t))) > 33


def test_groups_follow_the_timestep():
    model = build()
    one, five = quantized(model, groups=1), quantized(model, groups=5)
    t = TIMESTEPS[-1]  # the smallest range
    assert sqnr(model(**inputs(t)), five(**inputs(t))) > 6 + sqnr(model(**inputs(t)), one(**inputs(t)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_with_freezing_it_runs_in_int8_at_every_timestep(symmetric):
    graph = quantized(build(), groups=5, symmetric=symmetric)
    eager = [graph(**inputs(t)) for t in TIMESTEPS]
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(freezing=True):
        compiled = torch.compile(graph, fullgraph=True)
        for expected, t in zip(eager, TIMESTEPS, strict=True):
            assert sqnr(expected, compiled(**inputs(t))) > 40
    # two linear layers and the last convolution; the others have fewer than 16 input channels
    assert counters["inductor"]["qlinear_unary_lower_count"] + counters["inductor"]["qlinear_binary_lower_count"] == 2
    assert counters["inductor"]["qconv_unary_lower_count"] == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_can_be_kept():
    model = build()
    targets = [str(n.target) for n in quantized(model, keep=["up", "down", "conv_out"]).graph.nodes]
    assert not any("quantize_per_tensor" in t for t in targets)


def test_graph_without_a_timestep_says_so():
    linear = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)).module()
    with pytest.raises(TimestepError, match="no input named 'like a timestep'"):
        prepare_pt2e(linear, TimestepX86Quantizer())


def test_conversion_without_calibration_says_so():
    exported = torch.export.export(build(), (), inputs(500.0)).module()
    with pytest.raises(CalibrationError, match="has not run"):
        convert_pt2e(prepare_pt2e(exported, TimestepX86Quantizer()))


def test_ranges_per_token_are_refused_by_name(monkeypatch):
    def dynamic(*args: object, **options: object) -> QuantPlan:
        plan = make_plan(*args, **options)
        plan.layers["0"].activation = DynamicActivationQuant(8)
        return plan

    monkeypatch.setattr(shared_calibration, "make_plan", dynamic)
    with pytest.raises(PlanError, match=r"'PT2E' does not implement dynamic_ranges \(layer '0'\)"):
        quantized(build())


class Twice(torch.nn.Module):
    """Three layers read one input, and the timestep is embedded twice, by the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.q, self.k, self.out = (torch.nn.Linear(16, 16) for _ in range(4))

    def embed(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.time(timestep / 1000 * torch.ones(32, 16))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = sample + self.embed(timestep)
        return self.out(self.q(h) * self.k(h)) + self.embed(timestep)


def test_equal_inputs_are_quantized_once_and_no_layer_falls_back():
    torch.manual_seed(0)
    model = Twice().eval().requires_grad_(False)
    calls = [{"sample": torch.randn(32, 16), "timestep": torch.tensor(t)} for t in TIMESTEPS]
    exported = torch.export.export(model, (), calls[0]).module()
    prepared = prepare_pt2e(exported, TimestepX86Quantizer(groups=5))
    for call in calls:
        prepared(**call)
    graph = convert_pt2e(prepared)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("quantize_per_tensor.tensor" in t and "dequantize" not in t for t in targets) == 3  # time, q and k, out
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(freezing=True):
        compiled = torch.compile(graph, fullgraph=True)
        for call in calls:
            assert sqnr(model(**call), compiled(**call)) > 30
    assert counters["inductor"]["qlinear_unary_lower_count"] + counters["inductor"]["qlinear_binary_lower_count"] == 4
