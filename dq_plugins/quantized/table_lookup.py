"""The temporal table: what the temporal block computes, looked up by the value of t instead of computed.

For a fixed schedule the block takes finitely many values. Every layer through which t leaves the block becomes a table
with one row per timestep; layers that only feed those are not computed at all. Their weights leave the model.

Shapes: ``T`` timesteps, ``N`` rows of a layer's input; a table is ``[T, *F]``, a layer's output ``[N, *F]``.
Source: TFMQ-DM's journal version (Huang et al. 2024b), cache-based maintenance; only its abstract was available, so
the form of the table and of its quantization are our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dq_plugins.affine import per_row
from dq_plugins.errors import TimestepError
from dq_plugins.layer_kinds import LAYER_KINDS, kind_of
from dq_plugins.plan import QuantPlan, TabulatedBlock, TabulatedOutput
from dq_plugins.timesteps import RowOrder, TimestepContext, fit_to_input

Outside = Literal["error", "live"]


class TableLookup(nn.Module):
    """Stands in for a temporal layer: row ``t`` of a table, for every sample.

    Args:
        timesteps: ``[T]`` float32, ascending.
        rows: ``[T, *F]``: float, or int8 codes together with ``scale``.
        context: the denoiser's context, which knows the timestep of the running call.
        scale: float32 ``[T]``, of int8 rows.
        dtype: dtype of the output.
        live: the full-precision layer, to compute timesteps that the table lacks; None makes them an error.
        order: where the samples of a call are in the layer's input.
    """

    timesteps: Tensor
    rows: Tensor
    scale: Tensor | None

    def __init__(
        self,
        timesteps: Tensor,
        rows: Tensor,
        context: TimestepContext,
        *,
        scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        live: nn.Module | None = None,
        order: RowOrder | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps)
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)
        self.context, self.dtype, self.live, self.order = context, dtype, live, order

    def forward(self, x: Tensor) -> Tensor:
        """Rows for the timesteps of the running call; only the number of samples of ``x`` is read."""
        t = self.context.selection.timestep
        if torch.compiler.is_compiling() or t.device.type != "cpu":
            # Nothing can be raised here without stalling the device: be loud in the values.
            index, known = self._locate(t)
        else:
            index = self._index_on_host(t)
            if index is None:
                assert self.live is not None
                return self.live(x)
            known = None
        if index.numel() > 1:
            index = fit_to_input(index, x, rows=self.order)
        out = self._rows(index.reshape(-1))
        if known is not None:
            unknown = (~known).to(torch.uint8)
            unknown = fit_to_input(unknown, x, rows=self.order) if unknown.numel() > 1 else unknown
            out = out.masked_fill(per_row(unknown.reshape(-1), out) > 0, math.nan)
        if index.numel() == 1:
            return out.expand(x.shape[0], *out.shape[1:])
        return out.reshape(*index.shape, *out.shape[1:])

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Row of every timestep, and whether it is that timestep's."""
        t = t.float()
        index = torch.bucketize(t, self.timesteps).clamp(max=len(self.timesteps) - 1)
        return index, self.timesteps[index] == t

    def _index_on_host(self, t: Tensor) -> Tensor | None:
        """Row of every timestep, looked up once a call by the first of the tables; None to compute live."""
        found = self.context.selection.per_call
        key = ("temporal-table", self.timesteps.data_ptr())  # the tables of a denoiser share their timesteps
        if key not in found:
            index, known = self._locate(t)
            found[key] = index if bool(known.all()) else None
            if found[key] is None and self.live is None:
                raise TimestepError(self._message(float(t[~known][0])))
        return found[key]

    def _rows(self, index: Tensor) -> Tensor:
        out = self.rows.index_select(0, index).to(self.dtype)
        if self.scale is None:
            return out
        return out * per_row(self.scale.index_select(0, index).to(self.dtype), out)

    def _message(self, t: float) -> str:
        nearest = float(self.timesteps[(self.timesteps - t).abs().argmin()])
        return (
            f"timestep {t:g} is not in the temporal table, which holds the {len(self.timesteps)} timesteps of one "
            f"schedule (nearest: {nearest:g}). Sample with that schedule, make a plan for this one, or apply the plan "
            "with temporal_fallback='live', which keeps the temporal block for timesteps outside the table."
        )


