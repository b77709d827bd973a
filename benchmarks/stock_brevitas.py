"""Post-training quantization as Brevitas itself does it, for comparison: its quantizers, calibration and rounding.

Nothing here is ours but the choice of layers and widths, which are those of a plan, and the recorded calls, which all
methods calibrate on. Activations have one static range for all timesteps; Brevitas knows no other static one. Embedding
tables stay in floating point, because its quantized embedding knows a single scale for the whole table.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.equalize import LayerwiseActivationRotation
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.inject import ExtendedInjector
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from torch import nn

from benchmarks.stock_brevitas_rounding import learn_rounding
from dq_plugins.calibration import CalibrationSet
from dq_plugins.calibration.call import Call

Quantizer = type[ExtendedInjector]


@dataclass(frozen=True)
class BrevitasPTQ:
    """One way through Brevitas' tools, in the order of its own examples.

    Attributes:
        weights: weight quantizer; its width is the plan's.
        activations: quantizer of the layers' inputs, static, per tensor.
        input_widths: bits of the input, for every layer; None: 8.
        gptq: correct the weights column by column, with quantized activations.
        learned: iterations of learned rounding for each block; 0 for none.
        learned_calls: recorded calls that learned rounding sees, evenly spread; None: all of them.
        bias_correction: match the mean of every layer's output; layers without a bias get one.
        rotation: Hadamard transforms of the inputs of linear layers, which Brevitas computes when the layer runs.
        dynamic: quantizer of the inputs of linear layers in place of ``activations``, with ranges at run time.
        grouped: weight quantizer of linear layers in place of ``weights``, with a scale for so many inputs.
        group_size: inputs of a weight that share a scale under ``grouped``.
    """

    weights: Quantizer = Int8WeightPerChannelFloat
    activations: Quantizer = Int8ActPerTensorFloat
    input_widths: dict[str, int] | None = None
    gptq: bool = False
    learned: int = 0
    learned_calls: int | None = None
    bias_correction: bool = False
    rotation: bool = False
    dynamic: Quantizer | None = None
    grouped: Quantizer | None = None
    group_size: int = 32

    def __call__(
        self, denoiser: nn.Module, widths: dict[str, int], blocks: Sequence[str], calls: CalibrationSet
    ) -> nn.Module:
        """A quantized copy, ready for inference.

        Args:
            denoiser: in full precision.
            widths: bits of the weight, for every layer to be quantized.
            blocks: names of the modules that learned rounding takes one at a time, in execution order.
            calls: recorded calls to calibrate on.
        """
        model = copy.deepcopy(denoiser)
        if self.rotation:
            model = LayerwiseActivationRotation(
                blacklist_layer=[n for n in linear_layers(model) if n not in widths]
            ).apply(model)
        model = layerwise_quantize(model, self._layer_map(widths)).eval().requires_grad_(False)
        recorded = list(calls.calls())
        with torch.no_grad():
            with calibration_mode(model):
                for call in recorded:
                    call.run(model)
            recorded[0].run(model)  # weight scales are parameters that start at their first use
            if self.gptq:
                _gptq(model, recorded)
        if self.learned:
            learn_rounding(model, blocks, spread(recorded, self.learned_calls), self.learned)
        if self.bias_correction:
            with torch.no_grad(), bias_correction_mode(model):
                for call in recorded:
                    call.run(model)
        quant_inference_mode(model, cache_quant_weight=True).__enter__()  # for good: same values, three times as fast
        return model

    def _layer_map(self, widths: dict[str, int]) -> dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]]:
        options = {
            "weight_quant": self.weights,
            "weight_bit_width": lambda module, name: widths[layer_name(name)],
            # Statistics of the one column that GPTQ quantizes at a time would be no scale.
            "weight_scaling_impl_type": "parameter_from_stats",
            "input_quant": self.activations,
            **(
                {"input_bit_width": lambda module, name: self.input_widths[layer_name(name)]}
                if self.input_widths
                else {}
            ),
            "output_quant": None,
            "bias_quant": None,
            "return_quant_tensor": False,
        }
        linear = dict(options)
        if self.dynamic is not None:
            by_row = {"dynamic_scaling_broadcastable_fn": one_for_each_row, "permute_dims": None, "stats_reduce_dim": 1}
            linear |= {"input_quant": self.dynamic, **{f"input_{key}": value for key, value in by_row.items()}}
        if self.grouped is not None:  # injectors are false
            linear |= {"weight_quant": self.grouped, "weight_group_size": self.group_size}
        return {nn.Linear: (qnn.QuantLinear, linear), nn.Conv2d: (qnn.QuantConv2d, options)}


def one_for_each_row(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Scales ``[R]`` of rows, shaped so that they multiply an input of ``shape [..., C]``."""
    return scales.view(*shape[:-1], 1)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def layer_name(name: str) -> str:
    """Name before rotation, which wraps a layer."""
    return name.removesuffix(".layer")


def spread(recorded: list[Call], count: int | None) -> list[Call]:
    """That many of the calls, evenly spaced from the first to the last."""
    wanted = min(count or len(recorded), len(recorded))
    return [recorded[round(i * (len(recorded) - 1) / max(wanted - 1, 1))] for i in range(wanted)]


def _gptq(model: nn.Module, recorded: Sequence[Call]) -> None:
    with gptq_mode(model, create_weight_orig=False) as mode:
        for _ in range(mode.num_layers):
            for call in recorded:
                mode.model(**call.kwargs)  # returns nothing: it stops at the layer in hand
            mode.update()
