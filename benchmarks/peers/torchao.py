"""torchao as it comes: weights alone, ranges at run time, and PT2E's static ranges."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import nn

from benchmarks.peers import Method, Quantized, Setting, linear_and_conv, simulated_bytes
from benchmarks.peers.standing_in import standing_in
from dq_plugins.metrics.size import state_bytes

REQUIREMENTS: tuple[str, ...] = ()


def _taken(module: nn.Module, name: str = "") -> bool:
    """Linear layers of more than one input: of one, torchao's dynamic form fails."""
    return isinstance(module, nn.Linear) and module.in_features > 1


def _group(denoiser: nn.Module) -> int:
    """Inputs that share a scale: 32, torchao's default, where all layers allow it."""
    return gcd(32, *(module.in_features for module in denoiser.modules() if _taken(module)))  # type: ignore[arg-type]


def weight_only(setting: Setting) -> Quantized:
    """Linear layers; 8 bits by output, 4 bits by group."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    if setting.widths[0] == 8:
        quantize_(setting.denoiser, Int8WeightOnlyConfig(set_inductor_config=False), _taken)
    else:
        quantize_(setting.denoiser, IntxWeightOnlyConfig(torch.int4, PerGroup(_group(setting.denoiser))), _taken)
    return Quantized(setting.denoiser, state_bytes(setting.denoiser))


def dynamic(setting: Setting) -> Quantized:
    """Linear layers; activations per token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Int8
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig as Intx
    from torchao.quantization import PerGroup, quantize_

    group = PerGroup(_group(setting.denoiser))
    config = Int8(set_inductor_config=False) if setting.widths[0] == 8 else Intx(torch.int4, group)
    quantize_(setting.denoiser, config, _taken)
    return Quantized(setting.denoiser, state_bytes(setting.denoiser))


def x86_quantizer() -> Any:
    """PT2E's quantizer for x86 processors with its default config."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86

    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


def pt2e(denoiser: nn.Module, calls: Sequence[dict[str, Any]], quantizer: Any) -> nn.Module:
    """The exported graph of a denoiser, calibrated on ``calls`` and converted."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(denoiser, (), calls[0]).module(), quantizer)
        for call in calls:
            prepared(**call)
    return convert_pt2e(prepared)


def pt2e_static(setting: Setting) -> Quantized:
    """One range for all timesteps. Inductor folds the int8 weights when it compiles, so bytes are counted."""
    size = simulated_bytes(setting.denoiser, dict.fromkeys(linear_and_conv(setting.denoiser), 8))
    converted = pt2e(setting.denoiser, setting.calls(), x86_quantizer())
    return Quantized(standing_in(setting.denoiser, converted), size)


LINEAR = "linear layers alone"
METHODS = {
    "torchao, weight-only": Method(weight_only, ("W4",), "weight-only", LINEAR),
    "torchao, dynamic": Method(dynamic, ("W8A8", "W4A8"), "integer", LINEAR),
    "torchao, PT2E static": Method(pt2e_static, ("W8A8",), "integer when compiled"),
}
