from __future__ import annotations

import pytest
import torch
from odd_denoisers import TwoLayers
from torch.nn.attention.flex_attention import flex_attention

from dq_plugins.errors import TraceError
from dq_plugins.graph import trace
from dq_plugins.graph.reading import shape_of, without_prefix


class Chooses(TwoLayers):
    def forward(self, x, t):
        return torch.cond(x.sum() > 0, lambda a: self.body(a), lambda a: a * 2, (x,)) + self.time(t)


class Bends(TwoLayers):
    def forward(self, x, t):
        q, k = self.body(x)[None, None], self.time(t)[None, None]
        return flex_attention(q, k, k, score_mod=lambda score, b, h, i, j: score + (i - j))[0, 0]


def test_layers_in_a_branch_that_values_choose_are_refused():
    with pytest.raises(TraceError, match="runs layers inside of 'cond'"):
        trace(Chooses(), TwoLayers.inputs())


def test_an_attention_with_a_score_function_is_one_op():
    graph = trace(Bends(), TwoLayers.inputs())
    (attention,) = [d for d in graph.nodes.values() if d["kind"] == "attention"]
    assert attention["depends"] == ["t", "x"]
    assert attention["macs"] == 2 * 2 * (4 + 4)
    assert {d["layer"] for d in graph.nodes.values()} == {"", "body", "time"}


def test_names_lose_the_wrapper_and_the_call_number():
    assert without_prefix("denoiser.block.0@1") == "block.0"
    assert without_prefix("denoiser.denoiser.weight") == "denoiser.weight"
    assert without_prefix("denoiser") == ""


def test_sizes_of_scalars_lists_and_nothing():
    scalar, row = torch.tensor(1.0), torch.zeros(2, 3)
    assert (shape_of(scalar), shape_of([row]), shape_of(None)) == ([], None, None)
