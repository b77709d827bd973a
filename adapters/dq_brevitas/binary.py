"""Binary weights for Brevitas: quantizers for a layer map, and the way to a model that every export takes.

Use them like the stock ones::

    QuantConv2d(8, 8, 3, weight_quant=EvolvableBasisWeight, input_quant=Int8ActLearnedStep, bias_quant=None)

The binarizers are those of `dq_plugins.passes.binarization`: its `evolve`, `evolution_penalty` and `BinaryDMCallback`
work on a Brevitas model as they are. After training, `freeze_binary` leaves stock quantizers only.

Attributes that ``.let(...)`` or ``weight_...`` arguments change: ``binarizer_clip`` (magnitude beyond which the
straight-through gradient stops) and ``scale_gradient`` (see `EvolvableBasis`).

Sources: BinaryDM (Zheng et al., ICLR 2025), LSQ (Esser et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dq_brevitas import host  # isort: skip
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.utils import StatelessBuffer
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import QuantType, RestrictValueType, ScalingImplType, ScalingPerOutputType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from brevitas.quant.solver import WeightQuantSolver
from torch import Tensor, nn

from dq_brevitas.integer import ReciprocalIntQuant
from dq_brevitas.plain import QUANT_CLASSES
from dq_brevitas.weights import quantized_layers
from dq_plugins.affine import per_row
from dq_plugins.errors import DQError
from dq_plugins.quantized.binarizers import BinaryBasis, EvolvableBasis, ScaleGradient
from dq_plugins.quantized.learned_step import SMALLEST_STEP, LearnedStepActivation, scale_gradient_factor
from dq_plugins.quantized.trained_layers import TRAINED, LayerChoice


class BinarizerQuant(nn.Module):
    """A binarizer as a Brevitas ``tensor_quant``; of two bases it tells Brevitas the scale of the first.

    Args:
        tracked_parameter_list: the weight.
        two_bases: `EvolvableBasis` instead of `BinaryBasis`.
        binarizer_clip: see there.
        scale_gradient: see there.
    """

    def __init__(
        self,
        tracked_parameter_list: list[nn.Parameter],
        two_bases: bool,
        binarizer_clip: float = 1.0,
        scale_gradient: ScaleGradient = "autograd",
    ) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(host.keep_what_is_missing)
        if len(tracked_parameter_list) != 1:
            raise DQError(
                f"a binarizer belongs to one weight, this one was given {len(tracked_parameter_list)}: layers cannot "
                "share one weight quantizer"
            )
        args = tracked_parameter_list[0].detach(), binarizer_clip
        self.binarizer = EvolvableBasis(*args, scale_gradient) if two_bases else BinaryBasis(*args)
        self.bit_width = BitWidthConst(1)
        self.zero_point = StatelessBuffer(torch.tensor(0.0))
        self.observer_only = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Binarized weight, scale, zero point and bit width."""
        return self.binarizer(x), per_row(self.binarizer.scale.abs(), x), self.zero_point(), self.bit_width()


