"""A denoiser as a graph of its blocks, coloured by what reaches them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import networkx as nx

from dq_plugins.graph import Partition
from dq_plugins.graph.signatures import classify
from dq_plugins.plots import graph_of_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANINGS = {
    "temporal": "timestep alone (temporal block)",
    "mixed": "timestep and conditions",
    "condition": "conditions alone",
    "sample": "the noisy image",
}


def block_of(module: str) -> str:
    """``down_blocks.1`` of ``down_blocks.1.resnets.0.conv1``: up to the first number, else the first name."""
    parts = module.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: end + 1])


def block_graph(partition: Partition) -> nx.DiGraph:
    """Blocks and how values flow between them.

    A node is ``(block, signature)``: the part of ``transformer_blocks.3`` that sees the timestep alone is a node of its
    own. Operations outside of every module are left out, and what flows through them goes on to the next block.

    Returns:
        A graph without loops, each node with ``label``, ``signature`` and ``layers``.
    """
    graph, keys = partition.graph, {}
    for name, data in graph.nodes(data=True):
        signature = classify(data["depends"], partition.timestep, partition.sample_argument)
        inside = block_of(data["module"]) if data["module"] else name if data["op"] == "input" else ""
        keys[name] = (inside, signature) if inside and signature != "constant" else None
    layers = Counter(keys[n] for n, data in graph.nodes(data=True) if data["layer"] and keys[n])
    blocks = nx.DiGraph()
    reached: dict[str, set] = {}  # node of the full graph -> blocks whose values arrive there through no other block
    for name in nx.topological_sort(graph):
        before = set().union(*(reached[each] for each in graph.predecessors(name))) if graph.pred[name] else set()
        key = keys[name]
        if key is None:
            reached[name] = before
            continue
        label = key[0].removeprefix("input:")
        blocks.add_node(key, label=label, signature=key[1], layers=layers[key])
        blocks.add_edges_from((each, key) for each in before if each != key)
        reached[name] = {key}
    return blocks


def block_figure(partition: Partition) -> Figure | None:
    """The blocks as a figure; None where they have loops, as blocks called twice have."""
    blocks = block_graph(partition)
    if not nx.is_directed_acyclic_graph(blocks):
        return None
    return graph_of_blocks(blocks, MEANINGS)
