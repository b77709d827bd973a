"""Activation quantizers with a range for each token of a linear layer, each sample of a convolution, measured as the
input comes: nothing is calibrated or learned.

Brevitas' own dynamic quantizers have other scales (a symmetric range is divided by ``2^(b-1)``) and send gradients into
them. These are the quantizer of a plan, `dq_plugins.quantized.input_quantizers.DynamicQuantizer`, in the place that
Brevitas has for it, so the two agree bit for bit.
"""

from __future__ import annotations

from typing import Any

from dq_brevitas import host  # isort: skip
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.inject import ExtendedInjector
from brevitas.proxy.runtime_quant import DynamicActQuantProxyFromInjector
from torch import Tensor, nn

from dq_brevitas.proxy import beside_weight
from dq_plugins.layer_kinds import LAYER_KINDS, kind_of
from dq_plugins.plan import DynamicActivationQuant
from dq_plugins.quantized.input_quantizers import DynamicQuantizer
from dq_plugins.quantized.layer_transform import LayerTransform


class TokenQuant(nn.Module):
    """Quantizes every token, or every sample of a convolution's input, by its own range. Maps to ``tensor_quant``.

    It is a linear layer's until its proxy says of what kind the layer is.

    Args:
        bit_width: width of the code.
        symmetric: whether zero points are fixed at 0.
        balance: what the channels of the input are divided by before and multiplied by after, ``[C]``.
        clip: share of its extremes at which an input is cut off.
    """

    def __init__(
        self, bit_width: int, symmetric: bool = True, balance: Tensor | None = None, clip: float = 1.0
    ) -> None:
        super().__init__()
        transform = None if balance is None else LayerTransform(balance)
        quant, kind = DynamicActivationQuant(bit_width, symmetric, clip), LAYER_KINDS["linear"]
        self.tokens = DynamicQuantizer(quant, torch.device("cpu"), transform, kind)
        self.tokens.register_load_state_dict_pre_hook(host.keep_what_is_missing)
        self.bit_width_impl = BitWidthConst(bit_width)
        self.observer_only = False  # Brevitas sets it while it calibrates

    def forward(self, x: Tensor) -> tuple[Tensor, None, None, Tensor]:
        """The quantized input and its width; no scale, as Brevitas' metadata has no place for one per token."""
        return x if self.observer_only else self.tokens(x), None, None, self.bit_width_impl()


class TokenActQuantProxyFromInjector(DynamicActQuantProxyFromInjector):
    """Activation proxy of a `TokenQuant`; its output is a plain tensor."""

    dq_quantizer_state = True

    @property
    def requires_export_handler(self) -> bool:
        """False: an export without a handler runs the tensor operations."""
        return False

    def init_tensor_quant(self) -> None:
        """Build the quantizer from the injector."""
        super().init_tensor_quant()
        kind = kind_of(self.tracked_module_list[0])
        if kind is not None:
            self.tensor_quantizer.tokens.kind = kind
        beside_weight(self)

    def create_quant_tensor(self, qt_args: Any, x: Any) -> Any:
        """The quantized input, without metadata; ``x`` itself while quantizers are disabled."""
        return qt_args if self.is_quant_enabled else x

    def bit_width(self, force_eval: bool = True) -> Tensor | None:
        """Width of the code."""
        return self.tensor_quantizer.bit_width_impl() if self.is_quant_enabled else None

    @property
    def tensor_quantizer(self) -> TokenQuant:
        """The part that quantizes."""
        return self.fused_activation_quant_proxy.tensor_quant

    @property
    def planned(self) -> DynamicActivationQuant:
        """What it does, as a plan says it."""
        return self.tensor_quantizer.tokens.quant


class Int8DynamicActPerTokenFloat(ExtendedInjector):
    """8-bit signed activations, a scale for each token (each sample of a convolution), from its largest value."""

    proxy_class = TokenActQuantProxyFromInjector
    tensor_quant = TokenQuant
    bit_width = 8
    symmetric = True
    clip = 1.0


class Int8DynamicAsymmetricActPerTokenFloat(Int8DynamicActPerTokenFloat):
    """8-bit activations, a scale and an integer zero point for each token (each sample of a convolution), from its
    extremes."""

    symmetric = False


def dynamic_inputs(model: nn.Module) -> dict[str, DynamicActivationQuant]:
    """Layers of a Brevitas model whose inputs have dynamic ranges, and how each is quantized."""
    return {
        name: layer.input_quant.planned
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "input_quant", None), TokenActQuantProxyFromInjector)
        and layer.input_quant.is_quant_enabled
    }
