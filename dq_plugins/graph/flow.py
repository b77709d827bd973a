"""Walks over a dependency graph that the finders of roles, blocks and boundaries share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import networkx as nx

from dq_plugins.graph.signatures import Signature, node_signatures
from dq_plugins.layer_kinds import LAYER_KINDS


class Flow:
    """A dependency graph with the signature of every node, and the layers as the landmarks of every walk.

    Args:
        graph: as `dq_plugins.graph.trace` returns it; its nodes are in execution order.
        timestep: name of the timestep argument.
        sample: name of the sample argument.
    """

    def __init__(self, graph: nx.DiGraph, timestep: str, sample: str) -> None:
        self.graph = graph
        self.signature: dict[str, Signature] = node_signatures(graph, timestep, sample)
        self.order = {name: position for position, name in enumerate(graph.nodes)}
        self.depth = self._depths()

    def layer(self, node: str) -> str:
        """The layer whose weight the node uses, or ``""``."""
        return self.graph.nodes[node]["layer"]

    def module(self, node: str) -> str:
        """The innermost module that runs the node."""
        return self.graph.nodes[node]["module"]

    def shape(self, node: str) -> list[int] | None:
        """Shape of the node's output; None for ops with several outputs."""
        return self.graph.nodes[node]["shape"]

    def layer_nodes(self) -> Iterator[str]:
        """Nodes that use a layer's weight, in execution order."""
        return (name for name in self.graph if self.layer(name))

    def operands(self, node: str) -> dict[int, str]:
        """The node at each operand position; where an in-place write reaches a position too, the writer."""
        found: dict[int, str] = {}
        for source, _, data in self.graph.in_edges(node, data=True):
            for position in data["positions"]:
                if position not in found or self.order[source] > self.order[found[position]]:
                    found[position] = source
        return found

    def layer_input(self, node: str) -> str | None:
        """The node that gives a layer node its input; None where that is a parameter itself."""
        return self.operands(node).get(self.graph.nodes[node]["input_operand"])

    def single_layer(self, node: str) -> str | None:
        """The layer node that ``node`` is, up to rearrangements and scalar factors; None where there is more to it."""
        while not self.layer(node):
            sources = list(self.graph.predecessors(node))
            if len(sources) != 1 or (self.graph.nodes[node]["kind"] != "view" and self.op(node) not in ("mul", "div")):
                return None
            node = sources[0]
        return node

    def is_pointwise(self, node: str) -> bool:
        """Whether a layer node treats every position on its own: linear layers and 1x1 convolutions."""
        data = self.graph.nodes[node]
        kind = LAYER_KINDS[data["kind"]]
        return not kind.lookup and prod(kind.kernel(data["operand_shapes"][data["weight_operand"]])) == 1

    def op(self, node: str) -> str:
        """Base name of the node's op: ``"add"`` for ``aten.add_.Tensor``."""
        parts = self.graph.nodes[node]["op"].split(".")
        return (parts[1] if len(parts) > 2 else parts[0]).rstrip("_")

    def layers_before(self, starts: Iterable[str]) -> set[str]:
        """Nearest layer nodes on the way back from ``starts``, which are looked at themselves."""
        return self._nearest(starts, self.graph.predecessors, lambda node: True)

    def layers_after(self, starts: Iterable[str], inside: Callable[[str], bool]) -> set[str]:
        """Nearest layer nodes on the way forward from ``starts``, not leaving the nodes where ``inside`` holds."""
        return self._nearest(starts, self.graph.successors, inside)

    def _nearest(
        self, starts: Iterable[str], step: Callable[[str], Iterable[str]], inside: Callable[[str], bool]
    ) -> set[str]:
        found: set[str] = set()
        pending = list(starts)
        seen = set(pending)
        while pending:
            node = pending.pop()
            if self.layer(node):
                found.add(node)
                continue
            for other in step(node):
                if other not in seen and inside(other):
                    seen.add(other)
                    pending.append(other)
        return found

    def _depths(self) -> dict[str, int]:
        """Per node, the largest number of layers that depend on the sample on a path to it, itself included."""
        depth: dict[str, int] = {}
        for node in self.graph:
            before = max((depth[source] for source in self.graph.predecessors(node)), default=0)
            depth[node] = before + int(bool(self.layer(node)) and self.signature[node] == "sample")
        return depth
