"""Repeated blocks of a denoiser, found by where residual connections close."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dq_plugins.graph.flow import Flow
from dq_plugins.graph.signatures import enclosing


def residual_additions(flow: Flow) -> Iterator[tuple[str, str, str]]:
    """Additions that close a residual connection: ``(node, operand, operand)``.

    Both operands depend on the sample and have the shape of the result. They differ in the number of layers behind
    them, or are a pointwise layer and a wider one; this tells them from rotary embeddings, which add two
    rearrangements of one layer's output, and from sums of equal branches.
    """
    for node in flow.graph:
        if flow.op(node) != "add":
            continue
        operands = flow.operands(node)
        first, second = operands.get(0), operands.get(1)
        if first is None or second is None:
            continue
        if any(flow.signature[o] != "sample" or flow.shape(o) != flow.shape(node) for o in (first, second)):
            continue
        if flow.depth[first] != flow.depth[second] or _is_wide(flow, first) != _is_wide(flow, second):
            yield node, first, second


def _is_wide(flow: Flow, node: str) -> bool:
    layer = flow.single_layer(node)
    return layer is not None and not flow.is_pointwise(layer)


def closing_modules(flow: Flow) -> set[str]:
    """Modules whose own code closes a residual connection."""
    return {flow.module(node) for node, _, _ in residual_additions(flow)}


def find_blocks(flow: Flow, layers: Iterable[str]) -> dict[str, str]:
    """The block of every layer: the innermost module around it that closes a residual connection itself.

    ``""`` for layers outside of every block (first and last layers, the embedding of the timestep).
    """
    closing = closing_modules(flow)
    return {layer: block_of(layer.rpartition(".")[0], closing) for layer in layers}


def block_of(module: str, closing: set[str]) -> str:
    """The innermost of the ``closing`` modules that contains ``module`` or is it; ``""`` where none does."""
    return next((each for each in enclosing(module) if each in closing), "")
