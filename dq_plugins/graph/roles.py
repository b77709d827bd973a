"""Roles of layers, found from how data flows, never from the names of modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Literal, NamedTuple

from dq_plugins.graph.blocks import residual_additions
from dq_plugins.graph.flow import Flow
from dq_plugins.layer_kinds import LAYER_KINDS

Role = Literal[
    "first", "last", "temporal", "temporal_first", "condition", "mixed", "constant", "shortcut", "downsample",
    "upsample", "cross_attention_key", "cross_attention_value",
]  # fmt: skip
"""What a layer is for:

- ``first``, ``last``: no other layer that depends on the sample comes before it, or after it;
- ``temporal``, ``condition``, ``mixed``, ``constant``: its dependency signature;
- ``temporal_first``: a temporal layer with no layer before it: where the timestep's embedding enters;
- ``shortcut``: a 1x1 convolution or linear layer parallel to the main path of a residual connection;
- ``downsample``, ``upsample``: a convolution that changes the resolution, the first layer left out;
- ``cross_attention_key``, ``cross_attention_value``: it depends on conditions alone and feeds the key, or the value,
  of an attention whose query depends on the sample.
"""

_UPSAMPLING = ("upsample", "interpolate", "pixel_shuffle")


def find_roles(flow: Flow, signatures: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Roles of every layer, possibly none; ``signatures`` are those of the layers."""
    roles: dict[str, set[str]] = defaultdict(set)
    for layer, signature in signatures.items():
        if signature != "sample":
            roles[layer].add(signature)
    for finder in (_ends, _entries_of_time, _resampling, _shortcuts, _cross_attention):
        for layer, role in finder(flow):
            roles[layer].add(role)
    return {layer: frozenset(roles[layer]) for layer in signatures}


def _ends(flow: Flow) -> Iterator[tuple[str, Role]]:
    to_output: set[str] = {"output"}
    followed: set[str] = set()  # nodes with a layer after them, on a way to the output
    for node in reversed(list(flow.graph)):
        after = [s for s in flow.graph.successors(node) if s in to_output]
        if after:
            to_output.add(node)
        if any(s in followed or flow.layer(s) for s in after):
            followed.add(node)
    for node in flow.layer_nodes():
        if flow.signature[node] == "sample" and node in to_output:
            if flow.depth[node] == 1:
                yield flow.layer(node), "first"
            if node not in followed:
                yield flow.layer(node), "last"


def _entries_of_time(flow: Flow) -> Iterator[tuple[str, Role]]:
    preceded: set[str] = set()
    for node in flow.graph:
        if any(p in preceded or flow.layer(p) for p in flow.graph.predecessors(node)):
            preceded.add(node)
    for node in flow.layer_nodes():
        if flow.signature[node] == "temporal" and node not in preceded:
            yield flow.layer(node), "temporal_first"


def _resampling(flow: Flow) -> Iterator[tuple[str, Role]]:
    for node in flow.layer_nodes():
        data = flow.graph.nodes[node]
        kind = LAYER_KINDS[data["kind"]]
        if not kind.spatial or flow.signature[node] != "sample" or flow.depth[node] == 1:
            continue
        stride = data["options"].get("stride", 1)
        strided = prod(stride) > 1 if isinstance(stride, list) else stride > 1
        if strided:
            yield flow.layer(node), "downsample" if kind.output_axis == 0 else "upsample"
        elif any(word in flow.op(_through_views(flow, node)) for word in _UPSAMPLING):
            yield flow.layer(node), "upsample"


def _through_views(flow: Flow, node: str) -> str:
    source = flow.layer_input(node) or node  # then back over rearrangements and casts
    while flow.graph.nodes[source]["kind"] == "view" and 0 in flow.operands(source):
        source = flow.operands(source)[0]
    return source


def _shortcuts(flow: Flow) -> Iterator[tuple[str, Role]]:
    for _, first, second in residual_additions(flow):
        for side, other in ((first, second), (second, first)):
            node = flow.single_layer(side)
            if node is not None and flow.is_pointwise(node) and _parallel(flow, node, other):
                yield flow.layer(node), "shortcut"


def _parallel(flow: Flow, node: str, other: str) -> bool:
    """Whether the input of the layer ``node`` also reaches ``other`` through at least two layers, or a wider one."""
    source = flow.layer_input(node)
    if source is None:
        return False
    source = _branching_point(flow, source)
    if flow.order[source] > flow.order[other]:
        return False
    last = flow.single_layer(other)
    wide = last is not None and not flow.is_pointwise(last)
    needed = 1 if wide else 2
    return _layers_between(flow, source, other, avoiding=node) >= needed


def _branching_point(flow: Flow, node: str) -> str:
    """The nearest layer, meeting of tensors or input behind a node: copies, norms and resampling are passed over."""
    while not flow.layer(node):
        sources = list(flow.graph.predecessors(node))
        if len(sources) != 1:
            break
        node = sources[0]
    return node


def _layers_between(flow: Flow, source: str, target: str, avoiding: str) -> int:
    """Largest number of layers on a path from ``source`` to ``target``, both ends included; 0 without a path."""
    most: dict[str, int] = {source: 0}
    for candidate in list(flow.graph)[flow.order[source] + 1 : flow.order[target] + 1]:
        before = [most[p] for p in flow.graph.predecessors(candidate) if p in most]
        if before and candidate != avoiding:
            most[candidate] = max(before) + int(bool(flow.layer(candidate)))
    return most.get(target, 0)


def _cross_attention(flow: Flow) -> Iterator[tuple[str, Role]]:
    for attention in find_attentions(flow):
        if flow.signature[attention.query] != "sample":
            continue
        sides: tuple[tuple[str, Role], ...] = (
            (attention.key, "cross_attention_key"),
            (attention.value, "cross_attention_value"),
        )
        for start, role in sides:
            for node in flow.layers_before([start]):
                if flow.signature[node] == "condition":
                    yield flow.layer(node), role


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
