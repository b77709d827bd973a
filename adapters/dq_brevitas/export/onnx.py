"""ONNX in QCDQ style (QuantizeLinear, Clip, DequantizeLinear), scales gathered from the table inside the graph."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dq_brevitas import host  # noqa: F401  isort: skip
import onnx
import torch
from brevitas.export.onnx.standard.qcdq.handler import StdQCDQCastONNXActQuantProxyHandler
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXDynamoManager
from torch import Tensor, nn

from dq_brevitas.balanced import read_balance
from dq_brevitas.dynamic import dynamic_inputs
from dq_brevitas.export.inference import check_exportable
from dq_brevitas.integer import ReciprocalIntQuant
from dq_brevitas.proxy import TimestepActQuantProxyFromInjector
from dq_brevitas.weights import bake_weights, quantized_layers
from dq_plugins.errors import DQError, require
from dq_plugins.timesteps import select_for_input

OPSET = 18


class TimestepQCDQHandler(StdQCDQCastONNXActQuantProxyHandler):
    """QCDQ of an activation whose scale and zero point are gathered by the timestep group."""

    handled_layer = TimestepActQuantProxyFromInjector

    def prepare_for_export(self, module: TimestepActQuantProxyFromInjector) -> None:
        """Snapshot the tables, in the dtypes ONNX wants."""
        self.validate(module)
        bits = module.bit_width()
        self.context, self.groups, self.rows = module.timestep_context, module.groups, module.rows
        self.dtype = self.signed_dtype(bits, module.is_signed)
        self.register_buffer("scales", module.scale_table().detach().float().clone())
        self.register_buffer("zero_points", module.zero_point_table().detach().float())
        self.register_buffer("bit_width", bits.detach().clone())
        self.clip = self.int_clip_symbolic_kwargs(module.is_narrow_range, module.is_signed, bits)
        self.symbolic_kwargs = {"bit_width": bits}

    def symbolic_execution(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Emit the operations for ``x``."""
        index = self.context.index(self.groups)
        scale, zero_point = (select_for_input(t, index, x, rows=self.rows) for t in (self.scales, self.zero_points))
        axis = 0 if scale.dim() else None
        flat = scale.reshape(-1) if scale.dim() else scale
        zero = zero_point.reshape(flat.shape).to(self.dtype)
        y = self.quantize_fn(x.float(), flat, zero, self.dtype, axis)
        if self.clip is not None:
            y = self.clip_fn(y, *self.clip.values())
        y = self.dequantize_fn(y, flat, zero, axis)
        return y.to(x.dtype), scale, zero_point, self.bit_width


class TimestepQCDQManager(StdQCDQONNXDynamoManager):
    """Brevitas' QCDQ manager that also knows timestep quantizers."""

    handlers = [TimestepQCDQHandler, *StdQCDQONNXDynamoManager.handlers]  # noqa: RUF012


def export_onnx_qcdq(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    **options: Any,
) -> Any:
    """Export a quantized denoiser to ONNX; one graph serves every timestep group.

    Weights keep their QuantizeLinear node, so runtimes see integers after folding. Run the graph in onnxruntime with
    `onnxruntime_options`. ONNX divides by the scale where a plan multiplies by its reciprocal; weights are put on their
    grid first, so only activations within a rounding error of a tie can differ, by one code.

    Args:
        model: a quantized denoiser; not changed.
        args: example inputs. A timestep of one entry makes a graph for one timestep per batch.
        kwargs: example inputs by name.
        path: file to write; None only returns the model.
        options: further arguments of ``torch.onnx.export`` (``dynamic_shapes``, ``input_names``, ...).

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxoptimizer is not installed.
        TimestepError: the graph could not see the timestep, so it would hold one group for ever.
        DQError: a width above 8 bits, which QuantizeLinear does not have, balanced input channels, or dynamic ranges.
    """
    for package in ("onnxscript", "onnxoptimizer"):
        require(package, "export", "export to ONNX")
    check_exportable(model, args, kwargs or {})
    _check_layers(model)
    positional, names = _positional(model, args, kwargs or {})
    model = _on_grid(copy.deepcopy(model).eval())
    if "input_names" not in options and all(isinstance(a, Tensor) for a in positional):
        options["input_names"] = names
    options = {
        "dynamo": True,
        "opset_version": OPSET,
        "optimize": True,
        "verbose": False,
        "keep_initializers_as_inputs": False,
        **options,
    }
    with tempfile.TemporaryDirectory() as scratch:  # the manager returns nothing, only files
        target = str(path or Path(scratch) / "model.onnx")
        with torch.no_grad():
            TimestepQCDQManager.export(model, args=positional, export_path=target, **options)
        return onnx.load(target)


def onnxruntime_options() -> Any:
    """``onnxruntime.SessionOptions`` under which the graph is run as it is written.

    By default onnxruntime replaces a matrix product with constant integer weights by ``MatMulNBits`` and quantizes its
    input once more, block by block, whatever the graph says. Pass the options to ``InferenceSession``.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    require("onnxruntime", "export", "run an exported model")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


def _check_layers(model: nn.Module) -> None:
    if dynamic := dynamic_inputs(model):
        raise DQError(
            f"the input of layer {next(iter(dynamic))!r} has dynamic ranges, and QuantizeLinear knows its "
            "scale beforehand. Use dq_brevitas.export_torch, or ranges by timestep group."
        )
    for name, layer in quantized_layers(model).items():
        if read_balance(layer) is not None:
            raise DQError(
                f"layer {name!r} has balanced input channels, and DequantizeLinear has no factors for them. Use "
                "dq_brevitas.export_torch, or leave the pass 'channel-balance' out of the recipe."
            )
        for proxy in (layer.weight_quant, layer.input_quant):
            if proxy.is_quant_enabled and not 2 <= int(proxy.bit_width()) <= 8:
                raise DQError(
                    f"layer {name!r} has a quantizer of {int(proxy.bit_width())} bits; ONNX QCDQ has 2 to 8. "
                    "Use dq_brevitas.export_torch, which has no such limit."
                )


def _positional(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], list[str]]:
    """All inputs by position, and their names: the ONNX exporter of Brevitas takes a trailing dict for keywords."""
    bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    if bound.kwargs:
        bound.apply_defaults()
    if bound.kwargs:
        raise DQError(f"{type(model).__name__}.forward takes {sorted(bound.kwargs)} by keyword only; wrap it to export")
    return bound.args[1:], list(bound.arguments)[1 : len(bound.args)]


def _on_grid(model: nn.Module) -> nn.Module:
    for layer in quantized_layers(model).values():
        if isinstance(getattr(layer.weight_quant.tensor_quant, "int_quant", None), ReciprocalIntQuant):
            bake_weights(layer)  # its arithmetic is not ONNX's
    return model
