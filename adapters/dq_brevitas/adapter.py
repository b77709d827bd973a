"""Adapter ``brevitas``: lower a plan into a Brevitas model, ready for training, calibration and export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
from brevitas.graph.quantize import layerwise_quantize
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import Tensor, nn

from dq_brevitas.lowering import layer_map
from dq_brevitas.plain import QUANT_CLASSES
from dq_brevitas.weights import weight_values
from dq_plugins.errors import PlanError
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized.installation import install_plan
from dq_plugins.quantized.table_lookup import Outside
from dq_plugins.timesteps import NonFinite, OutOfRange, TimestepContext

IMPLEMENTED = frozenset({"balance", "bias_correction", "clipped_ranges", "dynamic_ranges", "row_order"})
"""What layers of this adapter can do of `QuantPlan.features`."""


class BrevitasAdapter:
    """Backend ``brevitas``: fake quantization with trainable scales and stock Brevitas layers."""

    name = "brevitas"

    def apply(
        self,
        model: nn.Module,
        plan: QuantPlan,
        *,
        out_of_range: OutOfRange = "error",
        temporal_fallback: Outside = "error",
        non_finite: NonFinite = "nan",
    ) -> nn.Module:
        """Quantize ``model`` in place as the plan says.

        Args:
            model: the full-precision denoiser the plan was made for.
            plan: the plan.
            out_of_range: ``"error"`` or ``"nearest"`` for timesteps outside the calibrated range.
            temporal_fallback: ``"error"`` or ``"live"`` for timesteps outside the temporal table.
            non_finite: ``"nan"`` or ``"error"`` for calls with NaN or infinity among their arguments.

        Returns:
            The model, with Brevitas layers in place of the planned ones; other layers are untouched.

        Raises:
            PlanError: another model, a section this adapter does not implement, or a layer Brevitas cannot replace.
        """
        plan.validate()

        def replace(layers: Mapping[str, LayerPlan], context: TimestepContext) -> None:
            planned = sorted(name for name, layer in layers.items() if layer.quantized)
            _check_classes(model, planned)
            others = [n for n, m in model.named_modules() if isinstance(m, tuple(QUANT_CLASSES)) and n not in planned]
            layerwise_quantize(model, layer_map(plan, context), name_blacklist=others)
            for name in planned:
                if not isinstance(model.get_submodule(name), QuantWeightBiasInputOutputLayer):
                    raise PlanError(f"Brevitas did not replace layer {name!r}, which the plan quantizes")

        install_plan(
            model,
            plan,
            replace,
            adapter=self.name,
            implemented=IMPLEMENTED,
            out_of_range=out_of_range,
            temporal_fallback=temporal_fallback,
            non_finite=non_finite,
            weight_of=_quantized_weight,
        )
        return model


def _quantized_weight(layer: nn.Module) -> Tensor:
    # a layer that was left as it is has a plain weight
    weight: Any = weight_values(layer) if hasattr(layer, "quant_weight") else layer.weight
    return weight


def _check_classes(model: nn.Module, planned: list[str]) -> None:
    for name in planned:
        found = type(model.get_submodule(name))
        if found not in QUANT_CLASSES:
            known = ", ".join(sorted(c.__name__ for c in QUANT_CLASSES))
            raise PlanError(
                f"the plan quantizes {name!r}, a {found.__name__}; Brevitas replaces layers of exactly the classes "
                f"{known}, so a subclass would be skipped. Leave the layer out of the plan or use another backend."
            )
