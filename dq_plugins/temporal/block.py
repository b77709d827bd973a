"""The temporal block of a denoiser: a view of the modules that depend on t alone, runnable by itself.

Shapes: ``T`` timesteps; a feature is a frontier tensor for every timestep, ``[T, ...]``.
Source: TFMQ-DM (Huang et al. 2024), "Temporal Information Block"; found from the graph instead of by names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import TraceError
from dq_plugins.graph import Partition, find_timestep_argument, partition
from dq_plugins.graph.arguments import named_leaves, number_to_tensor
from dq_plugins.graph.flow import Flow
from dq_plugins.temporal.subprogram import Subprogram, extract


@dataclass(frozen=True)
class TemporalBlock:
    """The temporal block as a program from t to its frontier.

    Attributes:
        layers: the layers inside, by node name: fully qualified name.
        frontier: nodes through which t reaches the rest of the denoiser.
        layer_inputs: per layer, the nodes that feed it (a layer that runs twice has two).
        tables: per frontier node its layer, ``""`` where it is no layer's output.
    """

    denoiser: nn.Module
    layers: Mapping[str, str]
    frontier: tuple[str, ...]
    layer_inputs: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, str]
    timestep: str
    example_timestep: Tensor
    program: Subprogram

    def weights(self) -> dict[str, Tensor]:
        """Full-precision parameters and buffers that the block reads, by name."""
        state = dict(self.denoiser.named_parameters()) | dict(self.denoiser.named_buffers())
        return {name: state[name].detach() for name in self.program.parameters}

    def _batch(self, timesteps: Sequence[float]) -> Tensor:
        """``[T, *shape of one call's timestep]``."""
        example = self.example_timestep
        values = torch.tensor(timesteps, dtype=torch.float64).to(example.dtype)
        return values.reshape(-1, *[1] * example.dim()).expand(-1, *example.shape).to(example.device)

    def run(self, timesteps: Sequence[float], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every node the program computes, for every timestep: ``[T, ...]``.

        Args:
            timesteps: T values of t.
            weights: replacements for some of the block's weights (soft-rounded, quantized); differentiable.
        """
        parameters = self.weights() | dict(weights or {})

        def one(t: Tensor) -> dict[str, Tensor]:
            return self.program({self.timestep: t}, parameters)

        return torch.func.vmap(one)(self._batch(timesteps))

    def at(self, timestep: float) -> dict[str, Tensor]:
        """The frontier tensors at one timestep, with full-precision weights.

        The ops run unbatched, on as many samples as the example call had: bit for bit what the denoiser computes for
        such a call. (`run` batches over timesteps, and a larger product may round differently in the last bit.)
        """
        values = self.program({self.timestep: self._batch([timestep])[0].contiguous()}, self.weights())
        return {name: values[name] for name in self.frontier}

    def features(self, timesteps: Sequence[float], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The frontier tensors for every timestep: ``[T, ...]`` by node name."""
        values = self.run(timesteps, weights)
        return {name: values[name] for name in self.frontier}


def temporal_block(
    denoiser: nn.Module,
    example_inputs: Mapping[str, Any],
    timestep: str | None = None,
    found: Partition | None = None,
) -> TemporalBlock | None:
    """Find the temporal block and cut it out.

    Args:
        denoiser: any denoiser that ``torch.export`` can follow.
        example_inputs: keyword arguments of one call.
        timestep: name of the timestep argument, found by itself where it is usual.
        found: the denoiser's partition, if it is known already.

    Returns:
        The block; None when no layer depends on the timestep alone (every embedding mixes t with a condition).
    """
    timestep = find_timestep_argument(denoiser, timestep)
    inputs = number_to_tensor(dict(example_inputs), timestep)
    found = found or partition(denoiser, inputs, timestep=timestep)
    if not found.temporal:
        return None
    flow = Flow(found.graph, timestep, found.sample_argument)
    layers = {n: flow.layer(n) for n in flow.layer_nodes() if flow.layer(n) in found.temporal}
    frontier = [f for f in found.frontier if f.signature == "temporal" and f.upstream]
    layer_inputs: dict[str, tuple[str, ...]] = {}
    for node, layer in layers.items():
        source = flow.layer_input(node)
        if source is not None:
            layer_inputs[layer] = (*layer_inputs.get(layer, ()), source)
    nodes = [f.node for f in frontier] + [source for sources in layer_inputs.values() for source in sources]
    program = extract(denoiser, inputs, nodes, timestep)
    if set(program.inputs) - {timestep}:
        raise TraceError(f"the temporal block reads {sorted(set(program.inputs) - {timestep})} besides the timestep")
    example = dict(named_leaves(inputs))[timestep]
    return TemporalBlock(
        denoiser=denoiser,
        layers=layers,
        frontier=tuple(f.node for f in frontier),
        layer_inputs=layer_inputs,
        tables={f.node: f.layer for f in frontier},
        timestep=timestep,
        example_timestep=example.to(program.device),
        program=program,
    )
