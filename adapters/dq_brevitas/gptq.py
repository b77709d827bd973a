"""GPTQ that is refused where it would do nothing or harm.

GPTQ corrects a weight column by column and quantizes one column at a time. A weight quantizer that computes its scale
from the tensor it is given then takes the range of that one column: per channel every column becomes exactly its own
maximum, the measured error is zero and nothing is corrected; per tensor or with a zero point the output gets worse than
without GPTQ. Learned rounding is as bad: its decisions belong to the weights before correction. Scales that are
parameters do not depend on what they quantize.
"""

from __future__ import annotations

from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
from brevitas.core.scaling import StatsFromParameterScaling
from brevitas.core.zero_point import ParameterFromStatsFromParameterZeroPoint, StatsFromParameterZeroPoint
from brevitas.graph.gptq import gptq_mode as brevitas_gptq_mode
from brevitas.inject.enum import ScalingImplType
from torch import nn

from dq_brevitas.weights import quantized_layers
from dq_plugins.errors import DQError

_FROM_SLICE = (StatsFromParameterScaling, StatsFromParameterZeroPoint)


def learned_weight_scales(model: nn.Module) -> nn.Module:
    """Turn weight scales and zero points that follow the weight into parameters that start at their values, in place.

    What ``weight_scaling_impl_type="parameter_from_stats"`` does in a layer map, for a model that is already quantized.
    The quantized weights stay the same.

    Returns:
        ``model``.
    """
    for layer in quantized_layers(model).values():
        proxy = layer.weight_quant
        if not proxy.is_quant_enabled or not _has(proxy, _FROM_SLICE):
            continue
        changes: dict[str, Any] = {"scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS}
        if _has(proxy, StatsFromParameterZeroPoint):
            changes["zero_point_impl"] = ParameterFromStatsFromParameterZeroPoint
        training = proxy.training
        proxy.quant_injector = proxy.quant_injector.let(**changes)
        proxy.init_tensor_quant(preserve_state_dict=True)
        proxy.train(training)
        with torch.no_grad():
            layer.quant_weight()  # parameters from statistics start at their first use
    return model


def check_gptq(model: nn.Module) -> None:
    """Refuse a model on which GPTQ (or GPFQ, Qronos) would silently do nothing or harm.

    Raises:
        DQError: a weight quantizer takes its scale from the column it is given, uses learned rounding, or has
            parameters that were not initialised; the message names the layer and the cure.
    """
    for name, layer in quantized_layers(model).items():
        proxy = layer.weight_quant
        if not proxy.is_quant_enabled:
            continue
        if _has(proxy, _FROM_SLICE):
            raise DQError(
                f"GPTQ would not correct layer {name!r}: its weight quantizer takes the scale from the one column that "
                "GPTQ quantizes at a time, so the error looks like zero or gets worse. Quantize with "
                "weight_scaling_impl_type='parameter_from_stats', or call dq_brevitas.learned_weight_scales(model)."
            )
        if _has(proxy, LearnedRoundSte):
            raise DQError(
                f"GPTQ would harm layer {name!r}: its rounding was learned for the weights before correction. Call "
                "dq_brevitas.bake_weights(model) to keep what was learned, and GPTQ will start from there."
            )
        if any(not getattr(module, "init_done", True) for module in proxy.modules()):
            raise DQError(
                f"the weight quantizer of layer {name!r} has parameters that start at their first use and has not "
                "been used: run one forward of the model with quantization enabled before GPTQ"
            )


def _has(proxy: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(module, kinds) for module in proxy.modules())


class gptq_mode(brevitas_gptq_mode):  # noqa: N801  named like the context manager it wraps
    """Brevitas' ``gptq_mode``, after `check_gptq`.

    Example:
        >>> with torch.no_grad(), gptq_mode(model, create_weight_orig=False) as gptq:  # doctest: +SKIP
        ...     for _ in range(gptq.num_layers):
        ...         for sample, timestep in calibration:
        ...             gptq.model(sample, timestep)
        ...         gptq.update()
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_gptq(model)
        super().__init__(model, *args, **kwargs)
