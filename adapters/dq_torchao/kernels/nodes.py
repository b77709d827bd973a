"""Nodes of a graph that is being compiled: their values, their users, and new ones."""

from __future__ import annotations

from typing import Any

from torch import fx


def value(node: Any) -> Any:
    """What stands for the value of a node while a graph is compiled: its shape, dtype and so on."""
    return node.meta["val"]


def called(graph: fx.Graph, target: Any, args: tuple[Any, ...], of: Any, **kwargs: Any) -> fx.Node:
    """A new node that calls ``target``, whose value is like ``of``."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = of
    return node


def only_user(node: fx.Node | None, target: Any) -> fx.Node | None:
    """What alone uses ``node``, as its first argument, if it calls ``target``."""
    if node is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.target is target and user.args[0] is node else None
