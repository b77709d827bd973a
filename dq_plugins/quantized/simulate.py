"""Plain fake quantization of a plan: the reference every integer execution is compared with.

Each planned layer keeps its class and its name, see `dq_plugins.quantized.layer`.
"""

from __future__ import annotations

from torch import nn

from dq_plugins.plan import QuantPlan
from dq_plugins.quantized import exact_tokens as tokens
from dq_plugins.quantized import table_lookup
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import OutOfRange, TimestepContext, attach_context

IMPLEMENTED = frozenset({"temporal_table", "outlier_rows", "balance", "bias_correction"})


class SimulateAdapter:
    """Backend ``simulate``: fake quantization in plain PyTorch, no framework, no speed-up."""

    name = "simulate"

    def apply(
        self,
        model: nn.Module,
        plan: QuantPlan,
        *,
        out_of_range: OutOfRange = "error",
        temporal_fallback: table_lookup.Outside = "error",
    ) -> nn.Module:
        """Simulate ``plan`` on ``model`` in place.

        Args:
            model: the full-precision denoiser the plan was made for.
            plan: the plan.
            out_of_range: ``"error"`` or ``"nearest"`` for timesteps outside the calibrated range.
            temporal_fallback: ``"error"`` or ``"live"`` for timesteps outside the temporal table.
        """
        plan.refuse_unimplemented(IMPLEMENTED, self.name)
        plan.check_model(model)
        model.requires_grad_(False)
        context = TimestepContext(plan.groups, out_of_range)
        tabulated = table_lookup.install_tables(model, plan, context, temporal_fallback)
        for name, layer_plan in plan.layers.items():
            if name not in tabulated and layer_plan.quantized:
                simulate_layer(model.get_submodule(name), layer_plan, context)
        tokens.install_tokens(model, plan)
        attach_context(model, context, plan.timestep_argument)
        return model
