"""optimum-quanto: static ranges from a calibration pass, weights in groups at four bits."""

from __future__ import annotations

from benchmarks.peers import Method, Quantized, Setting
from dq_plugins.metrics.size import state_bytes

REQUIREMENTS = ("optimum-quanto==0.2.7",)


def post_training(setting: Setting) -> Quantized:
    """Linear layers and convolutions, as its documentation does it: quantize, calibrate, freeze."""
    from optimum import quanto  # pyrefly: ignore [missing-import]

    weight_bits, act_bits = setting.widths
    weights = {8: quanto.qint8, 4: quanto.qint4}[weight_bits]
    quanto.quantize(setting.denoiser, weights=weights, activations=quanto.qint8 if act_bits else None)
    if act_bits:
        with quanto.Calibration():
            setting.run_calls(setting.denoiser)
    quanto.freeze(setting.denoiser)
    return Quantized(setting.denoiser, state_bytes(setting.denoiser))


METHODS = {
    "optimum-quanto": Method(post_training, ("W8A8", "W4A8"), "simulated"),
    "optimum-quanto, weight-only": Method(post_training, ("W4",), "weight-only"),
}
