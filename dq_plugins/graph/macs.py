"""Multiply-accumulate operations of one ATen op, from the shapes of its operands.

Counted for the batch of the example inputs. Padding counts like data, causal attention like full attention: what a
dense kernel executes. Shapes in the comments: ``...`` is any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isqrt, prod

from dq_plugins.graph.ops import is_attention
from dq_plugins.layer_kinds import BY_OPERATOR, Shape

_Count = Callable[[Sequence[Shape], Shape], int]


def _matmul(operands: Sequence[Shape], output: Shape) -> int:
    return prod(output) * operands[0][-1]  # [..., n, k] @ [..., k, m]


def _added_matmul(operands: Sequence[Shape], output: Shape) -> int:
    return prod(output) * operands[1][-1]  # bias + [..., n, k] @ [..., k, m]


def _attention(operands: Sequence[Shape], output: Shape) -> int:
    query, key, value = operands[:3]  # [..., L, E], [..., S, E], [..., S, Ev]
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _contraction(operands: Sequence[Shape], output: Shape) -> int:
    # what is summed over is in both operands, and not in the output: |a| |b| = |output| k^2
    return isqrt(prod(operands[0]) * prod(operands[1]) * prod(output))


_PRODUCTS: Mapping[str, _Count] = {
    "tensordot": _contraction,
    **dict.fromkeys(("mm", "mv", "bmm", "dot", "matmul"), _matmul),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), _added_matmul),
}


def count_macs(op: str, operands: Sequence[Shape], output: Shape, equation: str = "") -> int:
    """MACs of one op.

    Args:
        op: base name of the ATen op, for example ``"conv2d"``.
        operands: shapes of its tensor operands, in order.
        output: shape of its output.
        equation: the equation, for ``"einsum"``.

    Returns:
        The count; 0 for ops that do not multiply and accumulate.

    Example:
        >>> count_macs("linear", [(2, 77, 768), (320, 768)], (2, 77, 320))
        37847040
    """
    if is_attention(op):
        return _attention(operands, output)
    if op == "einsum":
        return _einsum(equation, operands)
    if op in _PRODUCTS:
        return _PRODUCTS[op](operands, output)
    return BY_OPERATOR[op].macs(operands[0], operands[1], output) if op in BY_OPERATOR else 0


def _einsum(equation: str, operands: Sequence[Shape]) -> int:
    """Product of the extents of every index, for two operands: the naive contraction, which is what bmm executes."""
    if len(operands) != 2:
        return 0
    extents: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        head, ellipsis, tail = term.partition("...")
        batch = len(shape) - len(head) - len(tail)
        labels = [*head, *(f".{batch - i}" for i in range(batch)), *tail] if ellipsis else [*term]
        for label, extent in zip(labels, shape, strict=True):
            extents[label] = max(extents.get(label, 1), extent)
    return prod(extents.values())
