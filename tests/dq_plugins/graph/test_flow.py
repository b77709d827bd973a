from __future__ import annotations

import networkx as nx
import pytest
from odd_denoisers import Quarry

from dq_plugins.graph import partition
from dq_plugins.graph.flow import Flow


@pytest.fixture(scope="module")
def flow() -> Flow:
    return Flow(partition(Quarry(), Quarry.inputs()).graph, "noise_level", "noisy")


def node_of(flow: Flow, layer: str) -> str:
    return next(node for node in flow.layer_nodes() if flow.layer(node) == layer)


@pytest.mark.parametrize("edges", [("value", "writer"), ("writer", "value")])
def test_the_last_writer_of_an_operand_stands_for_it(edges):
    graph = nx.DiGraph()
    for name in ("value", "writer", "reader"):
        graph.add_node(name, depends=[], layer="")
    for source in edges:
        graph.add_edge(source, "reader", positions=[0])
    assert Flow(graph, "t", "x").operands("reader") == {0: "writer"}


def test_op_names_lose_namespace_overload_and_underscore(flow):
    ops = {flow.op(node) for node in flow.graph}
    assert {"input", "conv2d", "mul", "add", "silu", "getitem", "output"} <= ops


def test_depth_counts_layers_that_see_the_sample(flow):
    assert flow.depth[node_of(flow, "a")] == 1
    assert flow.depth[node_of(flow, "b.q")] == 3
    assert flow.depth[node_of(flow, "alpha.2")] == 0


def test_nearest_layers_on_both_sides(flow):
    back = flow.layers_before(flow.graph.predecessors(node_of(flow, "c")))
    assert {flow.layer(node) for node in back} == {
        "a",
        "b.q",
    }
    ahead = flow.layers_after(flow.graph.successors(node_of(flow, "m.back")), lambda node: True)
    assert {flow.layer(node) for node in ahead} == {"u"}


def test_pointwise_layers_have_no_reach(flow):
    reach = {layer: flow.is_pointwise(node_of(flow, layer)) for layer in ("b.film", "d.r", "b.q", "c")}
    assert reach == {"b.film": True, "d.r": True, "b.q": False, "c": False}
