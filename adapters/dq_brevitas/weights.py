"""The weights that Brevitas layers compute with."""

from __future__ import annotations

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.inject.enum import FloatToIntImplType
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Brevitas layers with a weight, by name, whether their quantizers are enabled or not."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantWeightBiasInputOutputLayer)}


def weight_values(layer: nn.Module) -> Tensor:
    """The weight that a Brevitas layer computes with, as a plain tensor."""
    weight = layer.quant_weight()  # type: ignore[operator]
    return weight.value if isinstance(weight, QuantTensor) else weight


@torch.no_grad()
def bake_weights(model: nn.Module) -> nn.Module:
    """Replace every quantized weight by its quantized value, in place.

    A baked weight re-quantizes to itself by any arithmetic (division or reciprocal, Brevitas or onnxruntime), so
    learned rounding survives in a plain checkpoint: a learned-round quantizer becomes one that rounds to nearest.

    Returns:
        ``model``.
    """
    for layer in quantized_layers(model).values():
        proxy = layer.weight_quant
        if not proxy.is_quant_enabled:
            continue
        training = proxy.training
        proxy.eval()  # learned rounding is a hard decision in evaluation only
        layer.weight.data = weight_values(layer).detach().to(layer.weight.dtype).clone()
        if proxy.rounding_mode and "LEARNED" in proxy.rounding_mode.upper():
            kept = {k: v for k, v in proxy.state_dict().items() if "float_to_int_impl" not in k}
            proxy.quant_injector = proxy.quant_injector.let(float_to_int_impl_type=FloatToIntImplType.ROUND)
            proxy.init_tensor_quant()
            proxy.load_state_dict(kept)
        proxy.train(training)
    return model
