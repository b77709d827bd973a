"""One selection for all layers of a denoiser that is compiled with its weights frozen."""

from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from attention_models import RECIPE, SCHEDULE, attention_denoiser, attention_inputs, attention_plan
from dq_torchao.columns import _firsts
from dq_torchao.timestep_state import NAME
from torch import fx
from torch._inductor import config as inductor_config

import dq_plugins as dq


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> dq.QuantPlan:
    return attention_plan(attention_denoiser(), tmp_path_factory.mktemp("calib"), RECIPE)


def traced(model: torch.nn.Module, timesteps: list[float], *, freezing: bool = True) -> list[fx.GraphModule]:
    """The graphs of a model compiled by a backend that runs them as they are; their results are the model's."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(freezing=freezing):
        compiled = torch.compile(model, backend=keep, fullgraph=True)
        for t in timesteps:
            inputs = attention_inputs(t)
            expected, found = model(**inputs), compiled(**inputs)
            assert float((found - expected).norm() / expected.norm()) < 1e-3
    return graphs


def selections(graph: fx.GraphModule) -> int:
    return sum(node.target == "index_select" for node in graph.graph.nodes)


def test_a_frozen_graph_selects_once_for_all_layers(plan) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    (frozen,) = traced(model, SCHEDULE)
    (plain,) = traced(model, SCHEDULE, freezing=False)
    modules = sum(len(names) for names in getattr(model, NAME).columns.values())
    assert modules > 3
    assert selections(frozen) == 2  # scales, and zero points
    assert selections(plain) == 2 * modules


def test_equal_columns_are_taken_from_the_first() -> None:
    scale = torch.tensor([[1.0, 2.0, 1.0, 1.0], [3.0, 4.0, 3.0, 5.0]])
    zero_point = torch.zeros((2, 4), dtype=torch.int32)
    assert _firsts(scale, zero_point) == [0, 1, 0, 3]
    zero_point[1, 2] = 7
    assert _firsts(scale, zero_point) == [0, 1, 2, 3]


def test_columns_follow_copies_and_checkpoints(plan, tmp_path) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    copied = copy.deepcopy(model)
    loaded = dq_torchao.load(attention_denoiser(seed=1), dq_torchao.save(model, tmp_path))
    for other in (copied, loaded):
        assert {*map(frozenset, getattr(other, NAME).columns.values())} == {
            *map(frozenset, getattr(model, NAME).columns.values())
        }
        assert selections(traced(other, SCHEDULE[:1])[0]) == 2


def test_a_replaced_layer_and_new_values_are_not_missed(plan) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    site = model.get_submodule("near.quantized_attention.query")
    with torch.no_grad():
        site.scale.mul_(4)  # a table that changed after the columns were given out
    traced(model, SCHEDULE)
    name = "far.quantized_attention.query"
    other = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    parent.query = copy.copy(other)  # not the module that has the column in the list
    parent.query.column = site.column
    traced(model, SCHEDULE)
