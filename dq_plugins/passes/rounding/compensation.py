"""GPTQ: round the columns of a weight one by one, and let the columns still to come make up for each error.

    minimise over codes   ||X W^T - X W^^T||^2  =  sum over outputs of  (w - w^) H (w - w^)^T,    H = X^T X

With ``H = U S U^T`` (U upper triangular, ones on its diagonal; S diagonal) the error is that of independent columns:

    sum over k of  S_kk (e_k + sum over j < k of e_j U_jk)^2,    e = w - w^

so column after column is rounded to ``w^_k = round(w_k + sum over j < k of e_j U_jk)``. These are GPTQ's codes, without
the inverse of H that its own form takes. Cholesky's factors are lower triangles, so columns lie in the order opposite
to that in which they are rounded. Because H is not centred, the mean of the output is kept as well as its variations.

Of a layer with very many columns H would take gigabytes and a minute (``K^2`` numbers, ``K^3 / 3`` products). Such a
layer is rounded part by part, each with the H of its own columns. What the parts so far did to the output,
``D = sum of E X_part^T``, all columns still to come make up for before the next part is rounded, as they do in GPTQ:

    W += D (G + damping)^-1 X,    G = sum over columns still to come of X X^T

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
PART = 1 << 21
"""Numbers of a weight that are looked at together."""
FEW = 1 << 18
"""Numbers of which second moments are computed as they are."""


@dataclass(frozen=True)
class GPTQOptions:
    """Settings.

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        act_order: columns with the largest inputs first.
        columns: of one part, see the module: parts of equal size, as few as have no more.
    """

    damping: float = 0.01
    act_order: bool = True
    columns: int = 4096


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


def squares(rows: Tensor) -> Tensor:
    """Diagonal of ``X^T X`` of rows ``[R, K]``: ``[K]``, summed in float32."""
    total = torch.zeros(rows.shape[1])
    for some in rows.split(256):
        total += some.float().square().sum(0)
    return total


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
    # some outputs at a time, so that little memory is taken: they have nothing to do with each other
    parts = weight.split(max(1, PART // weight.shape[1]))
    shrink = torch.cat([_best_shrink(some, importance, bits, symmetric) for some in parts])  # [O]
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)  # [O]
    scale, zero_point = affine_parameters(low * shrink, high * shrink, bits, symmetric=symmetric)
    return WeightQuant(bits, scale, None if symmetric else zero_point)


def _best_shrink(weight: Tensor, importance: Tensor, bits: int, symmetric: bool) -> Tensor:
    """What the range of each output is best multiplied by: ``[O]`` for ``[O, K]``."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)  # [O]
    best, ratio = torch.full_like(low, torch.inf), torch.ones_like(low)
    for step in range(STEPS if bits < 8 else STEPS_FROM_8_BITS):
        shrink = 1 - SHRINK * step
        scale, zero = affine_parameters(low * shrink, high * shrink, bits, symmetric=symmetric)
        fake = fake_quantize(weight, scale[:, None], zero[:, None], *integer_range(bits))  # [O, K]
        error = fake.sub_(weight).square_() @ importance
        better = error < best
        best, ratio = torch.where(better, error, best), torch.where(better, shrink, ratio)
    return ratio


def compensated_codes(weight: Tensor, rows: Tensor, quant: WeightQuant, options: GPTQOptions = GPTQOptions()) -> Tensor:
    """Codes of a weight, rounded column by column.

    Args:
        weight: ``[O, K]``.
        rows: of the layer's input, ``[R, K]``, of any floating dtype.
        quant: width, scales and zero points; they stay as they are.
        options: settings.

    Returns:
        int8 (int16 above 8 bits) ``[O, K]``.

    Raises:
        PlanError: a row is not finite.
    """
    importance = squares(rows)  # [K]
    if not bool(torch.isfinite(importance).all()):
        raise PlanError("the second moments of a layer's input hold NaN or infinity, so its weight cannot be rounded")
    order = torch.arange(len(importance))
    if options.act_order:
        order = torch.argsort(importance, descending=True, stable=True)
    scale, zeros = quant.steps(weight).expand_as(weight), torch.as_tensor(quant.zeros(weight)).expand_as(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8 if quant.bits <= 8 else torch.int16)
    parts, damping = order.tensor_split(-(-len(order) // options.columns)), options.damping * float(importance.mean())
    remaining = _Remaining(rows, damping) if len(parts) > 1 else None
    for part in parts:
        columns = part.flip(0)  # the last one is rounded first
        x = rows[:, columns].float()  # [R, k]
        wanted = weight[:, columns].float()
        if remaining is not None:
            wanted = wanted + remaining.compensation(x)
        quantizer = scale[:, columns].float(), zeros[:, columns]
        found = _rounded_columns(wanted, _factor(second_moments(x), damping), *quantizer, integer_range(quant.bits))
        codes[:, columns] = found.to(codes.dtype)
        if remaining is not None:
            remaining.take(x, weight[:, columns] - dequantize(found, *quantizer))
    return codes


class _Remaining:
    """What columns still to be rounded make up for: D and G of the module.

    Args:
        rows: ``[R, K]``.
        damping: of G.
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        self.gram = torch.zeros(len(rows), len(rows))  # G, [R, R]
        for some in rows.split(BLOCK * BLOCK, 1):
            self.gram.addmm_(some.float(), some.float().T)
        self.damping = damping
        self.shift: Tensor | None = None  # D, [O, R]

    def compensation(self, x: Tensor) -> Tensor:
        """What the columns of inputs ``[R, k]`` have to add: ``[O, k]``."""
        lower = None if self.shift is None else _factor(self.gram.clone(), self.damping)
        if self.shift is None or lower is None:
            return torch.zeros(())
        return torch.cholesky_solve(self.shift.T, lower).T @ x

    def take(self, x: Tensor, errors: Tensor) -> None:
        """Columns have been rounded; by how much less than their weight: ``[O, k]``."""
        self.gram.addmm_(x, x.T, alpha=-1)
        product = errors @ x.T
        self.shift = product if self.shift is None else self.shift.add_(product)


def _rounded_columns(
    weight: Tensor, lower: Tensor | None, scale: Tensor, zeros: Tensor, limits: tuple[int, int]
) -> Tensor:
    """Codes of a part's columns from the last to the first, ``[O, k]`` as are weight, scale and zeros."""
    count = weight.shape[1]
    if lower is None:
        return quantize(weight, scale, zeros, *limits)
    factor = lower.div_(lower.diagonal().clone())  # U, [k, k]
    columns, scale, zeros = weight.T.contiguous(), scale.T.contiguous(), zeros.T.contiguous()  # a column's lie together
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for stop in range(count, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        wanted = torch.addmm(columns[start:stop], factor[stop:, start:stop].T, errors[stop:])  # [B, O]
        for k in reversed(range(start, stop)):
            column = torch.addmv(wanted[k - start], errors[k + 1 : stop].T, factor[k + 1 : stop, k])
            codes[k] = quantize(column, scale[k], zeros[k], *limits)
            errors[k] = columns[k] - dequantize(codes[k], scale[k], zeros[k])
    return codes.T


def _factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Cholesky's factor of H, damped in place as little as makes it positive definite in float32.

    None where nothing up to ``MOST_DAMPING`` of the mean diagonal does: rounding to nearest is left.
    """
    most, added = MOST_DAMPING * float(hessian.diagonal().mean()), 0.0
    while damping > 0:
        hessian.diagonal().add_(damping - added)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed) and bool(torch.isfinite(lower).all()):
            return lower
        if damping >= most:
            break
        added, damping = damping, min(damping * 10, most)
    return None
