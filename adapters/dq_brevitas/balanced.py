"""Integer quantizers of a plan whose input channels are balanced.

Each is rounding alone: it scales, rounds and scales back. So a layer computes the same in full precision with either of
its quantizers turned off, as Brevitas does while it calibrates, and weights keep the values that were trained.

Shapes: ``C`` input channels, ``O`` output channels.
"""

from __future__ import annotations

from dq_brevitas import host  # isort: skip
from brevitas.core.function_wrapper import TensorClamp
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from dq_brevitas.integer import ReciprocalIntQuant


class BalancedActIntQuant(ReciprocalIntQuant):
    """Quantizes a balanced input: channel c has the scale of its timestep group times ``balance[c]``.

    Args:
        balance: as it broadcasts against the input: ``[C]``, or ``[C, 1, 1]`` for a 2-d convolution.
        options: see Brevitas' ``IntQuant``.
    """

    balance: Tensor

    def __init__(
        self,
        balance: Tensor,
        narrow_range: bool,
        signed: bool,
        input_view_impl: nn.Module,
        float_to_int_impl: nn.Module,
        tensor_clamp_impl: nn.Module = TensorClamp(),  # noqa: B008
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__(narrow_range, signed, input_view_impl, float_to_int_impl, tensor_clamp_impl, quant_delay_steps)
        self.register_buffer("balance", balance.clone())
        self.register_load_state_dict_pre_hook(host.keep_what_is_missing)
        self.subtensor_slice_list: list[tuple[int, int] | None] = [None]  # Brevitas sets it: GPTQ goes by columns

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``, in its own dtype."""
        return super().forward(scale * self.balance.to(x.device), zero_point, bit_width, x)


class BalancedWeightIntQuant(BalancedActIntQuant):
    """Quantizes the weight times its balance, and divides by it again.

    ``balance`` broadcasts against the weight, see `dq_plugins.quantized.layer_transform.per_input`.
    """

    def factors(self, like: Tensor) -> Tensor:
        """The balance of the part of the weight that is being quantized."""
        whole = self.balance.to(like.device)
        parts = enumerate(self.subtensor_slice_list)
        cut = [slice(None) if part is None or whole.shape[i] == 1 else slice(*part) for i, part in parts]
        return whole[tuple(cut)]

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``, in its own dtype."""
        factors = self.factors(x)
        codes = self.to_int(scale, zero_point, bit_width, x.float() * factors)
        return ((codes - zero_point) * scale / factors).to(x.dtype)


class BalancedWeightProxy(WeightQuantProxyFromInjector):
    """Weight proxy whose metadata says the scale of every output and input channel."""

    def create_quant_tensor(self, qt_args: tuple[Tensor, ...]) -> IntQuantTensor:
        """The quantized weight with its metadata."""
        value, scale, *rest = qt_args
        if not self.export_mode:  # an export asked for the metadata before, and has this scale
            scale = scale / self.tensor_quant.int_quant.factors(value)
        return super().create_quant_tensor((value, scale, *rest))


def balance_of(proxy: nn.Module) -> Tensor | None:
    """The balance inside a weight or activation proxy, as it broadcasts against what is quantized; None without one."""
    found = (getattr(module, "balance", None) for module in proxy.modules())
    return next((balance for balance in found if balance is not None), None)


def read_balance(layer: nn.Module) -> Tensor | None:
    """The balance of a Brevitas layer as a plan says it, ``[C]``; None without one."""
    found = balance_of(layer.input_quant)  # type: ignore[arg-type]
    if found is None and (found := balance_of(layer.weight_quant)) is not None:  # type: ignore[arg-type]
        parts: int = getattr(layer, "groups", 1)
        found = found.reshape(parts, -1, found.shape[1])[:, 0]  # [P, O/P, C/P], the same for each output of a group
    return None if found is None else found.detach().flatten().float().cpu().clone()
