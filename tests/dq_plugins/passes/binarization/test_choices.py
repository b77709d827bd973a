from __future__ import annotations

import pytest
import torch
from binary_models import tiny_denoiser, tiny_inputs
from torch import nn

import dq_plugins.graph as graph
from dq_plugins.errors import DQError
from dq_plugins.passes.binarization import binarydm_choices


@pytest.fixture(scope="module")
def part():
    return graph.partition(tiny_denoiser(), tiny_inputs())


def schemes(choices):
    return {name: choice.weight for name, choice in choices.layers.items()}


def test_two_bases_where_features_are_at_least_half_the_inputs_side(part):
    found = schemes(binarydm_choices(part))
    large = {
        f"{block}.{layer}" for block in ("down.0", "down.1", "up.0", "up.1") for layer in ("conv1", "time", "conv2")
    }
    assert {n for n, s in found.items() if s == "evolvable"} == large
    assert {n for n, s in found.items() if s == "binary"} == {"middle.conv1", "middle.time", "middle.conv2"}
    assert {n for n, s in found.items() if s == "int8"} == {"embed", "first", "last"}


def test_a_larger_least_side_moves_the_boundary(part):
    assert binarydm_choices(part, side_ratio=1.0).evolvable_blocks == ("down.0", "up.1")


def test_widths_of_edge_layers_and_of_the_rest(part):
    layers = binarydm_choices(part, 4).layers
    assert layers["middle.conv1"].act_bits == 4
    assert layers["first"].act_bits == layers["last"].act_bits == 8
    assert all(choice.act_bits is None for choice in binarydm_choices(part, None).layers.values())


def test_the_vanilla_baseline_has_one_basis_everywhere(part):
    baseline = binarydm_choices(part).with_vanilla_binarizer()
    assert set(schemes(baseline).values()) == {"binary", "int8"}
    assert baseline.evolvable_blocks == ()


def test_mimicked_blocks_are_those_that_take_the_timestep(part):
    assert binarydm_choices(part).blocks == ("down.0", "down.1", "middle", "up.0", "up.1")


class Tokens(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.embed, self.inp, self.out = nn.Linear(1, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(TokenBlock() for _ in range(depth))

    def forward(self, x, t):
        emb = self.embed(t.float().reshape(-1, 1)).unsqueeze(1)
        h = self.inp(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.out(h)


class TokenBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h, emb):
        return h + self.b(torch.relu(self.a(h) * emb))


def test_where_all_blocks_have_one_size_the_outer_quarters_have_two_bases():
    part = graph.partition(Tokens(8), {"x": torch.randn(2, 5, 4), "t": torch.tensor([1, 2])})
    assert binarydm_choices(part).evolvable_blocks == ("blocks.0", "blocks.1", "blocks.6", "blocks.7")


def test_a_denoiser_with_edges_only_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, t):
            return self.b(self.a(x) * t.reshape(-1, 1))

    with pytest.raises(DQError, match="only first and last"):
        binarydm_choices(graph.partition(Two(), {"x": torch.randn(2, 4), "t": torch.tensor([1.0, 2.0])}))
