"""The partition of a denoiser: which layers depend on the timestep, on conditions, on the sample, and what for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import nn

from dq_plugins.graph.arguments import find_timestep_argument, number_to_tensor
from dq_plugins.graph.block_boundary import BoundaryTensor, find_block_boundary
from dq_plugins.graph.blocks import find_blocks
from dq_plugins.graph.channels import channel_axes
from dq_plugins.graph.flow import Flow
from dq_plugins.graph.owners import Owners
from dq_plugins.graph.roles import find_roles
from dq_plugins.graph.signatures import (
    Signature,
    classify,
    find_sample_argument,
)
from dq_plugins.graph.trace import trace
from dq_plugins.layer_kinds import LAYER_KINDS


@dataclass(frozen=True)
class LayerInfo:
    """What the graph says about one layer.

    Attributes:
        name: fully qualified name.
        kind: a name of `dq_plugins.layer_kinds.LAYER_KINDS`.
        type_name: class name of the module.
        params: elements of the module's own parameters, bias included.
        weight_shape: shape of the weight as stored.
        macs: multiply-accumulate operations in one call of the denoiser, all uses of the layer together.
        input_shape, output_shape: at the layer's first use, for the batch of the example inputs.
        roles: see `dq_plugins.graph.roles.Role`.
        signature: see `dq_plugins.graph.signatures.Signature`; of all uses of the layer together.
        depends: names of the input tensors that reach it.
        block: the residual block that it belongs to, ``""`` outside of all.
        source: the node of the graph that gives its input at the first use; layers of one source share their input.
    """

    name: str
    kind: str
    type_name: str
    params: int
    weight_shape: tuple[int, ...]
    macs: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    roles: frozenset[str]
    signature: Signature
    depends: frozenset[str]
    block: str
    source: str = ""

    @property
    def lookup(self) -> bool:
        """Whether its input is indices; see `dq_plugins.layer_kinds.LayerKind`."""
        return LAYER_KINDS[self.kind].lookup


@dataclass(frozen=True)
class Partition:
    """The layers of a denoiser by what they depend on.

    Attributes:
        timestep: name of the timestep argument.
        sample_argument: name of the argument through which the noisy sample enters.
        layers: every layer that ran, in execution order.
        block_boundary: the tensors through which the timestep reaches the rest.
        channel_axes: axis of the channels in the output of every layer and of every block, from the end.
        total_params: elements of all parameters of the denoiser, unused ones included.
        graph: the dependency graph that all of this was found in.
    """

    timestep: str
    sample_argument: str
    layers: Mapping[str, LayerInfo]
    block_boundary: tuple[BoundaryTensor, ...]
    channel_axes: Mapping[str, int]
    total_params: int
    graph: nx.DiGraph = field(repr=False, compare=False)

    @property
    def temporal(self) -> frozenset[str]:
        """Layers that depend on the timestep alone: TFMQ's Temporal Information Block."""
        return self._with("temporal")

    @property
    def condition(self) -> frozenset[str]:
        """Layers that depend on conditions alone: constant during one sampling run."""
        return self._with("condition")

    @property
    def mixed(self) -> frozenset[str]:
        """Layers that depend on the timestep and on conditions, not on the sample."""
        return self._with("mixed")

    @property
    def sample(self) -> frozenset[str]:
        """Layers that the noisy sample reaches."""
        return self._with("sample")

    @property
    def constant(self) -> frozenset[str]:
        """Layers that no argument reaches: their output is always the same."""
        return self._with("constant")

    @property
    def roles(self) -> dict[str, frozenset[str]]:
        """Roles of every layer."""
        return {name: info.roles for name, info in self.layers.items()}

    def with_role(self, role: str) -> tuple[str, ...]:
        """Layers that have a role, in execution order."""
        return tuple(name for name, info in self.layers.items() if role in info.roles)

    def _with(self, signature: str) -> frozenset[str]:
        return frozenset(name for name, info in self.layers.items() if info.signature == signature)


