"""Find attentions in a dependency graph: fused ones, and ``softmax(query @ key) @ value`` written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dq_plugins.graph.flow import Flow


class Attention(NamedTuple):
    """The nodes that give one attention its query, key and value."""

    query: str
    key: str
    value: str


def find_attentions(flow: Flow) -> Iterator[Attention]:
    """Every attention of a denoiser, in execution order."""
    for node, data in flow.graph.nodes(data=True):
        if data["kind"] == "attention":
            operands = flow.operands(node)
            if {0, 1, 2} <= operands.keys():
                yield Attention(operands[0], operands[1], operands[2])
        elif flow.op(node) in ("softmax", "_softmax"):
            yield from _written_out(flow, node)


def _written_out(flow: Flow, softmax: str) -> Iterator[Attention]:
    scores, _ = _nearest_product(flow, softmax, flow.graph.predecessors)
    mixture, passed = _nearest_product(flow, softmax, flow.graph.successors)
    if scores is None or mixture is None:
        return
    factors = _factors(flow, scores)
    values = [node for node in _factors(flow, mixture) if node not in passed]
    if len(factors) != 2 or len(values) != 1:
        return
    key = _operand_along_softmax(flow, scores, softmax)
    yield Attention(factors[1 - key], factors[key], values[0])


def _nearest_product(flow: Flow, start: str, step: Callable[[str], Iterable[str]]) -> tuple[str | None, set[str]]:
    """First matrix product on the way from ``start`` that no layer hides, and the nodes passed up to it."""
    passed = {start}
    pending = [start]
    for node in pending:  # grows while it is walked: nearest first
        for other in step(node):
            if flow.graph.nodes[other]["kind"] == "matmul":
                return other, passed
            if other not in passed and not flow.layer(other):
                passed.add(other)
                pending.append(other)
    return None, passed


def _factors(flow: Flow, product: str) -> list[str]:
    # the last two: the first operand of baddbmm is an addend
    return [node for _, node in sorted(flow.operands(product).items())][-2:]


def _operand_along_softmax(flow: Flow, scores: str, softmax: str) -> int:
    """Which factor of the scores (0 or 1) has the dimension that the softmax runs over: the keys."""
    equation = flow.graph.nodes[scores]["options"].get("equation")
    shape = flow.shape(softmax) or []
    dim = flow.graph.nodes[softmax]["options"].get("dim", -1)
    from_the_end = dim if dim < 0 else dim - len(shape)
    if equation:
        terms, _, output = equation.replace(" ", "").partition("->")
        return int(output[from_the_end] in terms.split(",")[1])
    return 1 if from_the_end == -1 else 0
