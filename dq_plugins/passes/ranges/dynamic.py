"""Dynamic ranges or ranges by timestep group: which of the two leaves a layer the smaller error.

The layer's output is compared on sampled rows of recorded calls. Ranges by group are those that would be used, chosen
on all recorded calls; the range of each token, or of each sample of a convolution's input, fits every input. With few
bits a range may be cut off at a share of its extremes, the best of some.

Shapes: ``P`` groups of channels of a convolution (1 for a linear layer), ``R`` sampled rows, ``K`` products per output,
``O`` outputs. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from math import log10
from typing import Any

import torch
from torch import Tensor, nn

from dq_plugins.affine import dynamic_parameters, fake_quantize, integer_range
from dq_plugins.layer_kinds import kind_of
from dq_plugins.observers.streaming import stream_inputs
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant
from dq_plugins.progress import Progress
from dq_plugins.quantized.input_rows import input_rows, weight_matrix
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.recipe import PassContext
from dq_plugins.timesteps import TimestepGroups

ROWS = 48
"""Rows of a layer's input that count, for each call."""
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Shares of the extremes that are tried."""
CLIPPED_BITS = 7
"""Widest codes for which they are: 8 bits resolve what is left of the many values."""
ASYMMETRIC_GAIN = 0.1
"""dB that zero points must win: they cost little, and not nothing."""

Gains = dict[str, tuple[DynamicActivationQuant, float]]
"""By layer, the better quantizer with dynamic ranges, and how many dB less error it leaves than ranges by group."""


def dynamic_gains(
    context: PassContext, static: Mapping[str, ActivationQuant], groups: Mapping[str, TimestepGroups]
) -> Generator[Progress, None, Gains]:
    """Compare the errors of layers' outputs under both kinds of ranges.

    Args:
        context: of the calls to judge on.
        static: quantizers with ranges by group, by layer.
        groups: the timestep groups that they name.

    Returns:
        (of the generator) the gains.
    """
    dynamic = {name: _forms(quant.bits, context.targets.symmetric_acts) for name, quant in static.items()}
    layers: dict[str, Any] = {name: context.denoiser.get_submodule(name) for name in static}
    transforms = context.transforms
    weights = {n: _weight_matrix(m, transforms.get(n)) for n, m in layers.items()}
    errors = {name: [0.0] * (1 + len(forms)) for name, forms in dynamic.items()}

    def compare(name: str, x: Tensor, timestep: float) -> None:
        group = groups[static[name].groups].of(timestep)
        generator = context.generator("rows", name, str(timestep))
        for rows, parameters in _rows(layers[name], x, dynamic[name], generator):
            quantized = [static[name].fake_quantize(rows, group)]
            quantized += [fake_quantize(rows, *given, *integer_range(static[name].bits)) for given in parameters]
            for form, each in enumerate(quantized):
                wrong = (each - rows) @ weights[name].transpose(1, 2)  # [P, R, O/P]
                errors[name][form] += float(wrong.double().square().sum())

    timesteps = context.calibration.timesteps
    source = context.denoiser, context.calibration, tuple(static)
    for t in stream_inputs(*source, compare, transforms=transforms, rows=context.row_orders):
        yield Progress(timesteps.index(t) + 1, len(timesteps), f"dynamic ranges, t = {t:g}")
    return {name: _better(dynamic[name], errors[name]) for name in static}


def _forms(bits: int, symmetric: bool) -> list[DynamicActivationQuant]:
    """Quantizers that are tried at a width."""
    clips = CLIPS if bits <= CLIPPED_BITS else (1.0,)
    zero_points = (True,) if symmetric else (True, False)
    return [DynamicActivationQuant(bits, fixed, clip) for fixed in zero_points for clip in clips]


def _weight_matrix(layer: nn.Module, transform: LayerTransform | None) -> Tensor:
    """float32 ``[P, O/P, K]``: the weight that meets the layer's transformed input."""
    return weight_matrix(layer, transformed_weight(layer, transform).detach().float())


def _rows(
    layer: Any, x: Tensor, forms: Sequence[DynamicActivationQuant], generator: torch.Generator
) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Sampled rows ``[P, R, K]`` of a layer's transformed input, and their scales and zero points for every form.

    Zeros around a sample are among its rows; every range has an exact zero.
    """
    kind: Any = kind_of(layer)
    if kind.spatial == 0:
        rows = input_rows(layer, x, ROWS, generator)
        yield rows, [_parameters(rows, form) for form in forms]
        return
    samples = x.split(1) if x.dim() == kind.spatial + 2 else [x[None]]
    for sample in samples:
        rows = input_rows(layer, sample, -(-ROWS // len(samples)), generator)
        ranges = [_parameters(sample, form, kind.spatial) for form in forms]
        yield rows, [(scale.reshape(1), zero_point.reshape(1)) for scale, zero_point in ranges]


def _parameters(x: Tensor, form: DynamicActivationQuant, spatial: int = 0) -> tuple[Tensor, Tensor]:
    return dynamic_parameters(x, form.bits, symmetric=form.symmetric, spatial=spatial, clip=form.clip)


def _better(forms: list[DynamicActivationQuant], errors: list[float]) -> tuple[DynamicActivationQuant, float]:
    """The form to take, and its gain in dB over the first of the errors; zero points have to win something."""
    static, *others = (max(error, 1e-300) for error in errors)
    gains = {form: 10 * log10(static / error) for form, error in zip(forms, others, strict=True)}
    best = max(forms, key=lambda form: gains[form] - ASYMMETRIC_GAIN * (not form.symmetric))
    return best, gains[best]
