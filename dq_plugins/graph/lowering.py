"""From a traced program to a `networkx.DiGraph` of plain data: one node per tensor op, in execution order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn

from dq_plugins.graph import ops
from dq_plugins.graph.macs import count_macs
from dq_plugins.graph.owners import Owners
from dq_plugins.graph.reading import inlined_region, module_of, shape_of
from dq_plugins.graph.traced_program import Program
from dq_plugins.layer_kinds import BY_OPERATOR


def lower(program: Program, denoiser: nn.Module) -> nx.DiGraph:
    """Lower a program; see `dq_plugins.graph.trace` for what the nodes and edges carry."""
    return _Lowering(program, Owners(denoiser)).run()


class _Parameter(str):
    """A parameter's name, where the walk would otherwise meet a node."""


_Source = tuple[int, Any, str | None]
"""One operand: its position, its value, and the node that last wrote to its memory in place (or None)."""


_OPERANDS = ("input_operand", "weight_operand")


class _Lowering:
    """One walk over the program. A value is a node's name, a `_Parameter`, a list of values, or None (no tensor)."""

    def __init__(self, program: Program, owners: Owners) -> None:
        self.program = program
        self.owners = owners
        self.graph: nx.DiGraph = nx.DiGraph()
        self.values: dict[fx.Node, Any] = {}
        self.weights: dict[str, tuple[str, ...]] = {}  # node -> parameters it is computed from without a layer
        self.writers: dict[int, str] = {}  # storage -> the last node that wrote to it in place
        self.aliases: dict[fx.Node, fx.Node] = {}  # placeholder of an inlined region -> what it stands for

    def run(self) -> nx.DiGraph:
        for node in self.program.placeholders:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
        self._walk(self.program.graph, self.program.module, prefix="")
        self.graph.remove_nodes_from([n for n in nx.isolates(self.graph) if n.startswith("constant:")])
        return self.graph

    def _placeholder(self, node: fx.Node) -> Any:
        kind, name = self.program.placeholders[node]
        if kind == "parameter":
            return _Parameter(name)
        return self._add(f"{kind}:{name}", node, kind, kind, [], depends=[name] if kind == "input" else [])

    def _walk(self, graph: fx.Graph, owner: nn.Module, prefix: str) -> list[Any]:
        """Lower the ops of one graph; returns the values of its outputs."""
        outputs: list[Any] = []
        for node in graph.nodes:
            if node.op == "output":
                outputs = [self.values.get(n) for n in ops.tensor_operands(node)]
                if not prefix:
                    self._add("output", node, "output", "output", self._sources(node))
            elif node in self.program.placeholders:
                self.values.setdefault(node, self._placeholder(node) if node.op == "get_attr" else None)
            elif node.op == "get_attr":
                self._constant(node, getattr(owner, str(node.target), None), prefix)
            elif node.op == "call_function":
                region = inlined_region(node, owner)
                if region is not None:
                    self.values[node] = self._inline(node, region, prefix)
                else:
                    self._call(node, prefix)
        return outputs

    def _constant(self, node: fx.Node, value: Any, prefix: str) -> None:
        if isinstance(value, Tensor):
            self.values[node] = self._add(f"constant:{prefix}{node.name}", node, "constant", "constant", [])

    def _inline(self, node: fx.Node, region: fx.GraphModule, prefix: str) -> list[Any]:
        """Lower a control region in place: its placeholders stand for the last operands of the call."""
        placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
        operands = ops.tensor_operands(node)
        operands = operands[len(operands) - len(placeholders) :]
        for placeholder, operand in zip(placeholders, operands, strict=True):
            self.values[placeholder] = self.values.get(operand)
            self.aliases[placeholder] = self.aliases.get(operand, operand)
        return self._walk(region.graph, region, f"{prefix}{node.name}.")

    def _call(self, node: fx.Node, prefix: str) -> None:
        operands = ops.tensor_operands(node)
        first = self.values.get(operands[0]) if operands else None
        if ops.base_name(node.target) == "getitem" and isinstance(first, list):
            self.values[node] = first[node.args[1]]
            return
        if node.meta.get("val") is None and not ops.written_operands(node):
            return  # assertions about metadata
        name = prefix + node.name
        self.values[node] = self._add_op(name, node)
        for written in ops.written_operands(node):
            key = self._storage(written)
            if key is not None:
                self.writers[key] = name

    def _storage(self, node: fx.Node) -> int | None:
        node = self.aliases.get(node, node)
        if self.program.viewed is None:
            return ops.storage_key(node.meta.get("val"))
        return id(self.program.viewed.get(node, node))

    def _sources(self, node: fx.Node) -> list[_Source]:
        found = []
        for position, operand in enumerate(ops.tensor_operands(node)):
            key = self._storage(operand)
            writer = self.writers.get(key) if key is not None else None
            found.append((position, self.values.get(operand), writer))
        return found

    def _add_op(self, name: str, node: fx.Node) -> str:
        base = ops.base_name(node.target)
        sources = self._sources(node)
        kept = ops.value_operands(base, len(sources))
        settings = ops.options(node)
        shapes = [shape_of(n.meta.get("val")) or [] for n in ops.tensor_operands(node)]
        weight, at = self._weight(base, sources)
        self._add(
            name,
            node,
            ops.full_name(node.target),
            ops.node_kind(base, is_layer=at is not None),
            [sources[i] for i in kept],
            layer=self.owners.layer(weight, module_of(node)) if weight else "",
            macs=count_macs(base, shapes, shape_of(node.meta.get("val")) or [], settings.get("equation", "")),
            operand_shapes=shapes,
            options=settings,
            **dict(zip(_OPERANDS, at or (), strict=False)),
        )
        if weight:
            self.weights[name] = ()  # what a layer computes is an activation, even when nothing reaches it
        return name

    def _weight(self, base: str, sources: list[_Source]) -> tuple[tuple[str, ...], tuple[int, int] | None]:
        """Parameters behind the weight of a layer op and its (input, weight) positions; empty for other ops."""
        for at in BY_OPERATOR[base].operators[base] if base in BY_OPERATOR else ():
            value = sources[at[1]][1] if at[1] < len(sources) else None
            names = self._parameters_of(value)
            if names:
                return names, at
        return (), None

    def _parameters_of(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, _Parameter):
            return (str(value),)
        return self.weights.get(value, ()) if isinstance(value, str) else ()

    def _depends_of(self, value: Any) -> list[str]:
        return [] if isinstance(value, _Parameter) or value is None else self.graph.nodes[value]["depends"]

    def _add(
        self,
        name: str,
        node: fx.Node,
        op: str,
        kind: str,
        sources: list[_Source],
        depends: Iterable[str] = (),
        **of_op: Any,
    ) -> str:
        """Add one node with its edges; parameters are attributes, not nodes."""
        values = [v for _, v, _ in sources] + [writer for _, _, writer in sources]
        reached = set(depends).union(*(self._depends_of(v) for v in values))
        names = sorted({p for v in values for p in self._parameters_of(v)})
        tensor = node.meta.get("val")
        no_op = {"layer": "", "macs": 0, "operand_shapes": [], "options": {}, **dict.fromkeys(_OPERANDS)}
        self.graph.add_node(
            name,
            op=op,
            kind=kind,
            module=module_of(node),
            shape=shape_of(tensor),
            dtype=str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else None,
            parameters=names,
            depends=sorted(reached),
            **{**no_op, **of_op},
        )
        self.weights[name] = () if reached else tuple(names)
        self._connect(name, sources)
        return name

    def _connect(self, name: str, sources: list[_Source]) -> None:
        positions: dict[str, list[int]] = defaultdict(list)
        for position, value, writer in sources:
            for source in dict.fromkeys((value, writer)):
                if isinstance(source, str) and not isinstance(source, _Parameter):
                    positions[source].append(position)
        for source, at in positions.items():
            self.graph.add_edge(source, name, positions=at)
