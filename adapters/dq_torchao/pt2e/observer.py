"""The PT2E observer with one range per timestep group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase

from dq_torchao.pt2e.calibration import SharedCalibration, TimestepRecorder
from dq_torchao.pt2e.rewrite import aten, insert_tables, quantize_in_units


class TimestepGroupObserver(ObserverBase):
    """Streams an activation's statistics by timestep; at conversion becomes a quantizer with a table.

    Args:
        shared: what all observers of a graph share.
        dtype: dtype of the codes; the rest is what `QuantizationSpec` passes on.
    """

    def __init__(self, shared: SharedCalibration, dtype: torch.dtype = torch.uint8, **_: Any) -> None:
        super().__init__(dtype)
        self.shared = shared
        self.column = shared.new_column()

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
        graph = model.graph
        rows = _rows(model, self.shared)
        with graph.inserting_before(node):
            scale, zero_point = (graph.call_function(aten.select.int, (row, 0, self.column)) for row in rows)
        if self.shared.symmetric:
            graph.erase_node(zero_point)
        quantize_in_units(model, node, scale, None if self.shared.symmetric else zero_point)


def _rows(model: fx.GraphModule, shared: SharedCalibration) -> tuple[fx.Node, fx.Node]:
    """Nodes of the current scales and zero points; the first observer to be converted inserts them."""
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        if node.op == "call_module" and isinstance(modules.get(node.target), TimestepRecorder):
            model.meta["dq_rows"] = insert_tables(model, node, shared.tables())
            break
    return model.meta["dq_rows"]
