"""Ranges per token or by timestep group: which of the two leaves a linear layer the smaller error.

The layer's output is compared on sampled rows of recorded calls. Ranges by group come from half of the calls and are
judged on the other half, where inputs may leave them; ranges per token fit every input.

Shapes: ``R`` sampled rows, ``C`` input channels, ``O`` outputs. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from math import log10
from typing import Any

from torch import Tensor

from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant
from dq_plugins.progress import Progress
from dq_plugins.quantized.input_rows import input_rows
from dq_plugins.quantized.layer import quantize_tokens
from dq_plugins.quantized.layer_transform import transformed_weight
from dq_plugins.recipe import PassContext
from dq_plugins.timesteps import TimestepGroups

ROWS = 128
"""Rows of a layer's input that count, for each call."""
ASYMMETRIC_GAIN = 0.5
"""dB that zero points must win: they cost little, and not nothing."""

Gains = dict[str, tuple[DynamicActivationQuant, float]]
"""By layer, the better quantizer with dynamic ranges, and how many dB less error it leaves than ranges by group."""


def dynamic_gains(
    context: PassContext, static: Mapping[str, ActivationQuant], groups: Mapping[str, TimestepGroups]
) -> Generator[Progress, None, Gains]:
    """Compare the errors of linear layers' outputs under both kinds of ranges.

    Args:
        context: of the calls to judge on.
        static: quantizers with ranges by group, by layer, chosen on other calls.
        groups: the timestep groups that they name.

    Returns:
        (of the generator) the gains.
    """
    forms = (True,) if context.targets.symmetric_acts else (True, False)
    dynamic = {n: [DynamicActivationQuant(quant.bits, symmetric) for symmetric in forms] for n, quant in static.items()}
    layers: dict[str, Any] = {name: context.denoiser.get_submodule(name) for name in static}
    transforms = context.transforms
    weights = {n: transformed_weight(m, transforms.get(n)).detach().float() for n, m in layers.items()}  # [O, C]
    errors = {name: [0.0] * (1 + len(forms)) for name in static}

    def compare(name: str, x: Tensor, timestep: float) -> None:
        group = groups[static[name].groups].of(timestep)
        rows = input_rows(layers[name], x, ROWS, context.generator("rows", name, str(timestep)))[0]  # [R, C]
        quantized = [static[name].fake_quantize(rows, group), *(quantize_tokens(rows, q) for q in dynamic[name])]
        for form, each in enumerate(quantized):
            errors[name][form] += float(((each - rows) @ weights[name].T).double().square().sum())

    timesteps = context.calibration.timesteps
    for t in stream_inputs(context.denoiser, context.calibration, tuple(static), compare, transforms=transforms):
        yield Progress(timesteps.index(t) + 1, len(timesteps), f"ranges per token, t = {t:g}")
    return {name: _better(dynamic[name], errors[name]) for name in static}


def _better(forms: list[DynamicActivationQuant], errors: list[float]) -> tuple[DynamicActivationQuant, float]:
    """The form to take, and its gain in dB over the first of the errors; zero points have to win something."""
    static, *others = (max(error, 1e-300) for error in errors)
    gains = [10 * log10(static / error) for error in others]
    best = len(gains) - 1 if gains[-1] >= gains[0] + ASYMMETRIC_GAIN else 0
    return forms[best], gains[best]


def halves(context: PassContext) -> tuple[PassContext, PassContext]:
    """The same run on calls to choose ranges on, and on others to judge them on."""
    first, second = (replace(context, calibration=part, workdir=None) for part in context.calibration.halves())
    return first, second
