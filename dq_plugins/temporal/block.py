"""The temporal block of a denoiser: a view of the modules that depend on t alone, runnable by itself.

Shapes: ``T`` timesteps; a feature is a frontier tensor for every timestep, ``[T, ...]``.
Source: TFMQ-DM (Huang et al. 2024), "Temporal Information Block"; found from the graph instead of by names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import TraceError
from dq_plugins.graph import find_timestep_argument, partition, trace
from dq_plugins.graph.arguments import named_leaves, number_to_tensor
from dq_plugins.graph.flow import Flow
from dq_plugins.temporal.subprogram import Subprogram, extract


@dataclass(frozen=True)
class TemporalBlock:
    """The temporal block as a program from t to its frontier.

    Attributes:
        layers: the layers inside, by node name: fully qualified name.
        frontier: nodes through which t reaches the rest of the denoiser.
        layer_inputs: per layer, the node that feeds it.
    """

    denoiser: nn.Module
    layers: Mapping[str, str]
    frontier: tuple[str, ...]
    layer_inputs: Mapping[str, str]
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

    def features(self, timesteps: Sequence[float], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The frontier tensors for every timestep: ``[T, ...]`` by node name."""
        values = self.run(timesteps, weights)
        return {name: values[name] for name in self.frontier}

    @cached_property
    def weight_names(self) -> dict[str, str]:
        """Per layer its weight's parameter name."""
        return {layer: f"{layer}.weight" for layer in self.layers.values()}


def temporal_block(
    denoiser: nn.Module, example_inputs: Mapping[str, Any], timestep: str | None = None
) -> TemporalBlock | None:
    """Find the temporal block and cut it out.

    Args:
        denoiser: any denoiser that ``torch.export`` can follow.
        example_inputs: keyword arguments of one call.
        timestep: name of the timestep argument, found by itself where it is usual.

    Returns:
        The block; None when no layer depends on the timestep alone (every embedding mixes t with a condition).
    """
    timestep = find_timestep_argument(denoiser, timestep)
    inputs = number_to_tensor(dict(example_inputs), timestep)
    found = partition(denoiser, inputs, timestep=timestep)
    if not found.temporal:
        return None
    flow = Flow(trace(denoiser, inputs), timestep, found.sample_argument)
    layers = {n: flow.layer(n) for n in flow.layer_nodes() if flow.layer(n) in found.temporal}
    frontier = _frontier(flow)
    layer_inputs = {layer: source for n, layer in layers.items() if (source := flow.layer_input(n)) is not None}
    program = extract(denoiser, inputs, [*frontier, *layer_inputs.values()], timestep)
    if set(program.inputs) - {timestep}:
        raise TraceError(f"the temporal block reads {sorted(set(program.inputs) - {timestep})} besides the timestep")
    example = dict(named_leaves(inputs))[timestep]
    return TemporalBlock(denoiser, layers, frontier, layer_inputs, timestep, example.to("cpu"), program)


def _frontier(flow: Flow) -> tuple[str, ...]:
    """Nodes that depend on t alone and that a node reads which depends on more."""
    temporal: Callable[[str], bool] = lambda n: flow.signature[n] == "temporal"  # noqa: E731
    return tuple(
        n
        for n in flow.graph
        if temporal(n)
        and not n.startswith("input:")
        and flow.shape(n) is not None
        and any(not temporal(s) for s in flow.graph.successors(n))
    )
