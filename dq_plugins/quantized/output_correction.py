"""What is added to the output of a simulated layer, by timestep group and output channel.

Shapes: ``G`` timestep groups, ``O`` output channels, ``B`` samples and ``T`` tokens of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq_plugins.layer_kinds import LayerKind
from dq_plugins.plan import BiasCorrection
from dq_plugins.quantized.exact_state import ExactState
from dq_plugins.timesteps import RowOrder, TimestepContext, fit_to_input


class OutputCorrection(ExactState):
    """Adds the row of the running call's timestep group.

    Args:
        correction: the table ``[G, O]``.
        context: of the denoiser.
        kind: of the layer whose output it is.
        device: where the table lives.
        rows: where the samples of a call are in its input, and in its output.
    """

    exact_state = ("values",)

    values: Tensor

    def __init__(
        self,
        correction: BiasCorrection,
        context: TimestepContext,
        kind: LayerKind,
        device: torch.device,
        rows: RowOrder | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.context, self.kind, self.rows = correction.groups, context, kind, rows
        self.register_buffer("values", correction.values.to(device, copy=True))

    def forward(self, y: Tensor) -> Tensor:
        """``y`` with its correction."""
        if self.groups is None:
            return y + self.kind.per_output(self.values[0]).to(y.dtype)
        index = self.context.index(self.groups).to(self.values.device)
        return y + rows_for_output(self.kind, self.values, index, y, self.rows).to(y.dtype)


def rows_for_output(kind: LayerKind, table: Tensor, index: Tensor, y: Tensor, rows: RowOrder | None = None) -> Tensor:
    """Rows of a table for the samples or tokens of a layer's output, as they broadcast against it.

    Args:
        kind: of the layer.
        table: ``[G, O]``.
        index: ``[1]``, ``[B]`` or ``[B, T]``.
        y: the output, see `dq_plugins.timesteps.fit_to_input`.
        rows: likewise.
    """
    if index.numel() == 1:
        return kind.per_output(table.index_select(0, index.reshape(-1)).reshape(-1))
    fitted = fit_to_input(index, y, kind.spatial, rows)  # [N], [S, B] or [B, T]
    return spread_channels(kind, table.index_select(0, fitted.reshape(-1)).reshape(*fitted.shape, -1), y)


def spread_channels(kind: LayerKind, rows: Tensor, y: Tensor) -> Tensor:
    """``[N, O]`` or ``[B, T, O]``, as a view that broadcasts against a layer's output ``[N, ..., O, ...]``."""
    lead = rows.shape[:-1]
    return rows.reshape(*lead, *[1] * (y.dim() - len(lead) - 1 - kind.spatial), -1, *[1] * kind.spatial)
