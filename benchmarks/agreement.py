"""Fake-quantized against integer execution of one plan: layer by layer, and on sampled images.

    python -m benchmarks.agreement --model digits
    python -m benchmarks.agreement --model emoji --compile

The two differ in the order of float32 sums only: an input on the border between two codes can go either way, and
sampling carries that on. A layer's difference is given in steps of an 8-bit quantizer of its output,
``(max - min) / 255``; images as PSNR, image by image.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.bundled_denoisers import NAMES, bundled
from dq_plugins.calibration import CalibrationSet


def recorded(pipe: Any, denoiser: nn.Module, folder: str, steps: int, seed: int) -> CalibrationSet:
    return dq.record(denoiser, sampler(pipe, steps=steps, images=8, batch=4, seed=seed), folder)


@torch.no_grad()
def worst_layers(simulated: nn.Module, integer: nn.Module, calls: CalibrationSet) -> dict[str, float]:
    """Largest difference of every integer layer on the inputs that the simulated denoiser gives it, in 8-bit steps."""
    layers = {name: m for name, m in integer.named_modules() if hasattr(m, "execution")}
    worst = dict.fromkeys(layers, 0.0)
    from dq_plugins.timesteps import context_of

    context = context_of(integer)
    assert context is not None

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            difference = float((layers[name](*args) - output).abs().max())
            step = float(output.max() - output.min()) / 255
            worst[name] = max(worst[name], difference / step if step > 0 else math.inf if difference else 0.0)

        return hook

    hooks = [simulated.get_submodule(name).register_forward_hook(compare(name)) for name in layers]
    for t in calls.timesteps[:: max(1, len(calls.timesteps) // 5)]:
        with context.select(t):
            for call in calls.calls(t):
                call.run(simulated)
    for hook in hooks:
        hook.remove()
    return worst


def images(pipe: Any, denoiser: Any, steps: int) -> np.ndarray:
    batches = sampler(pipe, steps=steps, images=8, batch=4, seed=2000)(denoiser)
    return np.stack([np.squeeze(np.asarray(image)) for batch in batches for image in batch.images]).astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> list[float]:
    """In dB, one value an image; images between 0 and 255, or 0 and 1."""
    peak = 255.0 if max(a.max(), b.max()) > 1.5 else 1.0
    errors = ((a - b) ** 2).reshape(len(a), -1).mean(1)
    return [10 * math.log10(peak**2 / error) if error else math.inf for error in errors]


def measure(name: str, steps: int, compiled: bool) -> dict[str, Any]:
    pipe = load_pipeline(str(bundled(name)))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        calibration = recorded(pipe, denoiser, f"{folder}/a", steps, 0)
        plan = dq.make_plan(denoiser, calibration, "default", weight_bits=8, act_bits=8)
        simulated, integer = (dq.apply(copy.deepcopy(denoiser), plan, backend=b) for b in ("simulate", "torchao"))
        worst = worst_layers(simulated, integer, calibration)
    reference, fake, real = (images(pipe, d, steps) for d in (denoiser, simulated, integer))
    result = {
        "model": name,
        "integer layers": len(worst),
        "largest difference of a layer, 8-bit steps": max(worst.values()),
        "images, integer to fake-quantized, dB": psnr(real, fake),
        "images, integer to fp32, dB": psnr(real, reference),
        "images, fake-quantized to fp32, dB": psnr(fake, reference),
    }
    if compiled:
        with torch.no_grad():
            integer.compile(dynamic=False)
            result["images, integer compiled to eager, dB"] = psnr(images(pipe, integer, steps), real)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="digits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="also compare compiled with eager integer execution")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.steps, arguments.compile)
    for key, value in result.items():
        if isinstance(value, list):
            value = f"median {np.median(value):.1f}, worst {min(value):.1f}"
        print(f"{key:45} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
