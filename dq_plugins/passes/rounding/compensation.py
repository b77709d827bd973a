"""GPTQ: round the columns of a weight one by one, and let the columns still to come make up for each error.

    minimise over codes   ||X W^T - X W^^T||^2  =  sum over outputs of  (w - w^) H (w - w^)^T,    H = X^T X

With ``H = U D U^T`` (U upper triangular, ones on its diagonal; D diagonal) the error is that of independent columns:

    sum over k of  D_kk (e_k + sum over j < k of e_j U_jk)^2,    e = w - w^

so column after column is rounded to ``w^_k = round(w_k + sum over j < k of e_j U_jk)``. These are GPTQ's codes, without
the inverse of H that its own form takes. Because H is not centred, the mean of the output is kept as well as its
variations.

Source: Frantar et al. 2022 (GPTQ), algorithm 1, with its order by descending diagonal of H ("act-order") and its
damping of the diagonal; in the form of Chee et al. 2023 (QuIP), section 3, which proves that the two are equal.

Shapes: ``O`` outputs, ``K`` products per output (columns), ``R`` rows of the input. All is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, dequantize, fake_quantize, integer_range, quantize
from dq_plugins.errors import PlanError
from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.weight_groups import grouped_quantizer

BLOCK = 64
SHRINK, STEPS, STEPS_FROM_8_BITS = 0.02, 31, 11
"""Min-max ranges are shrunk in so many steps: down to 0.4; from 8 bits, where cutting off rarely pays, to 0.8."""
MOST_DAMPING = 1.0
FEW = 1 << 18
"""Numbers of which second moments are computed as they are."""


@dataclass(frozen=True)
class GPTQOptions:
    """Settings.

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        act_order: columns with the largest inputs first.
    """

    damping: float = 0.01
    act_order: bool = True


def second_moments(rows: Tensor) -> Tensor:
    """``X^T X`` of rows ``[R, K]``: ``[K, K]``.

    On a CPU in integers, several times as fast: each column in 7 bits of its own, with which processors without
    instructions for them do not saturate. Their rounding adds less to the diagonal than damping does.
    """
    if rows.device.type != "cpu" or rows.numel() < FEW:
        return rows.T @ rows
    scale = rows.abs().amax(0).clamp(min=1e-30) / 63  # [K]
    codes = (rows / scale).round_().to(torch.int8)
    return torch._int_mm(codes.T.contiguous(), codes).float().mul_(scale).mul_(scale[:, None])


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
    for step in range(STEPS if bits < 8 else STEPS_FROM_8_BITS):
        shrink = 1 - SHRINK * step
        scale, zero = affine_parameters(low * shrink, high * shrink, bits, symmetric=symmetric)
        fake = fake_quantize(weight, scale[:, None], zero[:, None], *integer_range(bits))  # [O, K]
        error = fake.sub_(weight).square_() @ importance
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
    factor = _unit_factor(hessian[order][:, order], options.damping)  # U, [K, K]
    columns = weight.float().T[order]  # [K, O]: what belongs to one column lies together
    scale = quant.steps(weight).float().expand_as(weight).T[order]  # [K, O]
    zeros = torch.as_tensor(quant.zeros(weight)).expand_as(weight).T[order]
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        wanted = torch.addmm(columns[start:stop], factor[:start, start:stop].T, errors[:start])  # [B, O]
        for k in range(start, stop):
            column = torch.addmv(wanted[k - start], errors[start:k].T, factor[start:k, k])
            codes[k] = quantize(column, scale[k], zeros[k], *integer_range(quant.bits))
            errors[k] = columns[k] - dequantize(codes[k], scale[k], zeros[k])
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous().to(torch.int8 if quant.bits <= 8 else torch.int16)


def _unit_factor(hessian: Tensor, damping: float) -> Tensor:
    """U of ``H = U D U^T``, with H damped as little as makes it positive definite in float32."""
    mean = float(hessian.diagonal().mean())
    flipped, share = hessian.flip(0, 1), damping
    while mean > 0:
        damped = flipped.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(torch.isfinite(lower).all()):
            return (lower / lower.diagonal()).flip(0, 1)
        if share >= MOST_DAMPING:
            break
        share = min(share * 10, MOST_DAMPING)
    return torch.eye(len(hessian))  # nearest rounding
