from __future__ import annotations

import networkx as nx
import pytest

from dq_plugins.errors import TraceError
from dq_plugins.graph.signatures import classify, find_sample_argument


@pytest.mark.parametrize(
    ("depends", "expected"),
    [
        ({"t"}, "temporal"),
        ({"text"}, "condition"),
        ({"extra.ids.0", "extra.text"}, "condition"),
        ({"t", "extra.ids"}, "mixed"),
        ({"t", "x"}, "sample"),
        ({"x.0", "x.1"}, "sample"),
        (set(), "constant"),
    ],
)
def test_signature_of_a_set_of_inputs(depends, expected):
    assert classify(depends, timestep="t", sample="x") == expected


def graph_of(inputs: dict[str, list[int]], output: list[int], reaching: list[str]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for name, shape in inputs.items():
        graph.add_node(f"input:{name}", op="input", depends=[name], shape=shape)
    graph.add_node("op", op="aten.op", depends=reaching, shape=output)
    graph.add_node("second", op="aten.op", depends=[], shape=[1])
    graph.add_node("output", op="output", depends=reaching, shape=None)
    graph.add_edge("second", "output", positions=[1])
    graph.add_edge("op", "output", positions=[0])
    return graph


def test_the_sample_is_the_first_that_reaches_the_output_and_has_its_shape():
    shapes = {"t": [2, 3, 8, 8], "text": [2, 7, 5], "mask": [2, 3, 8, 8], "x": [2, 3, 8, 8], "y": [2, 3, 8, 8]}
    assert find_sample_argument(graph_of(shapes, [2, 3, 8, 8], ["t", "text", "x", "y"]), "t") == "x"


def test_an_exact_shape_comes_before_one_with_other_channels():
    shapes = {"hint": [2, 1, 8, 8], "x": [2, 3, 8, 8]}
    assert find_sample_argument(graph_of(shapes, [2, 3, 8, 8], ["hint", "x"]), "t") == "x"
    assert find_sample_argument(graph_of(shapes, [2, 6, 8, 8], ["hint", "x"]), "t") == "hint"


def test_a_sample_in_a_list_goes_by_the_name_of_the_list():
    shapes = {"x.0": [3, 8, 8], "x.1": [3, 8, 8]}
    assert find_sample_argument(graph_of(shapes, [3, 8, 8], ["x.0", "x.1"]), "t") == "x"


def test_a_given_sample_is_taken_or_refused():
    graph = graph_of({"x": [2, 3], "y": [2, 3], "text": [2, 5, 5]}, [2, 3], ["x", "y"])
    assert find_sample_argument(graph, "t", "y") == "y"
    with pytest.raises(TraceError, match=r"'text' was given.*x, y"):
        find_sample_argument(graph, "t", "text")


def test_an_argument_of_another_shape_is_taken_where_there_is_no_better():
    assert find_sample_argument(graph_of({"text": [2, 5, 5]}, [2, 3], ["text"]), "t") == "text"


def test_no_candidate_lists_the_shapes():
    with pytest.raises(TraceError, match=r"none of floating point reaches the output.*text \(2, 5, 5\)"):
        find_sample_argument(graph_of({"t": [2], "text": [2, 5, 5]}, [2, 3], ["t"]), "t")
