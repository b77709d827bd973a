from __future__ import annotations

import torch
from odd_denoisers import Obelisk, Quarry, TwoLayers
from torch import nn

from dq_plugins.graph import BoundaryTensor, partition


def boundary(model: nn.Module, inputs: dict) -> dict[str, BoundaryTensor]:
    return {tensor.layer or tensor.node: tensor for tensor in partition(model, inputs).block_boundary}


def test_the_boundary_of_a_unet_is_one_tensor_per_block():
    tensors = boundary(Quarry(), Quarry.inputs())
    assert list(tensors) == ["b.film", "d.film", "f.film"]
    b = tensors["b.film"]
    assert (b.module, b.signature, b.shape) == ("b.film", "temporal", (2, 16))
    assert b.reaches == {"sample"}
    assert b.consumer_layers == ("b.q",)
    assert b.upstream == {"alpha.0", "alpha.2", "b.film"}


def test_cutting_the_boundary_leaves_the_rest_independent_of_time():
    part = partition(Quarry(), Quarry.inputs())
    graph = part.graph.copy()
    graph.remove_nodes_from([tensor.node for tensor in part.block_boundary])
    reached = {graph.nodes[n]["layer"] for n in _descendants(graph, "input:noise_level")} - {""}
    assert reached == {"alpha.0", "alpha.2"}


def _descendants(graph, node: str) -> set[str]:
    import networkx as nx

    return nx.descendants(graph, node)


def test_time_alone_and_time_with_conditions_are_told_apart():
    tensors = boundary(Obelisk(), Obelisk.inputs())
    assert {name: tensor.signature for name, tensor in tensors.items()} == {
        "when": "temporal", "slabs.0.mod": "mixed", "slabs.1.mod": "mixed",
    }  # fmt: skip
    assert tensors["when"].reaches == {"mixed", "sample"}
    assert tensors["when"].consumer_layers == ("slabs.0.mod", "slabs.1.mod", "leave")
    assert tensors["slabs.1.mod"].reaches == {"sample"}
    assert tensors["slabs.1.mod"].consumer_layers == ("slabs.1.qkv", "slabs.1.one")
    assert tensors["slabs.1.mod"].upstream == {"when", "what", "slabs.1.mod"}


class Merged(TwoLayers):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)

    def forward(self, x, t):
        return self.body(x) * (1 + (self.time(t) + self.second(t)).tanh())


def test_where_two_embeddings_meet_the_sum_is_the_tensor():
    (tensor,) = partition(Merged(), TwoLayers.inputs()).block_boundary
    assert tensor.layer == ""
    assert tensor.node.startswith("add")
    assert tensor.upstream == {"time", "second"}


class Bare(TwoLayers):
    def forward(self, x, t):
        return self.body(x / torch.sqrt(1 + t**2)) + self.time(t)


def test_a_bare_function_of_time_has_no_layer_behind_it():
    bare, embedded = sorted(
        partition(Bare(), TwoLayers.inputs()).block_boundary, key=lambda tensor: len(tensor.upstream)
    )
    assert bare.node.startswith("sqrt")  # the value that meets the sample, not the first thing made of t
    assert (bare.layer, bare.upstream, bare.consumer_layers) == ("", frozenset(), ("body",))
    assert embedded.layer == "time"
