"""NVIDIA ModelOpt's fake quantization by its integer presets, at other widths as well."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from benchmarks.peers import Method, Quantized, Setting, simulated_bytes

REQUIREMENTS = ("nvidia-modelopt==0.47.0",)


def smoothquant(setting: Setting) -> Quantized:
    """``INT8_SMOOTHQUANT_CFG`` with the widths of the setting."""
    weight_bits, act_bits = setting.widths
    return _quantized(setting, {"num_bits": weight_bits, "axis": 0}, {"num_bits": act_bits, "axis": None})


def svdquant(setting: Setting) -> Quantized:
    """Its SVDQuant in integers: weights and inputs in groups of 32, the latter at run time; a low-rank branch.

    The preset of the project is NVFP4, whose simulation needs CUDA. Convolutions, which SVDQuant leaves out, are not
    quantized.
    """
    weight_bits, act_bits = setting.widths
    weights = {"num_bits": weight_bits, "block_sizes": {-1: 32, "type": "static"}}
    inputs = {"num_bits": act_bits, "type": "dynamic", "block_sizes": {-1: 32}}
    return _quantized(setting, weights, inputs, {"method": "svdquant", "lowrank": RANK}, ("nn.Conv2d",))


def _quantized(
    setting: Setting, weights: Any, inputs: Any, algorithm: Any = None, left_out: Sequence[str] = ()
) -> Quantized:
    import modelopt.torch.quantization as mtq  # pyrefly: ignore [missing-import]

    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    for entry in config["quant_cfg"]:
        entry["cfg"] = {"*weight_quantizer": weights, "*input_quantizer": inputs}.get(entry["quantizer_name"])
        if entry["cfg"] is None:
            del entry["cfg"]
    config["quant_cfg"] += [{"quantizer_name": "*", "parent_class": kind, "enable": False} for kind in left_out]
    config["algorithm"] = algorithm or config["algorithm"]
    denoiser = mtq.quantize(setting.denoiser, config, forward_loop=setting.run_calls)
    enabled = {
        name.removesuffix(".weight_quantizer"): module
        for name, module in denoiser.named_modules()
        if name.endswith(".weight_quantizer") and module.is_enabled
    }
    found = (getattr(module, f"svdquant_lora_{part}", None) for module in enabled.values() for part in "ab")
    branches = sum(4 * each.numel() for each in found if each is not None)
    return Quantized(denoiser, simulated_bytes(denoiser, dict.fromkeys(enabled, setting.widths[0])) + branches)


RANK = 8
KEPT = "proj_out layers kept"
METHODS = {
    "ModelOpt, SmoothQuant": Method(smoothquant, ("W8A8", "W4A8", "W4A4"), "simulated", KEPT),
    "ModelOpt, SVDQuant": Method(svdquant, ("W4A4",), "simulated", f"{KEPT}, convolutions kept"),
}