def partition(
    denoiser: nn.Module, example_inputs: dict[str, Any], timestep: str | None = None, sample: str | None = None
) -> Partition:
    """Partition the layers of a denoiser by the inputs that reach them.

    The temporal block is TFMQ-DM's (Huang et al., CVPR 2024, section 4.1), found from data flow instead of a list of
    module names, so that it holds for any architecture that can be traced.

    Args:
        denoiser: on any device, the meta device included; left untouched.
        example_inputs: keyword arguments of one call, see `dq_plugins.graph.trace`.
        timestep: name of the timestep argument, where it is not a usual one.
        sample: name of the argument through which the noisy sample enters, where its shape does not tell.

    Returns:
        The partition.

    Raises:
        TimestepError: no argument carries the timestep, or none of the given name.
        TraceError: the denoiser cannot be traced, or no argument looks like the noisy sample.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.body = nn.Linear(1, 4), nn.Linear(4, 4)
        ...     def forward(self, x, t):
        ...         return self.body(x + self.embed(t[:, None]))
        >>> import torch
        >>> part = partition(Denoiser(), {"x": torch.zeros(2, 4), "t": torch.zeros(2)})
        >>> part.temporal, part.sample, part.block_boundary[0].layer
        (frozenset({'embed'}), frozenset({'body'}), 'embed')
    """
    argument = find_timestep_argument(denoiser, timestep)
    graph = trace(denoiser, number_to_tensor(example_inputs, argument))
    entry = find_sample_argument(graph, argument, sample)
    flow = Flow(graph, argument, entry)
    owners = Owners(denoiser)
    layers = _describe_layers(flow, owners, argument, entry)
    return Partition(
        timestep=argument,
        sample_argument=entry,
        layers=layers,
        block_boundary=find_block_boundary(flow),
        channel_axes=channel_axes(flow, {name: layer.block for name, layer in layers.items()}),
        total_params=owners.total(),
        graph=graph,
    )


def untraced(denoiser: nn.Module, layers: Mapping[str, str], timestep: str) -> Partition:
    """What is known about layers without a graph: that they exist. They have no roles and belong to no block.

    Args:
        denoiser: whose layers they are.
        layers: kinds by fully qualified name.
        timestep: name of the timestep argument.
    """
    owners = Owners(denoiser)
    nothing = frozenset[str]()
    infos = {
        name: LayerInfo(name, kind, "", 0, (), 0, (), (), nothing, "sample", nothing, "")
        for name, kind in layers.items()
    }
    axes = {name: LAYER_KINDS[kind].channel_axis for name, kind in layers.items()}
    return Partition(timestep, "", infos, (), axes, owners.total(), nx.DiGraph())


def _describe_layers(flow: Flow, owners: Owners, timestep: str, sample: str) -> dict[str, LayerInfo]:
    uses: dict[str, list[dict[str, Any]]] = {}
    first_nodes: dict[str, str] = {}
    for node in flow.layer_nodes():
        first_nodes.setdefault(flow.layer(node), node)
        uses.setdefault(flow.layer(node), []).append(flow.graph.nodes[node])
    depends = {layer: frozenset().union(*(d["depends"] for d in nodes)) for layer, nodes in uses.items()}
    signatures = {layer: classify(names, timestep, sample) for layer, names in depends.items()}
    roles = find_roles(flow, signatures)
    blocks = find_blocks(flow, uses)
    return {
        layer: LayerInfo(
            name=layer,
            kind=nodes[0]["kind"],
            type_name=owners.type_name(layer),
            params=owners.params(layer),
            weight_shape=owners.weight_shape(layer),
            macs=sum(d["macs"] for d in nodes),
            input_shape=tuple(nodes[0]["operand_shapes"][nodes[0]["input_operand"]]),
            output_shape=tuple(nodes[0]["shape"]),
            roles=roles[layer],
            signature=signatures[layer],
            depends=depends[layer],
            block=blocks[layer],
            source=flow.layer_input(first_nodes[layer]) or "",
        )
        for layer, nodes in uses.items()
    }
