"""From a trained model to integers: plan entries, and layers with packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq_plugins.affine import integer_range, quantize
from dq_plugins.binarization.binarizers import BinaryBasis, EvolvableBasis, per_channel
from dq_plugins.binarization.integer_layers import IntegerConv, IntegerLayer, IntegerLinear, IntegerWeight, Kernel
from dq_plugins.binarization.layers import QuantizedTraining, TrainedLinear, trained_layers
from dq_plugins.binarization.learned_step import LearnedStepActivation
from dq_plugins.binarization.signs import sign
from dq_plugins.errors import DQError

TINY = torch.finfo(torch.float32).tiny


def binary_parameters(weight: Tensor, quantizer: BinaryBasis | EvolvableBasis) -> tuple[Tensor, Tensor]:
    """Signs (int8, the weight's shape) and positive scales ``[O]`` whose product is the quantized weight.

    A learned scale that went negative turns the signs of its channel around; one at zero becomes the smallest
    positive number, because a stored scale is positive.

    Raises:
        DQError: the second basis is still there.
    """
    if isinstance(quantizer, EvolvableBasis) and not quantizer.evolved:
        raise DQError(
            "a layer still has two bases, which one bit a weight cannot hold: make the transition first "
            "(dq_plugins.binarization.evolve(model), or a callback with evolve_at), and train on after it"
        )
    scale = quantizer.scale.detach().float()
    signs = sign(weight.detach()) * per_channel(sign(scale), weight)
    return signs.to(torch.int8), scale.abs().clamp_min(TINY)


def stored_weight(layer: QuantizedTraining) -> IntegerWeight:
    """The weight of a trained layer as integers."""
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    if isinstance(quantizer, BinaryBasis | EvolvableBasis):
        return IntegerWeight(*binary_parameters(weight, quantizer), binary=True)
    scale = quantizer.scale()
    codes = quantize(weight.float(), per_channel(scale, weight), 0, *integer_range(quantizer.bits))
    return IntegerWeight(codes.to(torch.int8), scale, binary=False)


def integer_layer(layer: QuantizedTraining, kernel: Kernel = "auto") -> IntegerLayer:
    """The integer layer that computes what a trained layer simulates.

    Args:
        layer: after the transition, and after a forward has set its activation step.
        kernel: see `IntegerLayer`.
    """
    quantizer = layer.input_quantizer
    scale, bits = None, 8
    if isinstance(quantizer, LearnedStepActivation):
        if not bool(quantizer.started):
            raise DQError("an activation step was never set: run the model once before making it integer")
        scale, bits = quantizer.scale(), quantizer.bits
    parts = (stored_weight(layer), layer.bias, scale, bits, kernel)
    return IntegerLinear(*parts) if isinstance(layer, TrainedLinear) else IntegerConv(layer, *parts)  # type: ignore[arg-type]


def to_integer(model: nn.Module, kernel: Kernel = "auto") -> nn.Module:
    """Replace every trained layer by its integer layer, in place.

    The result is for inference: its ``state_dict`` holds packed weights and nothing of the latent ones.

    Args:
        model: trained, after the transition.
        kernel: see `IntegerLayer`.

    Returns:
        The same model, in evaluation mode.

    Raises:
        DQError: a layer still has two bases, or the model has no trained layers; nothing has been changed then.
    """
    layers = trained_layers(model)
    if not layers:
        raise DQError(f"this {type(model).__name__} has no layers that train quantized; see train_quantized")
    converted = {}
    for name, layer in layers.items():
        try:
            converted[name] = integer_layer(layer, kernel)
        except DQError as error:
            raise DQError(f"layer {name!r} cannot become integer: {error}") from error
    for name, layer in converted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model.eval()