class LearnedStepScaling(LearnedStepActivation):
    """LSQ's step as a Brevitas ``scaling_impl``.

    The first batch sets the step; inside ``calibration_mode`` the mean over its batches does.
    """

    def __init__(self, bit_width: int, device: torch.device | None = None) -> None:
        super().__init__(int(bit_width), device)
        self.register_load_state_dict_pre_hook(host.keep_what_is_missing)
        self.observer_only = False  # Brevitas sets it on every module that has it while it calibrates
        self.calls = 0

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Scale for ``x``; the integer threshold plays no part, the step is the scale itself."""
        if self.observer_only or not self._running:
            self._observe(x)
        return scale_gradient_factor(self.step.abs().clamp_min(SMALLEST_STEP), x.numel(), self.bits)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.dim() == 0:  # Brevitas asks for the scale with a scalar zero, for example when it exports
            if not bool(self.started):
                raise DQError("an activation step was never set: run the model once, or calibrate it, before that")
            return
        before = self.step.detach().clone()
        self.start(x)
        self.calls = self.calls + 1 if self.observer_only else 1
        self.step.copy_(torch.lerp(before, self.step.detach(), 1 / self.calls))

    def init_scale(self) -> None:
        """End of ``calibration_mode``."""
        self.calls = 0


class SignedBinaryWeightPerChannelFloat(WeightQuantSolver):
    """Vanilla binary weight: sign times a learned scale per output channel.

    Examples:
        >>> from brevitas.nn import QuantLinear
        >>> fc = QuantLinear(10, 5, bias=False, weight_quant=SignedBinaryWeightPerChannelFloat)
        >>> fc.quant_weight().bit_width
        tensor(1.)
    """

    tensor_quant = BinarizerQuant
    two_bases = False
    quant_type = QuantType.BINARY
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP
    bit_width = 1
    narrow_range = True
    signed = True


class EvolvableBasisWeight(SignedBinaryWeightPerChannelFloat):
    """BinaryDM's weight: two binary bases while it learns, one after `dq_plugins.passes.binarization.evolve`.

    Examples:
        >>> from brevitas.nn import QuantLinear
        >>> from dq_plugins.passes.binarization import evolve
        >>> _ = torch.manual_seed(0)
        >>> fc = QuantLinear(64, 5, bias=False, weight_quant=EvolvableBasisWeight)
        >>> len(fc.quant_weight().value[0].unique())
        4
        >>> evolve(fc), len(fc.quant_weight().value[0].unique())
        (1, 2)
    """

    two_bases = True


class LearnedStepActMixin(ExtendedInjector):
    """Turns a per-tensor activation injector into LSQ; put it first among the bases."""

    scaling_impl = LearnedStepScaling
    int_quant = ReciprocalIntQuant


class Int8ActLearnedStep(LearnedStepActMixin, Int8ActPerTensorFloat):
    """LSQ activation, 8 bits; ``.let(bit_width=4)`` for others.

    Examples:
        >>> from brevitas.nn import QuantIdentity
        >>> act = QuantIdentity(act_quant=Int8ActLearnedStep, bit_width=4, return_quant_tensor=True)
        >>> round(float(act(torch.ones(8)).scale.detach()), 4)  # 2 mean |x| / sqrt(7)
        0.7559
    """


WEIGHT_QUANTIZERS: dict[str, type[ExtendedInjector]] = {
    "binary": SignedBinaryWeightPerChannelFloat,
    "evolvable": EvolvableBasisWeight,
    "int8": Int8WeightPerChannelFloat,
}


def binary_layer_map(choices: Mapping[str, LayerChoice]) -> dict[type[nn.Module], tuple[Any, Any]]:
    """Choices as ``compute_layer_map`` of Brevitas' ``layerwise_quantize``. Layers without a choice stay unquantized.

    Args:
        choices: by fully qualified name, see `dq_plugins.passes.binarization.binarydm_choices`.

    Example:
        >>> model = layerwise_quantize(unet, compute_layer_map=binary_layer_map(choices.layers))  # doctest: +SKIP
    """

    def weight(name: str) -> type[ExtendedInjector] | None:
        return WEIGHT_QUANTIZERS[choices[name].weight] if name in choices else None

    def activation(name: str) -> type[ExtendedInjector] | None:
        bits = choices[name].act_bits if name in choices else None
        return Int8ActLearnedStep.let(bit_width=bits) if bits else None

    # Brevitas evaluates literal lambdas of (module, name) only.
    arguments = {
        "weight_quant": lambda module, name: weight(name),
        "input_quant": lambda module, name: activation(name),
        "bias_quant": None,
        "output_quant": None,
        "return_quant_tensor": False,
    }
    return {plain: (QUANT_CLASSES[plain], arguments) for plain in TRAINED}


@torch.no_grad()
def freeze_binary(model: nn.Module) -> nn.Module:
    """Make every binary weight a stock 2-bit one that only uses the codes -1 and +1, in place.

    Brevitas exports no 1-bit quantizer; a narrow 2-bit one holds the same values bit for bit, and goes through
    every export.

    Args:
        model: after the transition.

    Returns:
        The same model.

    Raises:
        DQError: there are no binary weights, or one still has two bases; nothing has been changed then.
    """
    found = quantized_layers(model).items()
    layers = {name: layer for name, layer in found if isinstance(layer.weight_quant.tensor_quant, BinarizerQuant)}
    if not layers:
        raise DQError(f"this {type(model).__name__} has no binary weight quantizer of dq_brevitas to freeze")
    for name, layer in layers.items():
        if not layer.weight_quant.tensor_quant.binarizer.evolved:
            raise DQError(
                f"layer {name!r} still has two bases; call dq_plugins.passes.binarization.evolve(model) first"
            )
    for layer in layers.values():
        _freeze(layer)
    return model


def _freeze(layer: nn.Module) -> None:
    proxy = layer.weight_quant
    value, scale, _, _ = proxy.tensor_quant(layer.weight)
    stock = Int8WeightPerChannelFloat.let(
        bit_width=2,
        narrow_range=True,
        scaling_impl_type=ScalingImplType.PARAMETER,
        scaling_init=scale.clone(),
        scaling_shape=tuple(scale.shape),
    )
    layer.weight.data = value.clone()
    proxy.quant_injector = stock.let(proxy_module=proxy)
    proxy.update_tracked_modules()
    proxy.init_tensor_quant()
