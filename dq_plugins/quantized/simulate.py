"""Plain fake quantization of a plan: the reference every integer execution is compared with.

Each planned layer keeps its class and its name, see `dq_plugins.quantized.layer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.installation import install_plan
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.quantized.table_lookup import Outside
from dq_plugins.timesteps import NonFinite, OutOfRange, TimestepContext

IMPLEMENTED = frozenset(
    {
        "balance",
        "bias_correction",
        "dynamic_group_widths",
        "dynamic_ranges",
        "clipped_ranges",
        "group_scale",
        "group_widths",
        "low_rank",
        "rotation",
        "row_order",
        "subspace",
    }
)


class SimulateAdapter:
    """Backend ``simulate``: fake quantization in plain PyTorch, no framework, no speed-up."""

    name = "simulate"

    def apply(
        self,
        model: nn.Module,
        plan: QuantPlan,
        *,
        out_of_range: OutOfRange = "error",
        temporal_fallback: Outside = "error",
        non_finite: NonFinite = "nan",
    ) -> nn.Module:
        """Simulate ``plan`` on ``model`` in place.

        Args:
            model: the full-precision denoiser the plan was made for.
            plan: the plan.
            out_of_range: ``"error"`` or ``"nearest"`` for timesteps outside the calibrated range.
            temporal_fallback: ``"error"`` or ``"live"`` for timesteps outside the temporal table.
            non_finite: ``"nan"`` or ``"error"`` for calls with NaN or infinity among their arguments.
        """
        model.requires_grad_(False)

        def simulate(layers: Mapping[str, LayerPlan], context: TimestepContext) -> None:
            for name, layer in layers.items():
                if layer.quantized:
                    simulate_layer(model.get_submodule(name), layer, context)

        install_plan(
            model,
            plan,
            simulate,
            adapter=self.name,
            implemented=IMPLEMENTED,
            out_of_range=out_of_range,
            temporal_fallback=temporal_fallback,
            non_finite=non_finite,
        )
        return model
