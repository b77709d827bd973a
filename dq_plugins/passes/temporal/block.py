"""The temporal block of a denoiser: a view of the modules that depend on t alone, runnable by itself.

Where a denoiser mixes the embedding of t with conditions (DiT: a class), the block can be taken wider: everything that
does not see the sample. It then is a function of t and the conditions.

Shapes: ``T`` timesteps, ``P`` points (see `dq_plugins.passes.temporal.finite_set`); a feature is a boundary tensor for
every one of them, ``[T, ...]`` or ``[P, ...]``.
Source: TFMQ-DM (Huang et al. 2024), "Temporal Information Block"; found from the graph instead of by names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import TraceError
from dq_plugins.graph import find_timestep_argument, partition
from dq_plugins.graph.arguments import named_leaves, number_to_tensor
from dq_plugins.graph.flow import Flow
from dq_plugins.passes.temporal.subprogram import Subprogram, extract
from dq_plugins.plan import QuantPlan
from dq_plugins.recipe import PassContext


@dataclass(frozen=True)
class TemporalBlock:
    """The temporal block as a program from t to its boundary.

    Attributes:
        layers: the layers inside, by fully qualified name.
        layer_inputs: per layer, the nodes that feed it (a layer that runs twice has two).
        tables: the nodes through which t reaches the rest of the denoiser, and whose layer's output each is (``""``
            where it is not a layer's).
        conditions: dotted names of the arguments that the block reads besides t.
    """

    denoiser: nn.Module
    layers: frozenset[str]
    layer_inputs: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, str]
    timestep: str
    example_timestep: Tensor
    program: Subprogram
    conditions: tuple[str, ...] = ()

    def weights(self) -> dict[str, Tensor]:
        """Full-precision parameters and buffers that the block reads, by name."""
        state = dict(self.denoiser.named_parameters()) | dict(self.denoiser.named_buffers())
        return {name: state[name].detach() for name in self.program.parameters}

    def planned_weights(self, plan: QuantPlan) -> dict[str, Tensor]:
        """The quantized weights that the planned block computes with, by parameter name."""
        weights, quants = self.weights(), {layer: plan.layers[layer].weight for layer in self.layers}
        names = {f"{layer}.weight": quant for layer, quant in quants.items() if quant is not None}
        return {name: quant.fake_quantize(weights[name]) for name, quant in names.items()}

    def points(self, timesteps: Sequence[float]) -> dict[str, Tensor]:
        """The timestep as an input of `run`, for T values of it: ``[T, *shape of one call's timestep]``."""
        example = self.example_timestep
        values = torch.tensor(timesteps, dtype=torch.float64).to(example.dtype)
        return {self.timestep: values.reshape(-1, *[1] * example.dim()).expand(-1, *example.shape).to(example.device)}

    def run(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every node the program computes, for P points: ``[P, ...]``.

        Args:
            inputs: the timestep and the conditions, ``[P, *shape in one call]``, by name.
            weights: replacements for some of the block's weights (soft-rounded, quantized); differentiable.
        """
        parameters = self.weights() | dict(weights or {})
        return torch.func.vmap(lambda point: self.program(point, parameters))(dict(inputs))

    def features(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The boundary tensors for P points: ``[P, ...]`` by node name; arguments as for `run`."""
        values = self.run(inputs, weights)
        return {name: values[name] for name in self.tables}

    def at(self, timestep: float) -> dict[str, Tensor]:
        """The boundary tensors at one timestep, with full-precision weights.

        The ops run unbatched, on as many samples as the example call had: bit for bit what the denoiser computes for
        such a call. (`run` batches over timesteps, and a larger product may round differently in the last bit.)
        """
        values = self.program({self.timestep: self.points([timestep])[self.timestep][0].contiguous()}, self.weights())
        return {name: values[name] for name in self.tables}


def temporal_block(
    denoiser: nn.Module,
    example_inputs: Mapping[str, Any],
    timestep: str | None = None,
    *,
    with_conditions: bool = False,
) -> TemporalBlock | None:
    """Find the temporal block and cut it out.

    Args:
        denoiser: any denoiser that ``torch.export`` can follow.
        example_inputs: keyword arguments of one call.
        timestep: name of the timestep argument, found by itself where it has a usual name.
        with_conditions: include the layers that mix t with conditions; the boundary is then where t meets the sample.

    Returns:
        The block; None when no layer depends on the timestep alone (every embedding mixes t with a condition), or,
        with conditions, none on the timestep without the sample.
    """
    timestep = find_timestep_argument(denoiser, timestep)
    inputs = number_to_tensor(dict(example_inputs), timestep)
    found = partition(denoiser, inputs, timestep=timestep)
    members = found.temporal | found.mixed if with_conditions else found.temporal
    if not members:
        return None
    flow = Flow(found.graph, timestep, found.sample_argument)
    layers = {n: flow.layer(n) for n in flow.layer_nodes() if flow.layer(n) in members}
    boundary = [
        f
        for f in found.block_boundary
        if f.upstream and ("sample" in f.reaches if with_conditions else f.signature == "temporal")
    ]
    layer_inputs: dict[str, tuple[str, ...]] = {}
    for node, layer in layers.items():
        source = flow.layer_input(node)
        if source is not None:
            layer_inputs[layer] = (*layer_inputs.get(layer, ()), source)
    nodes = [f.node for f in boundary] + [source for sources in layer_inputs.values() for source in sources]
    program = extract(denoiser, inputs, nodes, timestep)
    conditions = tuple(name for name in program.inputs if name != timestep)
    if conditions and not with_conditions:
        raise TraceError(f"the temporal block reads {list(conditions)} besides the timestep")
    return TemporalBlock(
        denoiser=denoiser,
        layers=frozenset(layers.values()),
        layer_inputs=layer_inputs,
        tables={f.node: f.layer for f in boundary},
        timestep=timestep,
        example_timestep=dict(named_leaves(inputs))[timestep].to(program.device),
        program=program,
        conditions=conditions,
    )


def shared_block(
    context: PassContext, *, whole_batch: bool = False, with_conditions: bool = False
) -> TemporalBlock | None:
    """The denoiser's temporal block, found once per run.

    Args:
        context: the run.
        whole_batch: cut it out of a call with as many samples as were recorded, instead of one sample: bit for bit
            what such calls compute, but slower.
        with_conditions: include the layers that mix t with conditions.
    """

    def find() -> TemporalBlock | None:
        call = next(context.calibration.calls())
        one = call if whole_batch else call.rows(torch.tensor([0]), len(call.output))
        argument = context.calibration.timestep_argument
        return temporal_block(context.denoiser, one.kwargs, argument, with_conditions=with_conditions)

    return context.shared(("temporal-block", whole_batch, with_conditions), find)
