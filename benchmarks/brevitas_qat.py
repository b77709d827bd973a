"""A stock Brevitas training script with timestep groups, lowered to torchao: the same images?

    python -m benchmarks.brevitas_qat [--iterations 30] [--images 8] [--steps 20]

The digits transformer is quantized by Brevitas to W8A8, each activation with 8 timestep groups, calibrated, and trained
for a short while against its full-precision self. The trained model is read back as a plan. Compared are samples from
the same noise: Brevitas (fake quantization), the plan simulated, and the plan in torchao's integer kernels.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from typing import Any

import brevitas.nn as qnn
import numpy as np
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant import Int8WeightPerChannelFloat
from dq_brevitas import Int8ActPerTimestepFloat, attach_timesteps, float_model, plan_from_model
from dq_diffusers.recording import denoiser_of, load_pipeline, sampler
from torch import nn

import dq_plugins as dq
from benchmarks.records import Records
from dq_plugins.bundled_denoisers import bundled


def quantized_by_brevitas(denoiser: nn.Module, calls: dq.CalibrationSet) -> nn.Module:
    """The stock script with two lines changed, up to its training loop."""
    quantizers = {"input_quant": Int8ActPerTimestepFloat, "weight_quant": Int8WeightPerChannelFloat, "bias_quant": None}
    layers = {nn.Linear: (qnn.QuantLinear, quantizers), nn.Conv2d: (qnn.QuantConv2d, quantizers)}
    model = layerwise_quantize(copy.deepcopy(denoiser), layers)
    with torch.no_grad(), calibration_mode(attach_timesteps(model, 8)):
        for call in calls.calls():
            call.run(model)
    return model


def train(model: nn.Module, calls: dq.CalibrationSet, iterations: int) -> list[float]:
    """Follow the recorded outputs; returns the losses."""
    optimizer, losses = torch.optim.Adam(model.train().requires_grad_(True).parameters(), 1e-4), []
    recorded = list(calls.calls())
    draw = torch.randint(len(recorded), (iterations,), generator=torch.Generator().manual_seed(0)).tolist()
    for index in draw:
        call = recorded[index]
        loss = (call.run(model) - call.output).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval().requires_grad_(False)
    return losses


def psnr(images: np.ndarray, reference: np.ndarray) -> list[float]:
    """Decibels of each image in [0, 1]; 120 stands for equal."""
    errors = ((images - reference) ** 2).reshape(len(images), -1).mean(1)
    return [round(float(-10 * np.log10(max(e, 1e-12))), 2) for e in errors]


def pooled(decibels: list[float]) -> float:
    """Decibels of the mean squared error over all images."""
    return round(float(-10 * np.log10(np.mean(10 ** (-np.array(decibels) / 10)))), 2)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train, lower, sample three times."""
    pipe = load_pipeline(bundled("digits"))
    _, denoiser = denoiser_of(pipe)
    denoiser.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        calls = dq.record(denoiser, sampler(pipe, steps=args.steps, images=4, batch=4), out=folder, progress=False)
        model = quantized_by_brevitas(denoiser, calls)
        losses = train(model, calls, args.iterations)
        plan, trained = plan_from_model(model, calls.schedule), float_model(model)
        run = sampler(pipe, steps=args.steps, seed=1, images=args.images, batch=8)

        def images(denoiser: nn.Module) -> np.ndarray:
            return np.concatenate([np.asarray(out.images) for out in run(denoiser)])

        found = {
            "Brevitas": images(model),
            "simulate": images(dq.apply(trained, plan, backend="simulate")),
            "torchao": images(dq.apply(trained, plan, backend="torchao")),
            "full precision": images(denoiser),
        }
    pairs = (("torchao", "Brevitas"), ("torchao", "simulate"), ("simulate", "Brevitas"), ("Brevitas", "full precision"))
    compared = {f"{a} to {b}, dB": psnr(found[a], found[b]) for a, b in pairs}
    lowest = {f"least of {name}": min(values) for name, values in compared.items()}
    lowest |= {f"all images, {name}": pooled(values) for name, values in compared.items()}
    return (
        {"loss of the first and last 5": [float(np.mean(losses[:5])), float(np.mean(losses[-5:]))]} | lowest | compared
    )


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    records = Records("brevitas_qat", vars(args))
    print(json.dumps(records.get("digits W8A8", lambda: measure(args)), indent=1))


if __name__ == "__main__":
    main()
