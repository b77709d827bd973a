"""GPTQ: round the columns of a weight one by one, and let the columns still to come make up for each error.

    minimise over codes   ||X W^T - X W^^T||^2  =  sum over outputs of  (w - w^) H (w - w^)^T,    H = X^T X

With ``H = U S U^T`` (U upper triangular, ones on its diagonal; S diagonal) the error is that of independent columns:

    sum over k of  S_kk (e_k + sum over j < k of e_j U_jk)^2,    e = w - w^

so column after column is rounded to ``w^_k = round(w_k + sum over j < k of e_j U_jk)``. These are GPTQ's codes, without
the inverse of H that its own form takes. Cholesky's factors are lower triangles, so columns lie in the order opposite
to that in which they are rounded. Because H is not centred, the mean of the output is kept as well as its variations.

Of a layer with very many columns H would take gigabytes and a minute (``K^2`` numbers, ``K^3 / 3`` products). Such a
layer is rounded part by part. With ``X_p`` the inputs of a part and ``X_l`` those of all later ones, in terms of rows,

    A = X_l X_l^T + damping          the part's columns add  D A'^-1 X_p,      D = sum of E X^T over the parts before
                                     and see  H_p = damping (X_p^T A^-1 X_p + 1),

where ``A'`` is the A of the part before. These are again the codes of the whole (by the matrix inversion lemma, H_p is
the Schur complement of the later columns in H), for ``R^2`` numbers.

Source: Frantar et al. 2022 (GPTQ), algorithm 1, with its order by descending diagonal of H ("act-order") and its
damping of the diagonal; in the form of Chee et al. 2023 (QuIP), section 3, which proves that the two are equal.

Shapes: ``O`` outputs, ``K`` products per output (columns), ``R`` rows of the input. All is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, dequantize, integer_range, quantize
from dq_plugins.errors import PlanError
from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.weight_groups import grouped_quantizer
from dq_plugins.quantized.weight_scale import best_shrink

BLOCK = 64
SHRINKS = tuple(1 - 0.02 * step for step in range(31))
SHRINKS_FROM_8_BITS = SHRINKS[:11]
"""Of min-max ranges: down to 0.4; from 8 bits, where cutting off rarely pays, to 0.8."""
MOST_DAMPING = 1.0
FEW = 1 << 18
"""Numbers of which second moments are computed as they are."""
STRIP = 256
"""Columns of second moments that are computed together."""


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
    """``X^T X`` of rows ``[R, K]``: ``[K, K]``, the lower triangle of which counts.

    On a CPU in integers, several times as fast: each column in 7 bits of its own, with which processors without
    instructions for them do not saturate. Their rounding adds less to the diagonal than damping does.
    """
    if rows.device.type != "cpu" or rows.numel() < FEW:
        return rows.T @ rows
    scale = rows.abs().amax(0).clamp(min=1e-30) / 63  # [K]
    codes = (rows / scale).round_().to(torch.int8)
    transposed, moments = codes.T.contiguous(), torch.zeros(len(scale), len(scale))
    for start in range(0, len(scale), STRIP):  # half of it follows from the other
        strip = slice(start, start + STRIP)
        product = torch._int_mm(transposed[start:], codes[:, strip])
        torch.mul(product, scale[strip], out=moments[start:, strip]).mul_(scale[start:, None])
    return moments


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
    shrinks = SHRINKS if bits < 8 else SHRINKS_FROM_8_BITS
    ratio = best_shrink(weight, bits, shrinks, lambda error: error.square_() @ importance, symmetric=symmetric)  # [O]
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)  # [O]
    scale, zero_point = affine_parameters(low * ratio, high * ratio, bits, symmetric=symmetric)
    return WeightQuant(bits, scale, None if symmetric else zero_point)


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
    later = _Later(rows, parts[1:], damping)
    for part in parts:
        columns = part.flip(0)  # the last one is rounded first
        x = rows[:, columns].float()  # [R, k]
        wanted = weight[:, columns].float() + later.compensation(x)
        remaining = second_moments(later.beyond(x))  # [k, k]
        quantizer = scale[:, columns].float(), zeros[:, columns]
        found = _rounded_columns(wanted, _factor(remaining, damping), *quantizer, integer_range(quant.bits))
        codes[:, columns] = found.to(codes.dtype)
        if later.parts:
            later.take(x, weight[:, columns] - dequantize(found, *quantizer))
    return codes


class _Later:
    """What the columns of later parts make up for: A of the module and its factor, and D.

    Args:
        rows: ``[R, K]``.
        parts: columns of each part but the first.
        damping: of A.

    Attributes:
        parts: how many are still to come after the part in hand.
    """

    def __init__(self, rows: Tensor, parts: Sequence[Tensor], damping: float) -> None:
        self._damping, self.parts = damping, len(parts)
        self._gram: Tensor | None = None  # A without damping, [R, R]
        for part in parts:
            product = second_moments(rows[:, part].float().T)
            self._gram = product if self._gram is None else self._gram.add_(product)
        self._factor: Tensor | None = None  # of A, [R, R]
        self._shift: Tensor | None = None  # D, [O, R]

    def compensation(self, x: Tensor) -> Tensor:
        """What the columns of inputs ``[R, k]``, the next part, have to add for parts before: ``[O, k]``."""
        if self._shift is None or self._factor is None:
            return torch.zeros(())
        return torch.cholesky_solve(self._shift.T, self._factor).T @ x

    def beyond(self, x: Tensor) -> Tensor:
        """What of the inputs ``[R, k]`` of the part in hand later parts cannot make up for, ``[R, k]``."""
        if self._gram is None or not self.parts:
            return x
        if self._shift is not None:
            self._gram.sub_(second_moments(x.T))  # of the first part it never held any
        self._factor = _factor(self._gram.clone(), self._damping)
        if self._factor is None:
            return x
        return torch.linalg.solve_triangular(self._factor, x, upper=False).mul_(self._damping**0.5)

    def take(self, x: Tensor, errors: Tensor) -> None:
        """Columns have been rounded; by how much less than their weight: ``[O, k]``. Their successor is in hand now."""
        product = errors @ x.T
        self._shift = product if self._shift is None else self._shift.add_(product)
        self.parts -= 1


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
        block = slice(start, stop)
        wanted = torch.addmm(columns[block], factor[stop:, block].T, errors[stop:])  # [B, O]
        within = factor[block, block].T.contiguous()  # a column's factors lie together, too
        tables = (wanted, columns[block], scale[block], 1.0 / scale[block], zeros[block], codes[block], errors[block])
        rows = list(zip(*(table.unbind() for table in tables), strict=True))
        for k in reversed(range(len(rows))):
            sought, column, step, per_step, zero, code, error = rows[k]
            if k + 1 < len(rows):
                sought = sought.addmv_(errors[start + k + 1 : stop].T, within[k, k + 1 :])
            # `quantize` and `dequantize` in the memory that is there
            torch.add(sought.mul_(per_step).round_(), zero, out=code).clamp_(*limits)
            torch.addcmul(column, torch.sub(code, zero), step, value=-1, out=error)
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
