"""The range with the least squared error, exactly: a sweep over all scales at which some value changes its code.

For a fixed zero point the squared error of scale s is, with the integers ``k_i = clip(round(x_i / s))``,

    E(s) = sum_i w_i (x_i - s k_i)^2 = C - 2 s A + s^2 B,    A = sum w x k,  B = sum w k^2.

Between two scales at which a ``k_i`` changes (``|x_i| / s = k + 1/2``), A and B are constant and E is a parabola with
its minimum at A / B. So sorting the changes and summing up their steps in A and B gives the global minimum. The cost
is one sort of (values x levels) numbers for each zero point.

Shapes: ``N`` weighted values, ``K`` changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dq_plugins.affine import integer_range


def exact_range(
    values: Tensor,
    weights: Tensor,
    bits: int,
    *,
    symmetric: bool,
    zeros: Iterable[int] | None = None,
    scales: tuple[float, float] = (0.0, math.inf),
) -> tuple[float, float]:
    """The range with the least squared error over all scales and zero points, or over some.

    Ranges that reach more than half a step beyond the values are left out: codes out there would be wasted.

    Args:
        values: float32 ``[N]``.
        weights: how often each value occurs, ``[N]``.
        bits: width of the code.
        symmetric: whether the zero point is 0.
        zeros: zero points to consider; all by default.
        scales: smallest and largest scale to consider; all by default.

    Returns:
        ``(low, high)``; `dq_plugins.affine.affine_parameters` gives back the scale and the zero point.
    """
    q_min, q_max = integer_range(bits)
    best, found = math.inf, (0.0, 0.0)
    for zero in [0] if symmetric else (range(q_min, q_max + 1) if zeros is None else zeros):
        levels = (zero - q_min, q_max - zero)
        largest = _largest_scale(values, levels, symmetric)
        if largest == 0:
            continue
        scale, error = best_scale(values, weights, levels, (scales[0], min(scales[1], largest)))
        if error < best:
            best = error
            bound = scale * max(q_max, 1)  # as affine_parameters has it
            found = (-bound, bound) if symmetric else (-scale * levels[0], scale * levels[1])
    return found


def _largest_scale(values: Tensor, levels: tuple[int, int], symmetric: bool) -> float:
    """Scale at which the range reaches half a step beyond the values."""
    below, above = max(-float(values.min()), 0.0), max(float(values.max()), 0.0)
    if symmetric:
        below = above = max(below, above)
        levels = (max(levels[1], 1),) * 2
    half_step = (below + above) / sum(levels) / 2
    ends = zip((below, above), levels, strict=True)
    return min((end + half_step) / level for end, level in ends if level > 0)


def best_scale(
    values: Tensor, weights: Tensor, levels: tuple[int, int], scales: tuple[float, float] = (0.0, math.inf)
) -> tuple[float, float]:
    """Scale with the least squared error, and that error (a weighted sum).

    Args:
        values: ``[N]``.
        weights: ``[N]``.
        levels: number of integers below and above zero.
        scales: smallest and largest scale to consider.
    """
    present = values != 0  # zero is always exact
    values, weights = values[present].double(), weights[present].double()  # [N] each
    if not values.numel():
        return 1.0, 0.0
    size = values.abs()
    largest = min(scales[1], 2 * float(size.max()))  # at twice the size all round to zero
    smallest = min(scales[0], largest)
    limit = torch.where(values < 0, float(levels[0]), float(levels[1])).double()  # [N]
    change, owner, code = _changes(size, limit, smallest, largest)  # [K] each

    start = torch.minimum(torch.round(size / largest), limit)  # [N], k_i at the largest scale
    first_a, first_b = (weights * size * start).sum(), (weights * start.square()).sum()
    # between two changes A and B are constant: [K + 1] parabolas
    a = first_a + torch.nn.functional.pad(((weights * size)[owner]).cumsum(0), (1, 0))  # [K + 1]
    b = first_b + torch.nn.functional.pad((weights[owner] * (2 * code + 1)).cumsum(0), (1, 0))  # [K + 1]
    bounds = torch.cat([change.new_tensor([largest]), change, change.new_tensor([smallest])])  # [K + 2]
    scale = torch.where(b > 0, a / b.clamp(min=1e-300), bounds[0])
    scale = torch.minimum(torch.maximum(scale, bounds[1:]), bounds[:-1])
    error = (weights * size.square()).sum() - 2 * scale * a + scale.square() * b  # [K + 1]
    best = int(error.argmin())
    return float(scale[best]), max(float(error[best]), 0.0)


def _changes(size: Tensor, limit: Tensor, smallest: float, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where codes change as the scale shrinks from ``largest`` to ``smallest``, in that order.

    Returns:
        The scales ``[K]``, the index of the value that changes ``[K]``, and its code before the change ``[K]``.
    """
    start = torch.minimum(torch.round(size / largest), limit)  # [N]
    counts = (torch.minimum(torch.round(size / smallest), limit) - start).clamp_(min=0).long()  # [N]
    owner = torch.repeat_interleave(torch.arange(size.numel()), counts)  # [K]
    within = torch.arange(owner.numel()) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)  # [K]
    code = start[owner] + within
    change, order = (size[owner] / (code + 0.5)).clamp(smallest, largest).sort(descending=True)
    return change, owner[order], code[order]
