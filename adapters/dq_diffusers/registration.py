"""Entry of our quantizer in diffusers' table, beside diffusers' own for torchao.

Kept apart from the quantizer: the entry is made while diffusers is still being imported.
"""

from __future__ import annotations

from typing import Any

METHOD = "torchao"


def register_quantizer(table: dict[str, Any]) -> None:
    """Put the choice of `dq_diffusers.quantizer.PlanQuantizer` in front of the quantizer for torchao.

    Args:
        table: ``AUTO_QUANTIZER_MAPPING`` of ``diffusers.quantizers.auto``. A second call changes nothing.
    """
    before = table[METHOD]
    if getattr(before, "chooses_plan_quantizer", False):
        return

    def quantizer_for(quantization_config: Any, **kwargs: Any) -> Any:
        from dq_torchao.serializable import CheckpointConfig, PlanConfig, TimestepInt8Config

        if not isinstance(quantization_config.quant_type, CheckpointConfig | PlanConfig | TimestepInt8Config):
            return before(quantization_config, **kwargs)
        from dq_diffusers.quantizer import PlanQuantizer

        return PlanQuantizer(quantization_config, **kwargs)

    quantizer_for.chooses_plan_quantizer = True  # type: ignore[attr-defined]
    table[METHOD] = quantizer_for
