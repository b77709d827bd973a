"""The run table: what depends on t and the conditions but not on the sample, computed once per sampling run.

In DiT, SDXL, SD3 and FLUX the embedding of t is mixed with a class, a size, a guidance scale or pooled text, so it is
no function of t alone; but for one sampling run the conditions are fixed and the timesteps known. All steps are then
computed in one batched call before the loop, and each step looks its rows up. Nothing is approximated and no weight
is removed: this saves time, not memory.

Shapes: ``T`` timesteps, ``B`` samples; a table is ``[T, B, *F]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.errors import TimestepError, TraceError
from dq_plugins.graph import Partition, partition
from dq_plugins.graph.arguments import named_leaves, number_to_tensor
from dq_plugins.passes.temporal.subprogram import Subprogram, extract
from dq_plugins.quantized.stand_in import keep_sizes
from dq_plugins.timesteps import TimestepContext, attach_context, detach_context


class _Rows(nn.Module):
    """Stands in for a layer during a run: its rows for the running timestep. ``timesteps`` ascend."""

    timesteps: Tensor
    rows: Tensor

    def __init__(self, timesteps: Tensor, rows: Tensor, context: TimestepContext) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps)
        self.register_buffer("rows", rows)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        t = self.context.timestep
        assert t is not None
        index = torch.bucketize(t.float()[:1], self.timesteps).clamp(max=len(self.timesteps) - 1)
        known = self.timesteps[index] == t
        on_host = t.device.type == "cpu" and not torch.compiler.is_compiling()
        if x.shape[0] != self.rows.shape[1] or (on_host and not bool(known.all())):
            steps, batch = self.rows.shape[:2]
            raise TimestepError(
                f"the run table holds {steps} timesteps for a batch of {batch}, and was asked for t={t.tolist()[:4]} "
                f"and a batch of {x.shape[0]}. Compute it for this schedule and these conditions."
            )
        row = self.rows.index_select(0, index)[0]
        return row.masked_fill(~known.all(), math.nan)  # where nothing can be raised, be loud in the values


class _Skipped(nn.Module):
    """Stands in for a layer that only feeds tabulated ones: zeros of its output's shape, at no cost."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return torch.zeros((), dtype=dtype, device=x.device).expand(x.shape[0], *self.shape)


class RunTable:
    """Computes and installs the rows of one sampling run.

    Args:
        denoiser: the denoiser, full-precision or simulated.
        example_inputs: keyword arguments of one call of the run: shapes and conditions.
        timestep: name of the timestep argument, found by itself where it is usual.

    Raises:
        TraceError: nothing can be tabulated, or t reaches the sample between layers.
    """

    def __init__(self, denoiser: nn.Module, example_inputs: Mapping[str, Any], timestep: str | None = None) -> None:
        found = partition(denoiser, dict(example_inputs), timestep=timestep)
        frontier = [f for f in found.frontier if "sample" in f.reaches and f.upstream]
        if not frontier or not all(f.layer for f in frontier):
            raise TraceError("no layer output carries the timestep to the sample, so there is nothing to tabulate")
        self.denoiser, self.timestep = denoiser, found.timestep
        inputs = number_to_tensor(dict(example_inputs), found.timestep)
        self.program: Subprogram = extract(denoiser, inputs, [f.node for f in frontier], found.timestep)
        self.nodes = {f.node: f.layer for f in frontier}
        self.skipped = _only_upstream(found, set(self.nodes.values()), frontier)
        self.layers = found.layers

    @torch.no_grad()
    def compute(self, timesteps: Sequence[float], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rows ``[T, B, *F]`` of every tabulated layer, in one batched call.

        Args:
            timesteps: the schedule.
            inputs: keyword arguments of any call of the run; only the conditions are read.
        """
        leaves = {n: v for n, v in named_leaves(number_to_tensor(dict(inputs), self.timestep)) if torch.is_tensor(v)}
        example = leaves.pop(self.timestep)
        state = dict(self.denoiser.named_parameters()) | dict(self.denoiser.named_buffers())
        values = torch.tensor(timesteps, dtype=torch.float64).to(device=example.device, dtype=example.dtype)
        batch = values.reshape(-1, *[1] * example.dim()).expand(-1, *example.shape)

        def one(t: Tensor) -> dict[str, Tensor]:
            return self.program(leaves | {self.timestep: t}, state)

        rows = torch.func.vmap(one)(batch)
        tables: dict[str, Tensor] = {}
        for node, layer in self.nodes.items():
            if layer in tables and not torch.allclose(tables[layer], rows[node]):
                raise TraceError(f"layer {layer!r} runs twice on different inputs; it cannot be tabulated")
            tables[layer] = rows[node]
        return tables

    @contextmanager
    def installed(self, timesteps: Sequence[float], inputs: Mapping[str, Any]) -> Iterator[nn.Module]:
        """The denoiser with the rows of one run in place; everything is restored afterwards.

        Example::

            table = RunTable(pipe.transformer, first_call)
            with table.installed(pipe.scheduler.timesteps.tolist(), first_call):
                pipe(...)
        """
        timesteps = sorted({float(t) for t in timesteps})
        rows = self.compute(timesteps, inputs)
        context = TimestepContext({})
        originals = {name: self.denoiser.get_submodule(name) for name in [*rows, *self.skipped]}
        times = torch.tensor(timesteps, dtype=torch.float32, device=self.program.device)
        for name, table in rows.items():
            self.denoiser.set_submodule(name, keep_sizes(_Rows(times, table, context), originals[name]))
        for name in self.skipped:
            nothing = _Skipped(tuple(self.layers[name].output_shape[1:]))
            self.denoiser.set_submodule(name, keep_sizes(nothing, originals[name]))
        attach_context(self.denoiser, context, self.timestep)
        try:
            yield self.denoiser
        finally:
            detach_context(self.denoiser)
            for name, module in originals.items():
                self.denoiser.set_submodule(name, module)


def _only_upstream(found: Partition, tabulated: set[str], frontier: Sequence[Any]) -> tuple[str, ...]:
    """Layers that nothing but tabulated layers reads."""
    upstream = frozenset().union(*(f.upstream for f in frontier))
    candidates = (found.temporal | found.mixed) & upstream
    return tuple(sorted(candidates - tabulated))
