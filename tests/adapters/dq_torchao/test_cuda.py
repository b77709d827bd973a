from __future__ import annotations

import copy
import itertools

import dq_torchao
import pytest
import torch
from dq_torchao.lowering import lower_layer
from torch import nn
from torchao_models import GROUPS, TIMESTEPS, Denoiser, denoiser_plan, layer_plan, sqnr

from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import TimestepContext

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

WINDOWS = [
    window
    for window in itertools.product((1, 3, (3, 1)), (1, 2), (0, 1, (2, 1), "same"), (1, 2))
    if window[2] != "same" or window[1] == 1  # PyTorch has no "same" padding with strides
]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def check(layer: nn.Module, x: torch.Tensor, timestep: torch.Tensor, **options: bool | int) -> None:
    """The GPU's integer layer agrees with the simulation on the CPU."""
    plan = layer_plan(layer, **options)
    context, cuda_context = (TimestepContext({"all": GROUPS}) for _ in range(2))
    simulated = simulate_layer(copy.deepcopy(layer), plan, context)
    integer = copy.deepcopy(layer).cuda()
    assert lower_layer(integer, plan, cuda_context).state == "integer"
    with context.select(timestep), cuda_context.select(timestep.cuda()):
        torch.testing.assert_close(integer(x.cuda()).cpu(), simulated(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("timestep", [torch.tensor(500.0), torch.tensor([100.0, 800.0])], ids=["batch", "per-sample"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), WINDOWS)
@pytest.mark.parametrize("groups", [1, 2])
def test_integer_conv_equals_simulation(kernel, stride, padding, dilation, groups, timestep):
    torch.manual_seed(0)
    check(nn.Conv2d(8, 16, kernel, stride, padding, dilation, groups), torch.randn(2, 8, 7, 9) * 4, timestep)


@pytest.mark.parametrize("timestep", [torch.tensor(500.0), torch.tensor([100.0, 800.0])], ids=["batch", "per-sample"])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 10), (7, 5), (256, 384)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integer_linear_equals_simulation(inputs, outputs, symmetric, timestep):
    torch.manual_seed(0)
    check(nn.Linear(inputs, outputs), torch.randn(2, 5, inputs) * 4, timestep, symmetric=symmetric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 48, 3, padding=1)
    plan, context = layer_plan(layer), TimestepContext({"all": GROUPS})
    integer, reference = copy.deepcopy(layer).cuda().to(dtype), simulate_layer(copy.deepcopy(layer), plan, context)
    lower_layer(integer, plan, context)
    with context.select(torch.tensor(500.0)):
        x = torch.randn(2, 32, 9, 9).to(dtype)
        y = integer(x.cuda())
        assert y.dtype == dtype
        assert sqnr(reference(x.float()), y.float().cpu()) > 35


def test_compiled_graph_selects_every_group_without_recompiling():
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False).cuda()
    dq_torchao.apply(model, denoiser_plan(model))
    assert {e.state for e in dq_torchao.execution_report(model).values()} == {"integer", "full precision"}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        for timestep in (*TIMESTEPS, 120.0):
            inputs = {"sample": torch.randn(2, 4, 8, 8).cuda(), "timestep": torch.tensor(timestep).cuda()}
            assert sqnr(model(**inputs), compiled(**inputs)) > 50
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
