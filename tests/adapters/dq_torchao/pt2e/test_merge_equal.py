from __future__ import annotations

import torch
from dq_torchao.pt2e.quantizer import merge_equal
from torch import nn


class Repeats(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.layer, self.inplace = nn.Linear(4, 4), inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layer(x), self.layer(x)
        if self.inplace:
            first.relu_()
        return first * 2 + second + torch.rand_like(x) + torch.rand_like(x)


def exported(**options: bool) -> torch.fx.GraphModule:
    return torch.export.export(Repeats(**options), (torch.ones(2, 4),)).module()


def count(model: torch.fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in model.graph.nodes)


def test_equal_nodes_are_merged_and_random_ones_are_not():
    merged = merge_equal(exported())
    assert (count(merged, "aten.linear"), count(merged, "aten.rand_like")) == (1, 2)


def test_a_merged_graph_computes_the_same():
    model = exported()
    torch.manual_seed(0)
    expected = model(torch.ones(2, 4))
    torch.manual_seed(0)
    torch.testing.assert_close(merge_equal(model)(torch.ones(2, 4)), expected, rtol=0, atol=0)


def test_a_graph_that_writes_in_place_is_left_alone():
    assert count(merge_equal(exported(inplace=True)), "aten.linear") == 2
