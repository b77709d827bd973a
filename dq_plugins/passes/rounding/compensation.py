"""GPTQ: round the columns of a weight one by one, and let the columns still to come make up for each error.

    minimise over codes   ||X W^T - X W^^T||^2  =  sum over outputs of  (w - w^) H (w - w^)^T,    H = X^T X

Column after column: ``e = (w_k - w^_k) / U_kk`` and ``W_j -= e U_kj`` for all later columns j, where ``U`` is the upper
Cholesky factor of ``H^-1``. Because H is not centred, the mean of the output is kept as well as its variations.

Source: Frantar et al. 2022 (GPTQ), algorithm 1, with its order by descending diagonal of H ("act-order"), its blocks of
columns and its damping of the diagonal.

Shapes: ``O`` outputs, ``K`` products per output (columns), ``R`` rows of the input. All is float32; the sums over
rows are float32 sums of at most a few thousand terms added up in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range, quantize
from dq_plugins.errors import PlanError
from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.weight_groups import grouped_quantizer

BLOCK = 128
SHRINKS = tuple(1 - 0.02 * step for step in range(31))  # of the min-max range, down to 0.4
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class GPTQOptions:
    """Settings.

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        act_order: columns with the largest inputs first.
    """

    damping: float = 0.01
    act_order: bool = True


def weighted_quantizer(weight: Tensor, importance: Tensor, quant: WeightQuant) -> WeightQuant:
    """Scales and zero points that minimise ``sum_k h_k (w_k - w^_k)^2`` of nearest rounding.

    Args:
        weight: ``[O, K]``.
        importance: diagonal of H, ``[K]``.
        quant: width, form and number of groups.

    Returns:
        Another of this form, with nearest rounding.
    """
    bits, symmetric = quant.bits, quant.symmetric
    if quant.group_scale is not None:
        groups = quant.group_scale.shape[1]
        return grouped_quantizer(weight, groups, bits, symmetric=symmetric, power=2.0, importance=importance)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)  # [O]
    best = torch.full_like(low, torch.inf)
    ratio = torch.ones_like(low)
    for shrink in SHRINKS:
        scale, zero = affine_parameters(low * shrink, high * shrink, bits, symmetric=symmetric)
        fake = fake_quantize(weight, scale[:, None], zero[:, None], *integer_range(bits))  # [O, K]
        error = ((weight - fake).square() * importance).sum(1)
        better = error < best
        best, ratio = torch.where(better, error, best), torch.where(better, shrink, ratio)
    scale, zero_point = affine_parameters(low * ratio, high * ratio, bits, symmetric=symmetric)
    return WeightQuant(bits, scale, None if symmetric else zero_point)


def compensated_codes(
    weight: Tensor, hessian: Tensor, quant: WeightQuant, options: GPTQOptions = GPTQOptions()
) -> Tensor:
    """Codes of a weight, rounded column by column.

    Args:
        weight: ``[O, K]``.
        hessian: ``X^T X`` or a multiple of it, ``[K, K]``.
        quant: width, scales and zero points; they stay as they are.
        options: settings.

    Returns:
        int8 (int16 above 8 bits) ``[O, K]``.

    Raises:
        PlanError: H is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise PlanError("the second moments of a layer's input hold NaN or infinity, so its weight cannot be rounded")
    order = torch.arange(len(hessian))
    if options.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], options.damping)  # [K, K]
    work = weight.float()[:, order].clone()  # [O, K]
    scale = quant.steps(weight).float().expand_as(work)[:, order]  # [O, K]
    zeros = torch.as_tensor(quant.zeros(weight)).expand_as(work)[:, order]
    low, high = integer_range(quant.bits)
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        block, inner = work[:, start:stop], upper[start:stop, start:stop]  # [O, B], [B, B]
        errors = torch.empty_like(block)
        for k in range(stop - start):
            column, place = block[:, k : k + 1], slice(start + k, start + k + 1)  # [O, 1]
            step, zero = scale[:, place], zeros[:, place]
            codes[:, place] = code = quantize(column, step, zero, low, high)
            errors[:, k : k + 1] = error = (column - (code - zero) * step) / inner[k, k]
            block[:, k + 1 :] -= error * inner[k, k + 1 :]
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored.to(torch.int8 if quant.bits <= 8 else torch.int16)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of H, damped as little as makes it positive definite in float32."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:
        return torch.eye(len(hessian))
    share = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        if share >= MOST_DAMPING:
            return torch.eye(len(hessian))  # nearest rounding
        share = min(share * 10, MOST_DAMPING)
