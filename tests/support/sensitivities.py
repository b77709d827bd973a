"""A tiny recorded denoiser and its candidate quantizers, for sensitivity and allocation tests."""

from __future__ import annotations

from pathlib import Path

import torch
from denoisers import recorded, tiny_denoiser
from torch import nn

import dq_plugins as dq
from dq_plugins.affine import affine_parameters
from dq_plugins.plan import ActivationQuant, WeightQuant
from dq_plugins.quantized.candidates import Candidates
from dq_plugins.quantized.statistics import collect
from dq_plugins.quantized.weight_scale import weight_parameters

WIDTHS = (2, 3, 4, 8)


def candidates_of(denoiser: nn.Module, calibration: dq.CalibrationSet, widths: tuple[int, ...] = WIDTHS) -> Candidates:
    layers = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    found = collect(denoiser, calibration, layers)
    weights, activations = {}, {}
    for name in layers:
        weight = denoiser.get_submodule(name).weight
        weights[name] = {b: WeightQuant(b, weight_parameters(weight, b, method="minmax")[0]) for b in widths}
        low, high = found.low(name).float(), found.high(name).float()
        parameters = {b: affine_parameters(low, high, b, symmetric=False) for b in widths}
        activations[name] = {b: ActivationQuant(b, "all", *parameters[b]) for b in widths}
    groups = dq.TimestepGroups.one_per_timestep(calibration.timesteps)
    return Candidates(weights, activations, {"all": groups})


def tiny_setting(folder: Path, batch: int = 2) -> tuple[nn.Module, dq.CalibrationSet, Candidates]:
    denoiser = tiny_denoiser()
    with torch.no_grad():  # the modulation must matter more than at a random start, where t hardly does
        for block in denoiser.body:
            block.beta.weight.mul_(4)
    calibration = recorded(denoiser, folder / "calibration", batch=batch)
    return denoiser, calibration, candidates_of(denoiser, calibration)
