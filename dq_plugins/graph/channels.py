"""Which axis of a tensor holds its channels: followed through the graph from the layers, which know theirs.

Axes count from the end (a linear layer's is -1, a 2-d convolution's -3), so that they hold for any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from dq_plugins.graph.flow import Flow
from dq_plugins.graph.signatures import enclosing
from dq_plugins.layer_kinds import LAYER_KINDS

# Names of an op's options that say where dimensions come from and where they go.
_PERMUTATIONS = {
    "permute": ("dims", "dims"),
    "transpose": ("dim0", "dim1"),
    "swapdims": ("dim0", "dim1"),
    "swapaxes": ("axis0", "axis1"),
    "movedim": ("source", "destination"),
}

_RESHAPES = frozenset({"view", "reshape", "view_as", "reshape_as", "_unsafe_view"})


def channel_axes(flow: Flow, blocks: Mapping[str, str]) -> dict[str, int]:
    """Axis of the channels in the output of every layer and of every block.

    A block's is that of the last tensor it hands on; that of its last layer where the graph does not tell. ``blocks``
    are those of `dq_plugins.graph.blocks.find_blocks`.
    """
    axes = _node_axes(flow)
    layers = {flow.layer(node): axes[node] for node in flow.layer_nodes()}
    found = {block: layers[layer] for layer, block in blocks.items() if block}
    for node, axis in axes.items():
        if flow.signature[node] != "sample":
            continue
        for block in found.keys() & enclosing(flow.layer(node) or flow.module(node)):
            if any(not f"{flow.module(s)}.".startswith(f"{block}.") for s in flow.graph.successors(node)):
                found[block] = axis
    return layers | found


def _node_axes(flow: Flow) -> dict[str, int]:
    """Of every node where it can be told: not behind products of two activations, nor where heads are split."""
    axes: dict[str, int] = {}
    for node in flow.graph:
        kind = flow.graph.nodes[node]["kind"]
        if kind in LAYER_KINDS:
            axes[node] = LAYER_KINDS[kind].channel_axis
        elif kind in ("op", "view"):
            taken = (_through(flow, source, node, axes) for source in flow.operands(node).values())
            axis = next((axis for axis in taken if axis is not None), None)
            if axis is not None:
                axes[node] = axis
    return axes


def _through(flow: Flow, source: str, node: str, axes: Mapping[str, int]) -> int | None:
    """The axis in the output of ``node`` where it takes the channels of ``source``."""
    axis, before, after = axes.get(source), flow.shape(source), flow.shape(node)
    if axis is None or before is None or after is None:
        return None
    if flow.op(node) in _PERMUTATIONS:
        return _permuted(flow, node, axis, len(after))
    if len(before) == len(after) and flow.op(node) not in _RESHAPES:
        return axis  # arithmetic, normalisation, resampling, concatenation, slices
    return _reshaped(before, after, axis)


def _permuted(flow: Flow, node: str, axis: int, rank: int) -> int:
    options = flow.graph.nodes[node]["options"]
    sources, targets = (_listed(options[name], rank) for name in _PERMUTATIONS[flow.op(node)])
    if flow.op(node) == "permute":
        return sources.index(axis % rank) - rank
    moved = dict(zip(targets, sources, strict=True))  # where to -> where from
    if flow.op(node) != "movedim":
        moved |= dict(zip(sources, targets, strict=True))
    others = iter(d for d in range(rank) if d not in moved.values())
    order = [moved[d] if d in moved else next(others) for d in range(rank)]
    return order.index(axis % rank) - rank


def _listed(dims: int | Sequence[int], rank: int) -> list[int]:
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _reshaped(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Where a dimension stands after others were split or merged: of its size, behind as many elements."""
    at = len(before) + axis
    for place, extent in enumerate(after):
        if extent == before[at] and prod(after[:place]) == prod(before[:at]):
            return place - len(after)
    return None
