"""Pass ``temporal-table``: tabulate what the temporal block computes over the schedule.

Storage of a boundary tensor is chosen per layer: ``float`` rows are exact; ``int8`` rows are a quarter of the size;
``auto`` takes int8 rows where they disturb the feature less than the quantized temporal block would, float rows
elsewhere. ``selected`` is the disturbance-aware selection of TFMQ-DM's journal version: int8 rows where they disturb
less, and elsewhere the quantized block goes on computing the feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dq_plugins.affine import per_row
from dq_plugins.passes.temporal.block import TemporalBlock, shared_block
from dq_plugins.passes.temporal.features import feature_error
from dq_plugins.plan import QuantPlan, Reason, Section
from dq_plugins.quantized.table_lookup import quantize_rows, tabulated
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress


class TemporalTable(Pass):
    """Look up what depends on the timestep alone, instead of computing it."""

    name = "temporal-table"
    after = ("temporal-reconstruction", "finite-set-ranges", "timestep-reduction")

    class Options(PassOptions):
        """Options of ``temporal-table``.

        Attributes:
            storage: ``"float"``, ``"int8"``, ``"auto"`` or ``"selected"``.
        """

        storage: Literal["float", "int8", "auto", "selected"] = "float"

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``plan.temporal_table``; the tabulated layers lose their quantizers."""
        block = shared_block(context, whole_batch=True)
        nodes = {} if block is None else {node: layer for node, layer in block.tables.items() if layer}
        if block is None or len(nodes) < len(block.tables) or len(set(nodes.values())) < len(nodes):
            reason = "no layer depends on the timestep alone" if block is None else "t leaves the block between layers"
            plan.sections[self.name] = Section({"skipped": reason})
            return
        timesteps = plan.visited.sorted
        computed = [block.at(t) for t in timesteps]
        features = {layer: torch.cat([row[node][:1] for row in computed]) for node, layer in nodes.items()}
        yield Progress(len(timesteps), len(timesteps))
        int8 = self._int8(block, plan, features, nodes)
        rest = sorted(block.layers - set(features))
        if self.options.storage == "selected" and int8 < set(features):
            # what feeds a feature that is still computed goes on running
            features, rest = {layer: rows for layer, rows in features.items() if layer in int8}, []
        if not features:
            plan.sections[self.name] = Section(
                {"skipped": "the quantized block disturbs every feature less than a table"}
            )
            return
        plan.temporal_table = tabulated(timesteps, features, rest, int8)
        for name in [*features, *rest]:
            layer = plan.layers[name]
            layer.weight = layer.activation = None
            text = "looked up in the temporal table" if name in features else "only the temporal table would read it"
            layer.unquantized_reason = Reason(text, "tabulated")

    def _int8(
        self, block: TemporalBlock, plan: QuantPlan, features: dict[str, Tensor], nodes: dict[str, str]
    ) -> frozenset[str]:
        if self.options.storage in ("float", "int8"):
            return frozenset(features) if self.options.storage == "int8" else frozenset()
        quantized = block.features(block.points(plan.visited.sorted), block.planned_weights(plan))
        chosen = set()
        for node, layer in nodes.items():
            codes, scale = quantize_rows(features[layer])
            restored = codes * per_row(scale, codes)
            table = feature_error({layer: features[layer]}, {layer: restored}).relative
            if table < feature_error({layer: features[layer]}, {layer: quantized[node][:, 0]}).relative:
                chosen.add(layer)
        return frozenset(chosen)
