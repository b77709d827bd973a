"""Brevitas by its own tools: least-squares ranges with zero points, GPTQ or learned rounding, and bias correction."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.peers import Method, Quantized, Setting, linear_and_conv, simulated_bytes

REQUIREMENTS: tuple[str, ...] = ()


def post_training(setting: Setting, **steps: Any) -> Quantized:
    """Weights and inputs of all linear layers and convolutions; first and last ones have 8 bits.

    Args:
        setting: as given.
        **steps: options of `BrevitasPTQ`.
    """
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
    from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat

    from benchmarks.stock_brevitas import BrevitasPTQ
    from dq_plugins.plan import Targets
    from dq_plugins.quantized.reconstruction_units import find_units
    from dq_plugins.recipe import PassContext

    weight_bits, act_bits = setting.widths
    context = PassContext(setting.denoiser, setting.calibration, Targets(weight_bits, act_bits))
    layers = linear_and_conv(setting.denoiser)
    edges = {name for name in layers if {"first", "last"} & context.partition.layers[name].roles}
    widths = {name: 8 if name in edges else weight_bits for name in layers}
    blocks = [unit.module for unit in find_units(context.partition, layers)]
    inputs = {name: 8 if name in edges else act_bits for name in layers}
    method = BrevitasPTQ(
        Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloat, inputs, bias_correction=True, **steps
    )
    bytes_ = simulated_bytes(setting.denoiser, widths)
    return Quantized(method(setting.denoiser, widths, blocks, setting.calibration), bytes_)


def rotated(setting: Setting) -> Quantized:
    """Rotated inputs of linear layers, their ranges per token at run time, weights in groups of 32 inputs, GPTQ.

    What its examples have for 4 bits of both (`brevitas_examples.common.generative`), on top of the others here.
    """
    import brevitas.graph  # noqa: F401  the examples import parts of it in an order that fails alone
    from brevitas_examples.common.generative.quantizers import (
        IntWeightSymmetricGroupQuantMSE,
        ShiftedUint8DynamicActPerRowFloat,
    )

    return post_training(
        setting,
        gptq=True,
        rotation=True,
        dynamic=ShiftedUint8DynamicActPerRowFloat,
        grouped=IntWeightSymmetricGroupQuantMSE,
    )


EVERY = ("W8A8", "W4A8", "W4A4")
METHODS = {
    "Brevitas, rotation and GPTQ": Method(partial(post_training, gptq=True, rotation=True), ("W4A4",), "simulated"),
    "Brevitas, rotation, GPTQ, weight groups, ranges per token": Method(rotated, ("W4A4",), "simulated"),
    "Brevitas, GPTQ and bias correction": Method(partial(post_training, gptq=True), EVERY, "simulated"),
    "Brevitas, learned rounding and bias correction": Method(
        partial(post_training, learned=200, learned_calls=40), EVERY, "simulated"
    ),
}
