"""How strongly the input channels of a layer are balanced: by the error that each strength leaves.

    b_c = max|x_c|^a / max|W_c|^(1 - a)         normalised to a geometric mean of 1

The layer computes with ``x / b`` and ``W b``, the same in full precision. Strength a moves the unevenness of channels
from the activations (a = 0: their weights become even) into the weights (a = 1: the inputs become even).

Source: Xiao et al. 2023 (SmoothQuant), eq. 4; the strength is searched for instead of given.

Shapes: ``C`` input channels, ``P`` groups of channels, ``K`` products per output, ``O`` outputs, ``R`` sampled rows,
``T`` timesteps. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range

FURTHEST = 1e4
"""Factors lie between its reciprocal and it: beyond, a channel counts as empty."""
WEIGHT_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True)
class InputSample:
    """What is known about a layer's input.

    Attributes:
        low: smallest value of each channel at each timestep, ``[T, C]``.
        high: largest, ``[T, C]``.
        rows: rows of the input, ``[P, R, K]``.
        timestep: index of each row's timestep, int64 ``[R]``.
    """

    low: Tensor
    high: Tensor
    rows: Tensor
    timestep: Tensor


def balance_factors(inputs: Tensor, weights: Tensor, strength: float, quietest: float = 0.0) -> Tensor:
    """Factors of the input channels.

    Args:
        inputs: largest magnitude of each channel of the input, ``[C]``.
        weights: largest magnitude of the weights that multiply it, ``[C]``.
        strength: a, from 0 to 1.
        quietest: share of the loudest channel's magnitude that every channel counts with at least. A channel that was
            quiet by chance is not made so loud that it is cut off when it speaks up.

    Returns:
        ``[C]``, positive; 1 for a channel that is always 0, or whose weights are.
    """
    used = (inputs > 0) & (weights > 0)
    inputs = inputs.clamp(min=quietest * float(inputs.max()))
    factors = torch.ones_like(inputs)
    factors[used] = inputs[used].pow(strength) / weights[used].pow(1 - strength)
    factors[used] /= factors[used].log().mean().exp()
    return factors.clamp(1 / FURTHEST, FURTHEST)


def exact_outputs(sample: InputSample, weights: Sequence[Tensor]) -> list[Tensor]:
    """What layers with weights ``[P, O/P, K]`` give for the sampled rows in full precision, ``[P, R, O/P]`` each."""
    return [sample.rows @ weight.transpose(1, 2) for weight in weights]


def remaining_error(
    sample: InputSample,
    weights: Sequence[Tensor],
    exact: Sequence[Tensor],
    balance: Tensor,
    *,
    act_bits: int | None,
    weight_bits: int | None,
    groups: Tensor,
    symmetric: bool,
) -> float:
    """Squared error of the layers' outputs on the sampled rows, over their power, when both sides are quantized.

    Args:
        sample: of their common input.
        weights: of layers that share it, ``[P, O/P, K]`` each.
        exact: their `exact_outputs`.
        balance: ``[C]``.
        act_bits: width of the input; None leaves it in floating point.
        weight_bits: width of the weights, likewise.
        groups: group of each timestep, int64 ``[T]``; groups have ranges of their own.
        symmetric: zero points of activations are 0.
    """
    parts, _, columns = sample.rows.shape
    spread = balance.reshape(parts, -1).repeat_interleave(columns * parts // len(balance), 1)[:, None]  # [P, 1, K]
    rows = sample.rows / spread
    if act_bits is not None:
        count = int(groups.max()) + 1
        low = (sample.low / balance).amin(1)  # [T]
        high = (sample.high / balance).amax(1)
        low = torch.zeros(count).scatter_reduce(0, groups, low, "amin", include_self=False)  # [G]
        high = torch.zeros(count).scatter_reduce(0, groups, high, "amax", include_self=False)
        scale, zero = affine_parameters(low, high, act_bits, symmetric=symmetric)
        of_row = groups[sample.timestep]
        rows = fake_quantize(rows, scale[of_row][:, None], zero[of_row][:, None], *integer_range(act_bits))
    error = power = 0.0
    for weight, wanted in zip(weights, exact, strict=True):
        balanced = weight * spread
        fake = balanced if weight_bits is None else _rounded(balanced, weight_bits)
        error += float((rows @ fake.transpose(1, 2) - wanted).double().square().sum())
        power += float(wanted.double().square().sum())
    return error / max(power, 1e-300)


def _rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest rounding with one scale per output, the best of a few: ``[P, O/P, K]``."""
    largest = weight.abs().amax(2, keepdim=True)
    best, lowest = weight, torch.full_like(largest, torch.inf)
    for shrink in WEIGHT_SHRINKS if bits < 8 else WEIGHT_SHRINKS[:1]:
        scale, zero = affine_parameters(-largest * shrink, largest * shrink, bits, symmetric=True)
        fake = fake_quantize(weight, scale, zero, *integer_range(bits))
        error = (fake - weight).square().sum(2, keepdim=True)
        best, lowest = torch.where(error < lowest, fake, best), torch.minimum(error, lowest)
    return best
