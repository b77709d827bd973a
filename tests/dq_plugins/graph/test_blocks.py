from __future__ import annotations

import torch
import torch.nn.functional as F
from odd_denoisers import Obelisk, Quarry
from torch import nn

from dq_plugins.graph import partition
from dq_plugins.graph.blocks import block_of


def test_blocks_are_where_residual_connections_close():
    layers = partition(Quarry(), Quarry.inputs()).layers
    assert {name: info.block for name, info in layers.items()} == {
        name: name[0] if name[0] in "bdfm" else "" for name in layers
    }


def test_adding_two_halves_of_one_output_closes_no_residual_connection():
    layers = partition(Obelisk(), Obelisk.inputs()).layers
    assert layers["slabs.0.qkv"].block == layers["slabs.0.mod"].block == "slabs.0"
    assert layers["when"].block == layers["leave"].block == ""


class Turning(nn.Module):
    """Adds two rearrangements of one output, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        q = self.inner(x)
        return q * 0.5 + q.roll(1, -1) * 0.5


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turning = Turning()
        self.time = nn.Linear(4, 4)

    def forward(self, x, t):
        return x + F.silu(self.turning(x) * self.time(t))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()

    def forward(self, x, t):
        return self.outer(x, t)


def test_a_rotation_inside_of_a_block_is_no_block():
    layers = partition(Model(), {"x": torch.zeros(2, 4), "t": torch.zeros(2, 4)}).layers
    assert {name: info.block for name, info in layers.items()} == {
        "outer.turning.inner": "outer",
        "outer.time": "outer",
    }


def test_the_innermost_closing_module_counts():
    assert block_of("a.b.c", {"a", "a.b"}) == "a.b"
    assert block_of("a.bc", {"a.b"}) == ""
    assert block_of("", {"a"}) == ""