class NotComputed(nn.Module):
    """Stands in for a layer whose output only tables would read: right shape, no weights, no work."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight: Any = layer.weight
        self.kind, self.dtype = kind_of(layer) or LAYER_KINDS["linear"], weight.dtype
        self.outputs = self.kind.outputs(weight.shape, getattr(layer, "groups", 1))

    def forward(self, x: Tensor) -> Tensor:
        """Zeros that take no memory: ``x`` with the layer's number of channels, as many positions as it has."""
        shape = [*x.shape, 1] if self.kind.lookup else list(x.shape)
        shape[self.kind.channel_axis] = self.outputs
        return x.new_zeros((), dtype=self.dtype if self.kind.lookup else x.dtype).expand(shape)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes ``[T, *F]`` and one scale per timestep ``[T]``."""
    flat = rows.flatten(1).float()
    scale = (flat.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round(flat * (1.0 / scale)[:, None]).clamp(-127, 127)
    return codes.reshape(rows.shape).to(torch.int8), scale


def install_tables(
    model: nn.Module, plan: QuantPlan, context: TimestepContext, fallback: Outside = "error"
) -> ExitStack:
    """Put the plan's temporal table into a denoiser: for good, or for the length of a ``with`` block.

    Args:
        model: the denoiser.
        plan: a plan; without a temporal table nothing happens.
        context: the context that will be attached to the denoiser.
        fallback: ``"live"`` keeps the temporal block in full precision for timesteps outside the table (its weights
            then stay in the model); ``"error"`` refuses them.

    Returns:
        What puts the layers back when it is closed.
    """
    table = plan.temporal_table
    stack = ExitStack()
    if table is None:
        return stack
    timesteps = torch.tensor(table.timesteps, dtype=torch.float32)
    for name, output in table.outputs.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        lookup = TableLookup(
            timesteps.to(weight.device),
            output.rows.to(weight.device),
            context,
            scale=None if output.scale is None else output.scale.to(weight.device),
            dtype=weight.dtype,
            live=layer if fallback == "live" else None,
            order=plan.layers[name].rows,
        )
        stack.callback(model.set_submodule, name, layer)
        _replace(model, name, lookup)
    if fallback == "error":
        for name in table.not_computed:
            layer = model.get_submodule(name)
            stack.callback(model.set_submodule, name, layer)
            _replace(model, name, NotComputed(layer))
    return stack


def _replace(model: nn.Module, name: str, stand_in: nn.Module) -> None:
    """Put a stand-in in a layer's place, with the sizes that code around a layer may read."""
    layer = model.get_submodule(name)
    for size in ("in_features", "out_features", "in_channels", "out_channels"):
        if hasattr(layer, size):
            setattr(stand_in, size, getattr(layer, size))
    model.set_submodule(name, stand_in)


def tabulated(
    timesteps: tuple[float, ...],
    features: Mapping[str, Tensor],
    not_computed: Iterable[str] = (),
    int8: frozenset[str] = frozenset(),
) -> TabulatedBlock:
    """The table as a plan holds it.

    Args:
        timesteps: T timesteps, ascending.
        features: per layer its output for every timestep, ``[T, *F]``.
        not_computed: layers that only feed these.
        int8: layers whose rows are stored as int8.
    """
    outputs = {
        name: TabulatedOutput(*(quantize_rows(rows) if name in int8 else (rows,))) for name, rows in features.items()
    }
    return TabulatedBlock(timesteps, outputs, tuple(sorted(not_computed)))
