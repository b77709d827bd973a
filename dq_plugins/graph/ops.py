"""What ATen ops mean to the dependency graph: which only look at shapes, which write in place."""

from __future__ import annotations

import operator
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx

from dq_plugins.layer_kinds import BY_OPERATOR

_PRODUCTS = frozenset({"matmul", "mm", "mv", "addmm", "bmm", "baddbmm", "einsum", "dot", "tensordot"})

# Their result has the shape of an operand and nothing of its values.
_FRESH = frozenset([
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
])  # fmt: skip

# Of their second operand they take the shape or the dtype only.
_LIKE_SECOND = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})

VIEWS = frozenset([
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "movedim",
    "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "expand", "expand_as",
    "view_as", "reshape_as", "alias", "detach", "getitem", "contiguous", "clone", "to", "type_as", "_to_copy",
    "swapaxes", "swapdims", "repeat", "dropout", "feature_dropout", "lift_fresh_copy", "index_select",
])  # fmt: skip
"""Ops that rearrange, cast or pass on one tensor and compute nothing."""


def base_name(target: Any) -> str:
    """``"conv2d"`` for ``aten.conv2d.default``; in-place variants lose their underscore."""
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.rpartition("::")[2]
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return getattr(target, "__name__", str(target))


def full_name(target: Any) -> str:
    """``"aten.conv2d.default"``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return base_name(target)


def value_operands(name: str, count: int) -> range:
    """Positions of the tensor operands whose values reach the result of the op ``name``."""
    if name in _FRESH:
        return range(0)
    return range(min(count, 1)) if name in _LIKE_SECOND else range(count)


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that an op takes tensors from, in order, lists flattened, repeated where used twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)
    return found


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that an in-place op writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    written: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            fx.map_arg(value, lambda n: written.append(n) or n)
    return written


def options(node: fx.Node) -> dict[str, Any]:
    """The op's arguments that are numbers, strings or lists of them, by their schema names."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {"index": node.args[1]} if node.target is operator.getitem else {}
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {key: _plain(value) for key, value in given.items() if _is_plain(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # JSON has no infinity, and attention masks are full of them.
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)


def storage_key(value: Any) -> int | None:
    """Identity of the memory behind a traced tensor: equal for a tensor and its views; None where it has none."""
    if not isinstance(value, Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # inside of vmap
        return None


def node_kind(name: str, is_layer: bool) -> str:
    """Kind of a node for readers: a layer kind, ``"matmul"``, ``"attention"``, ``"view"`` or ``"op"``.

    Args:
        name: base name of the op.
        is_layer: its weight operand comes from parameters.
    """
    if is_layer:
        return BY_OPERATOR[name].name
    if is_attention(name):
        return "attention"
    if name in _PRODUCTS or name in BY_OPERATOR:
        return "matmul"
    return "view" if name in VIEWS else "op"


def is_attention(name: str) -> bool:
    """Whether the op is a fused attention with query, key and value as its first operands."""
    return "scaled_dot_product" in name or name == "flex_attention"
