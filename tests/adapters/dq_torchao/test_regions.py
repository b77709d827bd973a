from __future__ import annotations

import pytest
import torch
from dq_torchao.regions import compile_regions, repeated_blocks
from torch import nn
from torch._dynamo.utils import counters

from dq_plugins.errors import DQError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers[1](self.layers[0](x).relu())


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.others = nn.ModuleList([nn.Identity(), nn.Identity(), nn.LayerNorm(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.others[2](x)


def test_blocks_within_blocks_and_empty_ones_are_left_out():
    assert repeated_blocks(Stack(3)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_blocks_of_a_kind_share_one_graph():
    torch.compiler.reset()
    counters.clear()
    model, x = Stack(4).eval(), torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
        assert len(compile_regions(model, backend="eager")) == 4
        torch.testing.assert_close(model(x), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_denoiser_that_repeats_nothing_is_refused():
    with pytest.raises(DQError, match="no repeated blocks"):
        compile_regions(nn.Sequential(nn.Linear(2, 2)))
