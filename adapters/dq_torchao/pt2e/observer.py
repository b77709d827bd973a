"""The PT2E observer with one range per timestep group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase

from dq_torchao.pt2e.rewrite import (
    LINEAR,
    Row,
    insert_tables,
    quantize_by_table,
    quantize_in_units,
    select_column,
)
from dq_torchao.pt2e.shared_calibration import SharedCalibration, TimestepRecorder


class TimestepGroupObserver(ObserverBase):
    """Streams an activation's statistics by timestep; at conversion becomes a quantizer with a table.

    Args:
        shared: what all observers of a graph share.
        symmetric: whether the zero point is fixed at 0.
        dtype: dtype of the codes; the rest is what `QuantizationSpec` passes on.
    """

    def __init__(self, shared: SharedCalibration, symmetric: bool, dtype: torch.dtype = torch.uint8, **_: Any) -> None:
        super().__init__(dtype)
        self.shared, self.symmetric = shared, symmetric
        self.column = shared.new_column(symmetric)

    def forward(self, x: Tensor) -> Tensor:
        """See ``x``; it is returned unchanged."""
        self.shared.observe(self.column, x)
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and signed zero point of every group, ``[G]``."""
        tables = self.shared.tables()
        return tables.scale[:, self.column], tables.zero_point[:, self.column]

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """``convert_pt2e`` calls this for the observer's node."""
        current = select_column(model, node, _row(model, self.shared), self.column)
        if all(user.target is LINEAR for user in node.users):
            quantize_by_table(model, node, current)
        else:
            quantize_in_units(model, node, current.scale, None if self.symmetric else current.zero_point)
        for unused in (parameter for parameter in current if not parameter.users):
            model.graph.erase_node(unused)


def _row(model: fx.GraphModule, shared: SharedCalibration) -> Row:
    """The current parameters of all activations; the first observer to be converted inserts them."""
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        if node.op == "call_module" and isinstance(modules.get(node.target), TimestepRecorder):
            model.meta["dq_row"] = insert_tables(model, node, shared.tables())
            break
    return model.meta["dq_row"]
