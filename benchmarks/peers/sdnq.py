"""SDNQ: weights ahead of time, activations per token at run time, convolutions too; four bits with a low-rank part."""

from __future__ import annotations

import copy
from functools import partial

from torch import nn

from benchmarks.peers import Method, Quantized, Setting
from dq_plugins.metrics.size import state_bytes

REQUIREMENTS = ("sdnq==0.2.8",)


def quantized(
    denoiser: nn.Module, weight_bits: int = 8, *, integer: bool = True, svd: bool = False, mixed: bool = False
) -> nn.Module:
    """A copy whose linear layers and convolutions are quantized, as far as SDNQ takes them (16384 weights or more).

    Args:
        denoiser: in full precision.
        weight_bits: width of weights.
        integer: multiply in integers, with activations of 8 bits; else weights are dequantized, as in convolutions
            below 8 bits, where SDNQ 0.2.8 fails.
        svd: keep a low-rank part of each weight in floating point.
        mixed: ``weight_bits`` are the least, and a layer gets more where its weight loses too much by SDNQ's threshold.
    """
    from sdnq import sdnq_post_load_quant  # pyrefly: ignore [missing-import]

    return sdnq_post_load_quant(
        copy.deepcopy(denoiser),
        weights_dtype=f"int{weight_bits}",
        quant_conv=True,
        use_quantized_matmul=integer,
        use_quantized_matmul_conv=integer and weight_bits == 8,
        use_svd=svd,
        use_dynamic_quantization=mixed,
        add_skip_keys=False,
    )


def post_load(setting: Setting, *, svd: bool = False, mixed: bool = False) -> Quantized:
    """At the widths of the setting; mixed ones begin two bits below."""
    weight_bits, act_bits = setting.widths
    denoiser = quantized(setting.denoiser, weight_bits - 2 * mixed, integer=act_bits is not None, svd=svd, mixed=mixed)
    return Quantized(denoiser, state_bytes(denoiser))


LARGE = "layers with many weights alone"
METHODS = {
    "SDNQ, dynamic": Method(post_load, ("W8A8", "W4A8"), "integer", LARGE),
    "SDNQ, dynamic, mixed widths": Method(partial(post_load, mixed=True), ("mean-4",), "integer", LARGE),
    "SDNQ, dynamic, SVD": Method(partial(post_load, svd=True), ("W4A8",), "integer", LARGE),
    "SDNQ, weight-only, SVD": Method(partial(post_load, svd=True), ("W4",), "weight-only", LARGE),
}
