"""Inference and ``torch.export``: the scale table and its lookup are part of the graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.export.inference.handler import InferenceHandler, IntWeightInferencetHandler
from brevitas.export.inference.manager import InferenceManager
from brevitas.function.ops import max_int, min_int
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from torch import Tensor, nn

from dq_brevitas.balanced import BalancedWeightProxy, balance_of
from dq_brevitas.corrected import timestep_parts
from dq_brevitas.integer import ReciprocalIntQuant
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector
from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import route_of, select_for_input


class TimestepInferenceHandler(InferenceHandler):
    """A timestep quantizer reduced to its tables: no statistics, no dependency injection, traceable."""

    handled_layer = TimestepActQuantProxyFromInjector

    def prepare_for_export(self, module: TimestepActQuantProxyFromInjector) -> None:
        """Snapshot the tables."""
        bits = module.bit_width()
        self.context, self.groups, self.rows = module.timestep_context, module.groups, module.rows
        quantizer = module.tensor_quantizer.int_quant
        self.round, self.reciprocal = quantizer.float_to_int_impl, isinstance(quantizer, ReciprocalIntQuant)
        self.low = float(min_int(module.is_signed, module.is_narrow_range, bits))
        self.high = float(max_int(module.is_signed, module.is_narrow_range, bits))
        self.register_buffer("scales", module.scale_table().detach().clone())
        self.register_buffer("zero_points", module.zero_point_table().detach().clone())
        self.register_buffer("bit_width", bits.detach().clone())
        balance = balance_of(module)
        self.register_buffer("balance", None if balance is None else balance.detach().to(self.scales.device, copy=True))

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Integer codes, in the arithmetic of the quantizer this handler stands for."""
        if self.reciprocal:
            return torch.clamp(self.round(x.float() * (1.0 / scale)) + zero_point, self.low, self.high)
        return torch.clamp(self.round(x / scale + zero_point), self.low, self.high)

    def dequantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Float values of integer codes."""
        return (x - zero_point) * scale

    def forward(self, x: Tensor, unused_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize and dequantize with the parameters of the running timestep."""
        index = self.context.index(self.groups).to(self.scales.device)
        scale, zero_point = (select_for_input(t, index, x, rows=self.rows) for t in (self.scales, self.zero_points))
        if self.balance is not None:
            scale = scale * self.balance
        y = self.dequantize(self.quantize(x, scale, zero_point), scale, zero_point).to(x.dtype)
        return y, scale, zero_point, self.bit_width


class ExactWeightHandler(IntWeightInferencetHandler):
    """Brevitas' weight handler, in the arithmetic of the quantizer it stands for."""

    handled_layer = WeightQuantProxyFromInjector

    def prepare_for_export(self, module: WeightQuantProxyFromInjector) -> None:
        """Snapshot scale and zero point, and note the arithmetic."""
        super().prepare_for_export(module)
        quantizer = getattr(module.tensor_quant, "int_quant", None)
        self.reciprocal = isinstance(quantizer, ReciprocalIntQuant)

    def inner_forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The quantized weight, in its own dtype."""
        if not self.reciprocal:
            return super().inner_forward(x, scale, zero_point)
        codes = self.float_to_int_impl(x.float() * (1.0 / scale)) + zero_point
        codes = torch.clamp(codes, self.min_clamp, self.max_clamp)
        return self.dequantize(codes, scale, zero_point).to(x.dtype)


class BalancedWeightHandler(ExactWeightHandler):
    """The same with the scale of every output and input channel, which the metadata of a balanced weight has."""

    handled_layer = BalancedWeightProxy


class TimestepInferenceManager(InferenceManager):
    """Brevitas' inference manager that also knows the quantizers of this package."""

    # the first handler that names a proxy's class wins
    handlers = [  # noqa: RUF012
        TimestepInferenceHandler,
        ExactWeightHandler,
        BalancedWeightHandler,
        *InferenceManager.handlers,
    ]


class inference_mode(quant_inference_mode):  # noqa: N801  named like the context manager it extends
    """Brevitas' ``quant_inference_mode`` for models with timestep quantizers.

    As there: after one forward inside, quantizers are replaced by their bare arithmetic; compile and export then.

    Example:
        >>> with torch.no_grad(), inference_mode(model):  # doctest: +SKIP
        ...     model(sample, timestep)
        ...     fast = torch.compile(model)
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, export_manager=TimestepInferenceManager, **options)


CURE = (
    "Export the denoiser that was given to attach_timesteps, with the timestep as a tensor, or export one graph per "
    "group with dq_brevitas.freeze_timestep_group(model, group)."
)


def check_exportable(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise unless the timestep enters the graph as an input.

    Args:
        model: what is to be exported.
        args: its example inputs.
        kwargs: its example inputs by name.

    Raises:
        TimestepError: the model has timestep quantizers and is not the module that is routed by the timestep, or the
            timestep is a Python number, which exports turn into a constant.
    """
    proxies = timestep_parts(model)
    if not proxies:
        return
    route = route_of(model)
    name = next(iter(proxies))
    if route is None or any(p.timestep_context is not route.context for p in proxies.values()):
        raise TimestepError(
            f"{type(model).__name__} holds timestep quantizers ({name!r}) but is not the denoiser that sees the "
            f"timestep, so its graph would hold the group selected now for ever. {CURE}"
        )
    timestep = route.argument.read(args, kwargs)
    if not isinstance(timestep, Tensor):
        raise TimestepError(
            f"the timestep is {timestep!r}, a {type(timestep).__name__}: an export makes a constant of it, and its "
            f"graph would hold one group for ever. {CURE}"
        )


def export_torch(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.export.ExportedProgram:
    """``torch.export`` of a quantized denoiser, the tables and their lookup by timestep in the graph.

    Args:
        model: a quantized denoiser; not changed.
        args: example inputs. A timestep of one entry makes a graph for one timestep per batch.
        kwargs: example inputs by name.
        options: further arguments of ``torch.export.export``.

    Returns:
        The exported program; right for every group.

    Raises:
        TimestepError: the graph could not see the timestep, so it would hold one group for ever.
    """
    check_exportable(model, args, kwargs or {})
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), inference_mode(model):
        model(*args, **(kwargs or {}))
        return torch.export.export(model, args, dict(kwargs or {}), **options)
