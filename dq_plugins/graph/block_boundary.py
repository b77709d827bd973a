"""The boundary of the temporal block: the tensors through which the timestep reaches the rest of the denoiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import networkx as nx

from dq_plugins.graph.blocks import block_of, closing_modules
from dq_plugins.graph.flow import Flow
from dq_plugins.graph.signatures import Signature


@dataclass(frozen=True)
class BoundaryTensor:
    """One tensor that carries the timestep out of the modules that do not see the sample.

    Attributes:
        node: the op that computes it, in the dependency graph.
        layer: the layer whose output it is, ``""`` where it is computed by something else (the sum of two
            embeddings, the bare timestep).
        module: innermost module that computes it; for a layer's output, the layer.
        signature: ``"temporal"`` (t alone: one value per timestep of a schedule) or ``"mixed"`` (t and conditions:
            one value per timestep and sampling run).
        shape: its shape for the batch of the example inputs.
        reaches: signatures of the ops that take it: ``"sample"``, and for a temporal tensor also ``"mixed"``.
        consumers: the ops where it, or what arithmetic without layers makes of it (chunks, ``1 + scale``), meets them.
        consumer_layers: the next layers from there on inside the consumers' blocks.
        upstream: the layers that compute it, its own included; empty for a bare function of t.
    """

    node: str
    layer: str
    module: str
    signature: Signature
    shape: tuple[int, ...]
    reaches: frozenset[Signature]
    consumers: tuple[str, ...]
    consumer_layers: tuple[str, ...]
    upstream: frozenset[str]


_OUTSIDE: Mapping[str, frozenset[str]] = {
    "temporal": frozenset({"mixed", "sample"}),
    "mixed": frozenset({"sample"}),
}


def find_block_boundary(flow: Flow) -> tuple[BoundaryTensor, ...]:
    """Every tensor through which the timestep leaves the modules that do not see the sample.

    Replacing all tensors of signature ``temporal`` by a table over t makes every temporal layer unnecessary;
    replacing all that reach ``"sample"`` by one computed before the sampling run makes the mixed layers unnecessary
    too. In execution order.
    """
    crossings: dict[str, list[str]] = defaultdict(list)
    for source, target in flow.graph.edges:
        if flow.signature[target] in _OUTSIDE.get(flow.signature[source], ()):
            crossings[_carrier(flow, source)].append(target)
    closing = closing_modules(flow)
    return tuple(_describe(flow, node, crossings[node], closing) for node in sorted(crossings, key=flow.order.get))


def _carrier(flow: Flow, crossing: str) -> str:
    """The layer output behind a crossing node, or the node itself where no single layer output determines it."""
    node = crossing
    while not flow.layer(node):
        sources = [p for p in flow.graph.predecessors(node) if flow.signature[p] != "constant"]
        if len(sources) != 1 or flow.signature[sources[0]] != flow.signature[node]:
            return node  # several embeddings meet here
        if flow.graph.nodes[sources[0]]["op"] == "input":
            return crossing  # a bare function of t
        node = sources[0]
    return node


def _describe(flow: Flow, node: str, targets: list[str], closing: set[str]) -> BoundaryTensor:
    consumers = tuple(sorted(set(targets), key=flow.order.__getitem__))
    next_layers: set[str] = set()
    for consumer in consumers:
        next_layers |= flow.layers_after([consumer], _near(flow, block_of(flow.module(consumer), closing)))
    ancestry = nx.ancestors(flow.graph, node) | {node}
    return BoundaryTensor(
        node=node,
        layer=flow.layer(node),
        module=flow.layer(node) or flow.module(node),
        signature=flow.signature[node],
        shape=tuple(flow.shape(node) or ()),
        reaches=frozenset(flow.signature[c] for c in consumers),
        consumers=consumers,
        consumer_layers=tuple(dict.fromkeys(flow.layer(n) for n in sorted(next_layers, key=flow.order.__getitem__))),
        upstream=frozenset(flow.layer(n) for n in ancestry if flow.layer(n)),
    )


def _near(flow: Flow, block: str) -> Callable[[str], bool]:
    """Whether a node belongs to what a consumer in ``block`` feeds directly.

    The sample's residual stream leads to every later layer, so nodes that see the sample count inside the block only.
    """

    def inside(node: str) -> bool:
        module = flow.module(node)
        return flow.signature[node] != "sample" or not block or f"{module}.".startswith(f"{block}.")

    return inside
