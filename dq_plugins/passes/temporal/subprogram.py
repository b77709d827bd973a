"""Cut the part of a denoiser that computes given tensors out of its traced program.

The result runs that part alone: no forward of the denoiser, weights as arguments, differentiable, and usable under
``torch.func.vmap``. It works for any architecture that ``torch.export`` can follow, because it is made of the traced
ops and not of modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from dq_plugins.compiled import unwrap
from dq_plugins.errors import TraceError
from dq_plugins.graph.arguments import number_to_tensor
from dq_plugins.graph.export import Exported, export_denoiser
from dq_plugins.graph.traced_program import PREFIX


@dataclass(frozen=True)
class Subprogram:
    """A part of a denoiser as a function of its inputs and weights.

    Attributes:
        module: the traced ops; called with the inputs, then the weights.
        inputs: dotted names of the denoiser's tensor arguments that the part reads.
        parameters: names of the parameters and buffers that it reads.
        outputs: names of the nodes that it computes, as in the dependency graph.
        device: where it runs.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    device: torch.device

    def __call__(self, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            inputs: tensors by argument name; names that the part does not read are ignored.
            parameters: weights by name, full-precision, soft-rounded or quantized; others are ignored.

        Returns:
            Output tensors by node name.
        """
        values = self.module(*(inputs[n] for n in self.inputs), *(parameters[n] for n in self.parameters))
        return dict(zip(self.outputs, values, strict=True))


def extract(denoiser: nn.Module, example_inputs: Mapping[str, Any], nodes: Iterable[str], timestep: str) -> Subprogram:
    """Cut out the program of some nodes.

    Args:
        denoiser: the denoiser; untouched.
        example_inputs: keyword arguments of one call, as given to `dq_plugins.trace`.
        nodes: names of the nodes to compute, as in the graph that `dq_plugins.trace` returns.
        timestep: name of the timestep argument.

    Raises:
        TraceError: a node does not exist, or lies in a part that cannot be cut out.
    """
    exported = export_denoiser(denoiser, number_to_tensor(dict(example_inputs), timestep))
    weight = next(unwrap(denoiser).parameters(), None)
    return _Cutter(exported, torch.device("cpu") if weight is None else weight.device).cut(list(dict.fromkeys(nodes)))


class _Cutter:
    def __init__(self, exported: Exported, device: torch.device) -> None:
        self.program, names = exported
        self.device = device
        self.by_name = {n.name: n for n in self.program.graph.nodes}
        self.arguments: dict[str, str] = {}  # placeholder -> argument name
        self.weights: dict[str, str] = {}  # placeholder -> parameter or buffer name
        self.constants: dict[str, Tensor] = {}
        inputs = iter(names)
        for spec in self.program.graph_signature.input_specs:
            placeholder = spec.arg.name
            if spec.kind is InputKind.USER_INPUT:
                self.arguments[placeholder] = next(inputs)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.weights[placeholder] = str(spec.target).removeprefix(f"{PREFIX}.")
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                self.constants[placeholder] = self.program.constants[str(spec.target)]

    def cut(self, wanted: list[str]) -> Subprogram:
        missing = [name for name in wanted if name not in self.by_name]
        if missing:
            raise TraceError(f"the traced program has no node {missing[0]!r}; it cannot be cut out")
        needed = self._needed(wanted)
        graph, copies = fx.Graph(), {}
        ordered = [n for n in self.program.graph.nodes if n in needed]
        arguments = [n for n in ordered if n.name in self.arguments]
        weights = [n for n in ordered if n.name in self.weights]
        for node in arguments + weights:
            copies[node] = graph.placeholder(node.name)
        root = nn.Module()
        for node in ordered:
            if node not in copies:
                copies[node] = self._copy(node, graph, root, copies)
        graph.output(tuple(copies[self.by_name[name]] for name in wanted))
        graph.lint()
        return Subprogram(
            fx.GraphModule(root, graph),
            tuple(self.arguments[n.name] for n in arguments),
            tuple(self.weights[n.name] for n in weights),
            tuple(wanted),
            self.device,
        )

    def _needed(self, wanted: list[str]) -> set[fx.Node]:
        pending = [self.by_name[name] for name in wanted]
        needed = set(pending)
        while pending:
            for operand in pending.pop().all_input_nodes:
                if operand not in needed:
                    needed.add(operand)
                    pending.append(operand)
        return needed

    def _copy(self, node: fx.Node, graph: fx.Graph, root: nn.Module, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        if node.op == "placeholder":  # a constant tensor of the model's code
            value = self.constants[node.name]
            if value.device.type == "meta":
                raise TraceError(f"constant {node.name!r} of the temporal block was traced without its values")
            name = f"constant_{node.name}"
            root.register_buffer(name, value.to(self.device))
            return graph.get_attr(name)
        if node.op != "call_function":
            raise TraceError(f"node {node.name!r} ({node.op}) is a region of control flow; it cannot be cut out")
        copy = graph.node_copy(node, lambda n: copies[n])
        # the trace ran on stand-ins for tensors, and ops that make tensors remember their device
        copy.args = fx.node.map_aggregate(copy.args, self._place)  # type: ignore[assignment]
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, self._place)  # type: ignore[assignment]
        return copy

    def _place(self, argument: Any) -> Any:
        return self.device if isinstance(argument, torch.device) else argument
