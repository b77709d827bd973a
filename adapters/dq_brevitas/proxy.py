"""The activation quantizer of a layer, as Brevitas' proxy that also holds the timestep context."""

from __future__ import annotations

from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import Tensor, nn

from dq_brevitas.balanced import balance_of
from dq_brevitas.table import TimestepTable
from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import RowOrder, TimestepContext


class TimestepActQuantProxyFromInjector(ActQuantProxyFromInjector):
    """Activation proxy whose scale, and zero point if it has one, depend on the timestep.

    The proxy holds the context, not only the injector: Brevitas rebuilds a quantizer from its injector class whenever a
    ``state_dict`` is loaded, and ``copy.deepcopy`` does not copy classes, so the copy of a model would otherwise be
    rebuilt around the context of the original.

    Before `attach_timesteps` has given it a context, the quantizer has no tables and refuses to run.
    """

    dq_quantizer_state = True

    @property
    def requires_export_handler(self) -> bool:
        """False: an export without a handler of ours runs the tensor operations, which are right for every group."""
        return False

    @property
    def groups(self) -> str:
        """Name of the timestep groups this quantizer uses."""
        return self.quant_injector.timestep_groups

    @property
    def rows(self) -> RowOrder | None:
        """Where the samples of a call are in what is quantized; None: not known."""
        return self.quant_injector.timestep_rows

    def bind(self, context: TimestepContext) -> None:
        """Use ``context`` from now on; the tables survive if the groups are the same.

        Raises:
            TimestepError: the context has no groups of this quantizer's name.
        """
        if self.groups not in context.groups:
            raise TimestepError(
                f"a quantizer of {_layer_name(self)} uses timestep groups {self.groups!r}; the context has: "
                f"{', '.join(context.groups) or 'none'}. Pass groups of that name, or name the quantizer's groups with "
                ".let(timestep_groups=...)."
            )
        old = self.timestep_context
        self.timestep_context = context
        if old is not None and old.groups.get(self.groups) == context.groups[self.groups]:
            self._inject(context)
            for module in self.modules():
                if isinstance(module, TimestepTable):
                    module.context = context
            return
        training = self.training
        self.init_tensor_quant()
        self.train(training)

    def init_tensor_quant(self) -> None:
        """Build the quantizer from the injector, around this proxy's own context."""
        context = self.__dict__.get("timestep_context") or self.quant_injector.timestep_context
        self.timestep_context = context
        if context is None:
            self.fused_activation_quant_proxy = None
            self.is_quant_enabled = False
            return
        self._inject(context)
        super().init_tensor_quant()
        self.balanced = balance_of(self) is not None
        beside_weight(self)

    def _inject(self, context: TimestepContext) -> None:
        """Put the context into the injector.

        An injector with another attribute is a subclass, and every loaded state asks for one: it derives from the
        injector as it was without a context of this proxy, or there would be a longer chain of classes each time.
        """
        derived, plain = self.__dict__.get("_injected", (None, None))
        plain = plain if self.quant_injector is derived else self.quant_injector
        self.quant_injector = plain.let(timestep_context=context)
        self._injected = self.quant_injector, plain

    def forward(self, x: Any) -> Any:
        """Quantize a layer's input."""
        if self.timestep_context is None and not self.disable_quant:
            raise TimestepError(
                f"a quantizer of {_layer_name(self)} depends on the timestep, and nothing tells it the timestep. Call "
                "dq_brevitas.attach_timesteps(denoiser, groups) once after quantizing."
            )
        return super().forward(x)

    def create_quant_tensor(self, qt_args: Any, x: Any) -> Any:
        """The quantized input with its metadata; a plain tensor when every sample has its own scale.

        Brevitas' metadata knows one scale per tensor or per channel, not one per sample, or per channel and sample.
        """
        if not isinstance(qt_args, tuple) or (qt_args[1].dim() == 0 and not self.balanced):
            return super().create_quant_tensor(qt_args, x)
        for layer in self.tracked_module_list:
            bias = getattr(layer, "bias_quant", None)
            has_bias = bias is not None and getattr(layer, "bias", None) is not None
            if has_bias and bias.is_quant_enabled and bias.requires_input_scale:
                raise TimestepError(
                    f"{_layer_name(self)} quantizes its bias with the scale of its input, and with one timestep per "
                    "sample every sample has another one. Quantize it with bias_quant=None, or call the denoiser with "
                    "one timestep for the whole batch."
                )
        return qt_args[0]

    @property
    def tensor_quantizer(self) -> nn.Module:
        """The part that quantizes: ``int_quant``, ``scaling_impl``, ``zero_point_impl``, ..."""
        return self.fused_activation_quant_proxy.tensor_quant

    def bit_width(self, force_eval: bool = True) -> Tensor | None:
        """Width of the code, which does not depend on the timestep."""
        return self.tensor_quantizer.msb_clamp_bit_width_impl() if self.is_quant_enabled else None

    def scale_table(self) -> Tensor:
        """``[G]`` scales of all groups."""
        quantizer = self.tensor_quantizer
        return quantizer.scaling_impl.scales(quantizer.int_scaling_impl(self.bit_width()))

    def zero_point_table(self) -> Tensor:
        """``[G]`` zero points of all groups, in Brevitas' integer range (unsigned where the quantizer is)."""
        quantizer, scales = self.tensor_quantizer, self.scale_table()
        if hasattr(quantizer.zero_point_impl, "zero_points"):
            return quantizer.zero_point_impl.zero_points(scales, self.bit_width())
        return torch.zeros_like(scales)

    def scale(self, force_eval: bool = True) -> Tensor | None:
        """The scale, where there is only one.

        Raises:
            TimestepError: there are several, and a single number would silently stand for all timesteps.
        """
        return self._the_only(self.scale_table(), "scale") if self.is_quant_enabled else None

    def zero_point(self, force_eval: bool = True) -> Tensor | None:
        """The zero point, where there is only one; see `scale`."""
        return self._the_only(self.zero_point_table(), "zero point") if self.is_quant_enabled else None

    def _the_only(self, table: Tensor, what: str) -> Tensor:
        if table.numel() > 1:
            raise TimestepError(
                f"the {what} of {_layer_name(self)} depends on the timestep: it has {table.numel()} groups, and using "
                "one of them for all would be silently wrong. Use dq_brevitas.export_torch or export_onnx_qcdq, which "
                "put the table into the graph, or export one graph per group with "
                "dq_brevitas.freeze_timestep_group(model, group)."
            )
        return table.reshape(())


