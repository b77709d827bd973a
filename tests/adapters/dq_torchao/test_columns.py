"""One selection for all layers of a denoiser that is compiled as a whole."""

from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from attention_models import RECIPE, SCHEDULE, attention_denoiser, attention_inputs, attention_plan
from dq_torchao.columns import _ranks, _table
from dq_torchao.kernels.attention import int8_attention
from dq_torchao.timestep_state import NAME
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import dq_plugins as dq
from dq_plugins.errors import DQError


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> dq.QuantPlan:
    return attention_plan(attention_denoiser(), tmp_path_factory.mktemp("calib"), RECIPE)


def traced(model: torch.nn.Module, timesteps: list[float], *, freezing: bool = False) -> list[fx.GraphModule]:
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
    assert "index_select" not in {node.target for node in graph.graph.nodes}
    return sum(node.target == torch.ops.dq_torchao.columns for node in graph.graph.nodes)


@pytest.mark.parametrize("freezing", [False, True])
def test_a_graph_selects_once_for_all_layers(plan, freezing) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    (graph,) = traced(model, SCHEDULE, freezing=freezing)
    assert sum(len(names) for names in getattr(model, NAME).columns.values()) > 3
    assert selections(graph) == 1


def test_attention_takes_codes_in_a_graph(plan) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    (graph,) = traced(model, SCHEDULE)
    attentions = [node for node in graph.graph.nodes if node.target == int8_attention]
    assert len(attentions) == 2
    operands = [node.meta["example_value"] for attention in attentions for node in attention.args[:3]]
    assert {x.dtype for x in operands} == {torch.uint8}


@pytest.mark.parametrize("length", [1, 2])
def test_a_group_is_selected_from_all_tables(length) -> None:
    index = torch.tensor([1])
    scales = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])[:length], torch.tensor([4.0, 2.0])]
    zero_points = [torch.full((len(scale),), 5 * len(scale), dtype=torch.int32) for scale in scales]
    columns = torch.ops.dq_torchao.columns(index, scales, zero_points, [0, 1, 0], 128)
    zero = 5 * length
    assert torch.cat(columns).tolist() == pytest.approx([2.0, 3.0, 0.5, 1 / 3, 138, zero + 128])
    assert [x.dtype for x in columns] == [torch.float32] * 4 + [torch.int32] * 2
    assert all(x.shape == (1,) and x.data_ptr() % 16 == 0 for x in columns)
    with pytest.raises(DQError, match="compile it again"):
        torch.ops.dq_torchao.columns(index - 1, scales, zero_points, [0, 1, 0], 128)


def test_equal_columns_have_the_same_rank() -> None:
    scales = [torch.tensor(column) for column in ([1.0, 3.0], [2.0, 4.0], [1.0, 3.0], [1.0, 5.0])]
    zero_points = [torch.zeros(2, dtype=torch.int32) for _ in scales]
    assert _ranks(*scales, *zero_points) == [0, 1, 0, 2]
    zero_points[2][1] = 7
    assert _ranks(*scales, *zero_points) == [0, 1, 2, 3]


def test_columns_follow_copies_and_checkpoints(plan, tmp_path) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    copied = copy.deepcopy(model)
    loaded = dq_torchao.load(attention_denoiser(seed=1), dq_torchao.save(model, tmp_path))
    for other in (copied, loaded):
        assert {*map(frozenset, getattr(other, NAME).columns.values())} == {
            *map(frozenset, getattr(model, NAME).columns.values())
        }
        assert selections(traced(other, SCHEDULE[:1])[0]) == 1


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


def test_a_graph_follows_other_ranges_and_says_where_it_cannot(plan) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    names = next(names for names in getattr(model, NAME).columns.values() if len(names) > 3)
    scales = [_table(model.get_submodule(name))[0] for name in names]
    alike = next(group for group in ([b for b in scales if torch.equal(a, b)] for a in scales) if len(group) > 1)
    inputs = attention_inputs(SCHEDULE[0])
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        before = compiled(**inputs)
        for scale in alike:
            scale.mul_(3)
        after = compiled(**inputs)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, model(**inputs), rtol=1e-3, atol=1e-3)
        alike[0].mul_(2)
        with pytest.raises(DQError, match="compile it again"):
            compiled(**inputs)


def test_other_batches_compile_once_more(plan) -> None:
    model = dq_torchao.apply(attention_denoiser(), plan, uniform_timesteps=True)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        for batch in (3, 4, 5):  # of any size from the second on
            inputs = attention_inputs(SCHEDULE[0], batch)
            torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 2
