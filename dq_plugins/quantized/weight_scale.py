"""Scales of weights: one per output channel where that is dimension 0, by min-max or by an error-minimising search.

Source: the shrink search is the scale initialisation of Q-Diffusion / BRECQ: shrink the min-max range in steps of 1 %
and keep the one with the lowest mean ``|w - w^|^p``, p = 2.4.

Shapes: weight ``[O, ...]``, scale ``[O]``. Errors are accumulated in float32 over one channel. Transposed convolutions
have weights ``[in, out/groups, ...]``: no row of them belongs to one output, so they get one scale (`weight_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.errors import PlanError
from dq_plugins.layer_kinds import kind_of
from dq_plugins.plan import Targets, WeightQuant
from dq_plugins.quantized.input_rows import has_rows
from dq_plugins.quantized.layer_transform import LayerTransform, transformed_weight
from dq_plugins.quantized.weight_groups import group_count, grouped_quantizer

ERROR_POWER = 2.4
FINE = tuple(1 - 0.01 * step for step in range(80))
COARSE = FINE[::5]
IN_CACHE = 1 << 15
"""Numbers of a weight that are searched together: several times as fast as all at once."""
ScaleMethod = Literal["minmax", "shrink", "coarse"]
"""Scales that clip nothing; the search described at the top of this file; or the same in steps of 5 %, which is enough
to compare one form of a layer with another."""


def weight_rows(layer: nn.Module, transform: LayerTransform | None = None) -> Tensor:
    """The weight of a layer as rows that get one scale each; what `weight_parameters` takes.

    Args:
        layer: any layer with a weight.
        transform: of the layer's input; the rows are those of the weight that meets it.

    Returns:
        The weight itself, ``[O, ...]``; as a single row, ``[1, in, out/groups, ...]``, where its kind is not
        `dq_plugins.layer_kinds.LayerKind.scale_per_row`.

    Raises:
        PlanError: the layer has no weight tensor.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise PlanError(f"a {type(layer).__name__} has no weight tensor, so it cannot be quantized")
    kind = kind_of(layer)
    weight = transformed_weight(layer, transform)
    return weight if kind is None or kind.scale_per_row else weight[None]


def best_shrink(
    flat: Tensor, bits: int, shrinks: Sequence[float], error: Callable[[Tensor], Tensor], *, symmetric: bool
) -> Tensor:
    """What the min-max range of every row is best multiplied by, ``[O]``; of equals the first.

    Args:
        flat: rows, float32 ``[O, K]``.
        bits: width of the code.
        shrinks: what is tried.
        error: of some rows, ``[o]``, from their rounding errors ``[o, K]``, which it may overwrite.
        symmetric: zero points are 0.
    """
    found = []
    for rows in flat.split(max(1, IN_CACHE // flat.shape[1])):
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)  # [o]
        best, ratio = torch.full_like(low, torch.inf), torch.ones_like(low)
        for shrink in shrinks:
            scale, zero_point = affine_parameters(low * shrink, high * shrink, bits, symmetric=symmetric)
            fake = fake_quantize(rows, scale[:, None], zero_point[:, None], *integer_range(bits))
            left = error(fake.sub_(rows))
            better = left < best
            best, ratio = torch.where(better, left, best), torch.where(better, shrink, ratio)
        found.append(ratio)
    return torch.cat(found)


def _power_mean(difference: Tensor) -> Tensor:
    return difference.abs_().pow_(ERROR_POWER).mean(1)


def weight_parameters(
    weight: Tensor, bits: int, *, symmetric: bool = True, method: ScaleMethod = "shrink"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row.

    Args:
        weight: ``[O, ...]``; from `weight_rows`.
        bits: width of the code.
        symmetric: zero point fixed at 0.
        method: see `ScaleMethod`.

    Returns:
        ``(scale, zero_point)``, float32 and int32 ``[O]``.
    """
    flat = weight.detach().float().flatten(1)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    if method != "minmax":
        shrinks = FINE if method == "shrink" else COARSE
        ratio = best_shrink(flat, bits, shrinks, _power_mean, symmetric=symmetric)
        low, high = low * ratio, high * ratio
    return affine_parameters(low, high, bits, symmetric=symmetric)


def weight_quantizer(
    weight: Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    method: ScaleMethod = "shrink",
    groups: int = 1,
) -> WeightQuant:
    """Quantizer of a weight, with nearest rounding.

    Args:
        weight: ``[O, ...]``, from `weight_rows`.
        bits: width.
        symmetric: zero point 0.
        method: see `weight_parameters`.
        groups: of input channels with scales of their own, see `dq_plugins.quantized.weight_groups`.

    Raises:
        PlanError: the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise PlanError("a weight holds NaN or infinity: it cannot be quantized")
    if groups > 1:
        form: Literal["minmax", "shrink"] = "minmax" if method == "minmax" else "shrink"
        return grouped_quantizer(weight, groups, bits, symmetric=symmetric, method=form, power=ERROR_POWER)
    scale, zero_point = weight_parameters(weight, bits, symmetric=symmetric, method=method)
    return WeightQuant(bits, scale.cpu(), None if symmetric else zero_point.cpu())


def layer_quantizer(
    layer: nn.Module,
    bits: int,
    targets: Targets,
    *,
    method: ScaleMethod = "shrink",
    transform: LayerTransform | None = None,
    outputs: slice = slice(None),
) -> WeightQuant:
    """Quantizer of a layer's weight as a run wants it, with nearest rounding.

    Args:
        layer: any layer with a weight.
        bits: width.
        targets: whether it is symmetric, and how many input channels share a scale.
        method: see `weight_parameters`.
        transform: see `weight_rows`.
        outputs: rows that count, of a weight with a scale for each.

    Raises:
        PlanError: the weight is not finite, or there is none.
    """
    rows, symmetric = weight_rows(layer, transform)[outputs], targets.symmetric_weights
    size = targets.weight_group_size if has_rows(layer) else None
    groups = group_count(rows.shape[1], size, bits, symmetric=symmetric) if rows.dim() > 1 else 1
    return weight_quantizer(rows, bits, symmetric=symmetric, method=method, groups=groups)
