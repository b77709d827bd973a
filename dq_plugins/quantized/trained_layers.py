"""Layers that train quantized: full-precision latent weights, quantizers in the forward.

A layer keeps its identity, name, parameters and hooks; `train_quantized` changes its class to a subclass that calls
two submodules, ``input_quantizer`` and ``weight_quantizer``. The latent weight stays under the key ``weight``, so
a full-precision checkpoint still loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.layer_kinds import LAYER_KINDS, mixed_in
from dq_plugins.quantized.binarizers import BinaryBasis, EvolvableBasis, ScaleGradient
from dq_plugins.quantized.learned_step import LearnedStepActivation, LearnedStepWeight

WeightScheme = Literal["binary", "evolvable", "int8"]


@dataclass(frozen=True)
class LayerChoice:
    """How one layer trains.

    Attributes:
        weight: ``"binary"`` (one basis), ``"evolvable"`` (two bases that become one) or ``"int8"``.
        act_bits: width of the layer's input, 2 to 8; None leaves it in floating point.
    """

    weight: WeightScheme
    act_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.weight not in get_args(WeightScheme):
            raise DQError(f"a weight trains as {' or '.join(get_args(WeightScheme))}, got {self.weight!r}")
        if self.act_bits is not None and not 2 <= self.act_bits <= 8:
            raise DQError(f"activations train at 2 to 8 bits or in floating point, got act_bits={self.act_bits!r}")

    @property
    def binary(self) -> bool:
        """Whether the weight ends as one bit."""
        return self.weight != "int8"


class QuantizedTraining(nn.Module):
    """A linear or convolutional layer with quantized input and weight."""

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: BinaryBasis | LearnedStepWeight
    input_quantizer: nn.Module

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with."""
        return self.weight_quantizer(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """What PyTorch's layer computes, of quantized operands."""
        compute = F.linear if isinstance(self, nn.Linear) else self._conv_forward
        return compute(self.input_quantizer(input), self.quantized_weight(), self.bias)


TRAINED = mixed_in(
    QuantizedTraining, "Trained", (k for k in LAYER_KINDS.values() if not k.lookup and k.output_axis == 0)
)
"""Layers that can train quantized. Transposed convolutions are not here: their output channel is not dimension 0."""


def train_quantized(
    denoiser: nn.Module, choices: Mapping[str, LayerChoice], *, scale_gradient: ScaleGradient = "autograd"
) -> nn.Module:
    """Make layers train quantized, in place. Layers without a choice stay as they are.

    Args:
        denoiser: full-precision, pretrained.
        choices: by fully qualified name; `dq_plugins.passes.binarization.binarydm_choices` makes the paper's.
        scale_gradient: see `EvolvableBasis`.

    Returns:
        The same denoiser. Its first forward sets the activation steps.

    Raises:
        DQError: a name is unknown, or its layer cannot train quantized; nothing has been changed then.
    """
    modules = dict(denoiser.named_modules())
    for name in choices:
        kind = type(modules.get(name))
        if kind not in TRAINED:
            found = "no such layer" if name not in modules else f"a {kind.__name__}"
            kinds = ", ".join(k.__name__ for k in TRAINED)
            raise DQError(f"layer {name!r} cannot train quantized: it is {found}, and only {kinds} can")
    for name, choice in choices.items():
        layer = modules[name]
        layer.__class__ = TRAINED[type(layer)]
        if choice.weight == "evolvable":
            layer.weight_quantizer = EvolvableBasis(layer.weight, scale_gradient=scale_gradient)
        else:
            layer.weight_quantizer = (BinaryBasis if choice.binary else LearnedStepWeight)(layer.weight)
        bits = choice.act_bits
        layer.input_quantizer = LearnedStepActivation(bits, layer.weight.device) if bits else nn.Identity()
    return denoiser


def make_plain(layer: QuantizedTraining) -> nn.Module:
    """Undo `train_quantized` for one layer, in place: its class of before, the latent weight, no quantizers."""
    (plain,) = (kind for kind, trained in TRAINED.items() if type(layer) is trained)
    del layer.weight_quantizer, layer.input_quantizer
    layer.__class__ = plain
    return layer


def trained_layers(model: nn.Module) -> dict[str, QuantizedTraining]:
    """Layers of ``model`` that train quantized, by fully qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedTraining)}
