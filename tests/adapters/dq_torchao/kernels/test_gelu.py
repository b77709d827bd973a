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


FORMS = ("tanh", "none")


def some(count: int) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 4
    x[:6] = torch.tensor([0.0, -1e4, 1e4, -60.0, 1e-30, -1e-3])
    return x


def assert_exact(y: torch.Tensor, x: torch.Tensor, form: str) -> None:
    error = (y - F.gelu(x.double(), approximate=form)).abs() / x.abs().clamp_min(1e-30)
    assert float(error.max()) < 5e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [kernel.FEWEST, kernel.FEWEST + 1, 3 * kernel.FEWEST + 15])
def test_as_exact_as_pytorchs(count, form):
    x = some(count)
    assert_exact(kernel.gelu(x, form), x, form)
    assert not torch.equal(kernel.gelu(x, form), F.gelu(x, approximate=form))  # ours did run


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_and_infinity_stay(form):
    x = torch.zeros(kernel.FEWEST)
    x[:3] = torch.tensor([float("nan"), float("inf"), 1e30])
    torch._dynamo.reset()
    for run in (kernel.gelu, torch.compile(kernel.gelu)):
        y = run(x, form)
        assert bool(y[0].isnan())
        assert y[1:3].tolist() == x[1:3].tolist()


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


@pytest.mark.parametrize("form", FORMS)
def test_a_compiler_gets_operations_that_it_merges_into_a_loop(form):
    model, x = nn.Sequential(Feed(form)), torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    kernel.take_gelu(model)
    targets = []

    def look(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=look, fullgraph=True)(x), model(x))
    assert F.gelu not in targets
    torch._dynamo.reset()
    x = some(3000)
    assert_exact(torch.compile(kernel.gelu, fullgraph=True)(x, form), x, form)
