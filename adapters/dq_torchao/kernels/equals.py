"""One node for calls that are equal: same operator, same arguments.

Inductor does that to graphs whose weights are frozen, and to no other graph for inference. Without it, layers that
share an input (query, key, value) have codes of their own each, and blocks that embed one timestep embed it each.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_FUNCTIONS = type(torch.ops.aten.add.Tensor), type(operator.getitem)


def one_of_equals(graph: fx.Graph) -> None:
    """Let the first of equal calls stand for all, in place; the graph changes no tensor in place."""
    seen: dict[tuple[Any, str, str], fx.Node] = {}
    returned = _returned(graph)
    for node in list(graph.nodes):
        if node in returned or node.is_impure() or type(node.target) not in _FUNCTIONS:
            continue  # impure: it changes something, or is random
        first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)  # nodes by their names
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _returned(graph: fx.Graph) -> set[fx.Node]:
    """What the graph returns, and what that is a view of: callers may change one result, and not another."""
    found: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        found.add(node)
        if getattr(node.target, "is_view", False) or node.target is operator.getitem:
            waiting += [each for each in node.all_input_nodes if each not in found]
    return found
