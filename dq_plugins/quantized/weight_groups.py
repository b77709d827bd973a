"""Scales of weights in groups of inputs: one float an output, times a small integer for each group.

    w^[o, c] = s[o] u[o, p] (q[o, c] - z[o, p])          c in group p,   u = 1, 2, ... U

The integers ``u (q - z)`` fit int8, so a kernel multiplies them as they are and rescales once for each output: groups
cost bytes and no time. U is what int8 leaves: 16 at 4 bits, 32 at 3, 64 at 2; from 7 bits up there is no room, and
weights have one scale for each output, which they do well with.

Source: Lin et al. 2024 (QServe), progressive group quantization; that u is searched for by error is ours.

Shapes: ``O`` outputs, ``C`` input channels (of one group of a convolution), ``k`` positions of its kernel, ``P`` groups
of ``g`` channels, ``n = g k``. Everything is float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dq_plugins.affine import SMALLEST_SCALE, affine_parameters, fake_quantize, integer_range
from dq_plugins.plan import WeightQuant
from dq_plugins.plan.decisions import LEAST_GROUP_SIZE

LEAST_ROOM = 4
"""Fewest group scales that are worth having."""
FINENESS = 0.9
"""Ratio of neighbouring group scales that are tried, where there are more integers than that."""
TRIED = 24
SHRINKS = (1.0, 0.9, 0.8)
"""Of the scale of the output, whose multiples fall elsewhere then."""


def group_room(bits: int, *, symmetric: bool) -> int:
    """U: the largest group scale with which every code of a weight still fits int8.

    Example:
        >>> [group_room(bits, symmetric=True) for bits in (2, 3, 4, 5, 8)]
        [64, 32, 16, 8, 1]
    """
    return 128 // 2 ** (bits - 1) if symmetric else max(127 // (2**bits - 1), 1)


def group_count(channels: int, group_size: int | None, bits: int, *, symmetric: bool = True) -> int:
    """P: in how many groups the input channels of a weight are quantized.

    Args:
        channels: C.
        group_size: most channels of a group; groups have the largest size up to it that divides the channels.
        bits: width of the weight.
        symmetric: whether its zero points are 0.

    Returns:
        1 where there is no room for group scales, or groups would have fewer than `LEAST_GROUP_SIZE` channels.

    Example:
        >>> [group_count(channels, 64, 4) for channels in (3, 64, 96, 320, 127)]
        [1, 1, 2, 5, 1]
    """
    if group_size is None or group_room(bits, symmetric=symmetric) < LEAST_ROOM:
        return 1
    size = next(g for g in range(min(group_size, channels), 0, -1) if channels % g == 0)
    return channels // size if size >= LEAST_GROUP_SIZE else 1


def grouped_quantizer(
    weight: Tensor,
    groups: int,
    bits: int,
    *,
    symmetric: bool = True,
    method: Literal["minmax", "shrink"] = "shrink",
    power: float = 2.4,
    importance: Tensor | None = None,
) -> WeightQuant:
    """Quantizer of a weight with group scales, and nearest rounding.

    Args:
        weight: ``[O, C, ...]``.
        groups: P, which divides C.
        bits: width.
        symmetric: zero point 0.
        method: ``"minmax"``: the smallest scales that clip nothing; ``"shrink"``: those of least mean
            ``importance |w - w^|^power``.
        power: see ``method``.
        importance: of every product of an output, ``[C, ...]``; all alike by default.
    """
    parts = weight.detach().float().reshape(len(weight), groups, -1)  # [O, P, n]
    share = None if importance is None else importance.reshape(groups, -1).to(parts)  # [P, n]
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)  # [O, P]
    wanted, _ = affine_parameters(low, high, bits, symmetric=symmetric)
    wanted = torch.where(high > low, wanted, torch.zeros_like(wanted))
    room = group_room(bits, symmetric=symmetric)
    whole = wanted.amax(1, keepdim=True) / room  # [O, 1]
    whole = torch.where(whole > SMALLEST_SCALE, whole, torch.ones_like(whole))
    if method == "minmax":
        return _Scales(whole, _covering(wanted, whole, room), low, high, bits, symmetric).quantizer()
    found, least = None, torch.full_like(whole, torch.inf)
    for shrink in SHRINKS:
        tried = _best_multiples(parts, share, _Scales(whole * shrink, None, low, high, bits, symmetric), room, power)
        error = tried.error.sum(1, keepdim=True)  # [O, 1]
        found = tried if found is None else found.better(tried, error < least)
        least = torch.minimum(least, error)
    assert found is not None
    return found.quantizer()


def _covering(wanted: Tensor, whole: Tensor, room: int) -> Tensor:
    """Smallest multiples of ``whole`` that are at least what is wanted, but for float32's last bit."""
    return (wanted / whole - 1e-4).ceil().clamp(1, room)


def _multiples(room: int) -> list[int]:
    return sorted({1, *(max(round(room * FINENESS**k), 1) for k in range(TRIED))}, reverse=True)


class _Scales:
    """Scales of groups, and what they give.

    Args:
        scale: of outputs, ``[O, 1]``.
        multiple: of groups, ``[O, P]``.
        low: smallest weight of each group, ``[O, P]``.
        high: largest.
        bits: width.
        symmetric: zero point 0.
    """

    def __init__(
        self, scale: Tensor, multiple: Tensor | None, low: Tensor, high: Tensor, bits: int, symmetric: bool
    ) -> None:
        self.scale, self.low, self.high, self.bits, self.symmetric = scale, low, high, bits, symmetric
        self.multiple = torch.ones_like(low) if multiple is None else multiple
        self.error = torch.full_like(low, torch.inf)

    def zeros(self, multiple: Tensor | float) -> Tensor:
        """Zero points ``[O, P]`` that put the middle of each group's range into the middle of the codes."""
        if self.symmetric:
            return torch.zeros_like(self.low)
        q_min, q_max = integer_range(self.bits)
        middle = (self.low + self.high) / (2 * self.scale * multiple)
        return torch.round((q_min + q_max) / 2 - middle).clamp(q_min, q_max)

    def better(self, other: _Scales, where: Tensor) -> _Scales:
        """Outputs of ``other`` where ``where [O, 1]`` holds, of this one elsewhere."""
        scale, multiple = torch.where(where, other.scale, self.scale), torch.where(where, other.multiple, self.multiple)
        return _Scales(scale, multiple, self.low, self.high, self.bits, self.symmetric)

    def quantizer(self) -> WeightQuant:
        """The quantizer with these scales."""
        zero_point = None if self.symmetric else self.zeros(self.multiple).to(torch.int32).cpu()
        group_scale = self.multiple.to(torch.uint8).cpu()
        return WeightQuant(self.bits, self.scale.reshape(-1).cpu(), zero_point, group_scale=group_scale)


def _best_multiples(parts: Tensor, share: Tensor | None, best: _Scales, room: int, power: float) -> _Scales:
    """For every group the multiple of least error."""
    for multiple in _multiples(room):
        zero = best.zeros(multiple)
        fake = fake_quantize(parts, best.scale[..., None] * multiple, zero[..., None], *integer_range(best.bits))
        error = (parts - fake).abs().pow(power)
        error = (error if share is None else error * share).sum(2)  # [O, P]
        better = error < best.error
        best.error = torch.where(better, error, best.error)
        best.multiple = torch.where(better, float(multiple), best.multiple)
    return best
