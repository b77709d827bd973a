from __future__ import annotations

import copy
import pickle

import pytest
import torch
from dq_torchao.kernels import gelu as kernel
from dq_torchao.kernels import native
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no kernels of ours here")


class Feed(nn.Module):
    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.proj, self.approximate = nn.Linear(8, 4096), approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activate(self.proj(x))

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate)


@pytest.mark.parametrize("count", [kernel.FEWEST, kernel.FEWEST + 1, 3 * kernel.FEWEST + 15])
def test_as_exact_as_pytorchs(count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 4
    x[:6] = torch.tensor([0.0, -1e4, 1e4, -60.0, 1e-30, -1e-3])
    exact = F.gelu(x.double(), approximate="tanh")
    error = (kernel.gelu(x, "tanh") - exact).abs() / x.abs().clamp_min(1e-30)
    assert float(error.max()) < 5e-7
    assert not torch.equal(kernel.gelu(x, "tanh"), F.gelu(x, approximate="tanh"))  # ours did run


def test_not_a_number_and_infinity_stay():
    x = torch.zeros(kernel.FEWEST)
    x[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    y = kernel.gelu(x, "tanh")
    assert bool(y[0].isnan())
    assert float(y[1]) == float("inf")


@pytest.mark.parametrize(
    "x",
    [torch.randn(64, 1024).t(), torch.randn(2, 8), torch.randn(64, 1024).double(), torch.randn(64, 1024).bfloat16()],
    ids=["strided", "small", "float64", "bfloat16"],
)
def test_what_the_kernel_does_not_take_is_pytorchs(x):
    assert torch.equal(kernel.gelu(x, "tanh"), F.gelu(x, approximate="tanh"))


def test_gradients_are_pytorchs():
    x = torch.randn(64, 1024, requires_grad=True)
    kernel.gelu(x, "tanh").sum().backward()
    assert x.grad is not None


def test_modules_that_call_it_are_found_and_copied():
    model = nn.Sequential(Feed(), nn.Linear(4096, 4), nn.GELU(approximate="tanh"), nn.SiLU())
    model.requires_grad_(False)
    expected = model[0](torch.ones(8, 8))
    assert kernel.take_gelu(model) == ["0", "2"]
    assert kernel.take_gelu(model) == []
    assert type(model[0]).__name__ == "Feed"
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = each[0](torch.ones(8, 8))
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected)


def test_an_exact_gelu_stays():
    model = nn.Sequential(Feed("none"))
    x = torch.ones(8, 8)
    expected = model(x)
    kernel.take_gelu(model)
    assert torch.equal(model(x), expected)


def test_the_compiler_sees_the_original():
    model, x = nn.Sequential(Feed()), torch.ones(8, 8)
    kernel.take_gelu(model)
    targets = []

    def look(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=look, fullgraph=True)(x)
    assert F.gelu in targets
