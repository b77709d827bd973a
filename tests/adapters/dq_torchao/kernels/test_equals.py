from __future__ import annotations

import torch
from dq_torchao.kernels.equals import one_of_equals
from merged_graphs import OURS, targets
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

ATEN = torch.ops.aten


def changed(function, *arguments: Tensor) -> fx.GraphModule:
    graph = make_fx(function, tracing_mode="fake")(*arguments)
    one_of_equals(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def test_equal_calls_become_one_and_other_arguments_another() -> None:
    def codes(x: Tensor, bits: int) -> Tensor:
        made, scale, _ = OURS.dynamic_codes(x, None, bits, False, 1.0, 0, [])
        return made.float() * scale

    x = torch.randn(3, 8)
    graph = changed(lambda x: codes(x, 8) + codes(x, 8) - codes(x, 7), x)
    assert targets(graph).count(OURS.dynamic_codes.default) == 2
    assert targets(graph).count(ATEN.mul.Tensor) == 2


def test_what_is_random_or_returned_stays() -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        return torch.rand_like(x) - torch.rand_like(x), x.exp().view(-1), x.exp().view(-1)

    graph = changed(run, torch.ones(2, 3))
    assert targets(graph).count(ATEN.rand_like.default) == 2
    difference, first, second = graph(torch.ones(2, 3))
    assert difference.any()
    assert first.data_ptr() != second.data_ptr()


def test_what_is_changed_in_place_stays() -> None:
    def run(x: Tensor) -> Tensor:
        return x.add_(1) * x.add_(1)

    x = torch.zeros(2)
    assert changed(run, x)(torch.zeros(2)).tolist() == [4.0, 4.0]