def beside_weight(proxy: ActQuantProxyFromInjector) -> None:
    """Move a proxy to its layer's device: Brevitas puts activation parameters on the CPU."""
    weight = getattr(proxy.tracked_module_list[0], "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        proxy.to(weight.device)


def _layer_name(proxy: TimestepActQuantProxyFromInjector) -> str:
    layer = proxy.tracked_module_list[0]
    shape = f" with weight {tuple(layer.weight.shape)}" if isinstance(getattr(layer, "weight", None), Tensor) else ""
    return f"a {type(layer).__name__}{shape}"


def timestep_proxies(model: nn.Module) -> dict[str, TimestepActQuantProxyFromInjector]:
    """Every timestep quantizer of a model, by name; a shared one appears once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TimestepActQuantProxyFromInjector)}


def calibration_coverage(model: nn.Module) -> dict[str, list[int]]:
    """Calls that each timestep group of each quantizer has collected since calibration (re)started.

    Args:
        model: a model with timestep quantizers.

    Returns:
        Quantizer name -> calls per group. A model loaded from a checkpoint has collected none.
    """
    enabled = {name: proxy for name, proxy in timestep_proxies(model).items() if proxy.is_quant_enabled}
    return {name: list(proxy.tensor_quantizer.scaling_impl.counts) for name, proxy in enabled.items()}


def restart_calibration(model: nn.Module) -> nn.Module:
    """Let the next ``calibration_mode`` (or the first steps of training) collect ranges again.

    A second ``calibration_mode`` on a calibrated model would otherwise change nothing, as in Brevitas. A group that
    the new data does not visit keeps its range.

    Returns:
        ``model``.
    """
    for proxy in timestep_proxies(model).values():
        for module in proxy.modules():
            if isinstance(module, TimestepTable):
                module.restart()
    return model
