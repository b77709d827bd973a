"""NVIDIA ModelOpt's fake quantization by its integer presets, at other widths as well."""

from __future__ import annotations

import copy

from benchmarks.peers import Method, Quantized, Setting, simulated_bytes

REQUIREMENTS = ("nvidia-modelopt==0.47.0",)


def smoothquant(setting: Setting) -> Quantized:
    """``INT8_SMOOTHQUANT_CFG`` with the widths of the setting."""
    import modelopt.torch.quantization as mtq  # pyrefly: ignore [missing-import]

    weight_bits, act_bits = setting.widths
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    for entry in config["quant_cfg"]:
        bits = {"*weight_quantizer": weight_bits, "*input_quantizer": act_bits}.get(entry["quantizer_name"])
        if bits:
            entry["cfg"]["num_bits"] = bits
    denoiser = mtq.quantize(setting.denoiser, config, forward_loop=setting.run_calls)
    enabled = [
        name.removesuffix(".weight_quantizer")
        for name, module in denoiser.named_modules()
        if name.endswith(".weight_quantizer") and module.is_enabled
    ]
    return Quantized(denoiser, simulated_bytes(denoiser, dict.fromkeys(enabled, weight_bits)))


METHODS = {"ModelOpt, SmoothQuant": Method(smoothquant, ("W8A8", "W4A8", "W4A4"), "simulated", "proj_out layers kept")}
