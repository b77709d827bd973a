"""A transposed convolution as an ordinary one: an output position sees the taps of its phase, and no other.

Along one dimension, with stride s and kernel k, a transposed convolution is

    y[q s + r - p] = sum_m x[q - m] w[r + m s],       r = 0 .. s - 1,   m = 0 .. ceil(k / s) - 1

which for every phase r is an ordinary convolution by the taps ``r, r + s, r + 2 s, ...`` in the other order. All phases
together are one convolution with s times as many outputs, whose results are then put side by side. No product is
wasted, except with the zeros that stand for missing taps where s does not divide k.

Shapes: ``C`` inputs, ``O`` outputs, ``g`` groups of channels, ``k`` the kernel along each dimension, ``s`` the stride,
``M = ceil(((k - 1) dilation + 1) / s)`` taps of a phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor


def taps(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Taps of one phase along each dimension."""
    return tuple(-(-((k - 1) * d + 1) // s) for k, s, d in zip(kernel, stride, dilation, strict=True))


def phase_weight(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """The weight of the ordinary convolution that computes every phase of a transposed one.

    Args:
        weight: ``[C, O/g, *k]``.
        stride: of the transposed convolution.
        dilation: likewise.
        groups: ``g``.

    Returns:
        ``[O prod(s), C/g, *M]``; the phases of an output are neighbours, those of the last dimension nearest.
    """
    inputs, outputs, *kernel = weight.shape
    count = taps(kernel, stride, dilation)
    spread = weight.new_zeros(inputs, outputs, *(m * s for m, s in zip(count, stride, strict=True)))
    spread[(..., *(slice(0, (k - 1) * d + 1, d) for k, d in zip(kernel, dilation, strict=True)))] = weight
    n = len(kernel)
    apart = [size for m, s in zip(count, stride, strict=True) for size in (m, s)]
    w = spread.reshape(groups, inputs // groups, outputs, *apart)  # [g, C/g, O/g, M, s, M, s, ...]
    m_axes, s_axes = [3 + 2 * i for i in range(n)], [4 + 2 * i for i in range(n)]
    w = w.permute(0, 2, *s_axes, 1, *m_axes).flip([3 + n + i for i in range(n)])
    return w.reshape(-1, inputs // groups, *count)


def conv2d_codes(
    unpack: Callable[[Sequence[int]], Tensor], shape: Sequence[int], groups: int, transposed: Sequence[int]
) -> Tensor:
    """Codes of the 2-d convolution that the operator computes.

    Args:
        unpack: gives the codes of a weight that is stored in a given shape.
        shape: ``[O, C/g, h, w]`` of the 2-d convolution.
        groups: ``g``.
        transposed: shape, stride and dilation of the transposed convolution that is stored; empty for any other.
    """
    if not transposed:
        return unpack(shape)
    n = (len(transposed) - 2) // 3
    stored, stride, dilation = transposed[: n + 2], transposed[n + 2 : 2 * n + 2], transposed[2 * n + 2 :]
    return phase_weight(unpack(stored), stride, dilation, groups).reshape(tuple(shape)).contiguous()


def side_by_side(phases: Tensor, stride: Sequence[int]) -> Tensor:
    """Results ``[N, O prod(s), *Q]`` of all phases as ``[N, O, *(Q s)]``."""
    samples, channels, *size = phases.shape
    n, outputs = len(size), channels // prod(stride)
    apart = phases.reshape(samples, outputs, *stride, *size)
    order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    return apart.permute(0, 1, *order).reshape(samples, outputs, *(q * s for q, s in zip(size, stride, strict=True)))


def border(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], extra: Sequence[int]
) -> list[tuple[int, int]]:
    """Zeros before and after the input along each dimension, negative where positions are left out.

    Args:
        kernel: of the transposed convolution; likewise the rest.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        extra: its output padding.
    """
    count = taps(kernel, stride, dilation)
    return [
        (m - 1 - p // s, (p + (k - 1) * d - 2 * p + e) // s)
        for m, k, s, p, d, e in zip(count, kernel, stride, padding, dilation, extra, strict=True)
    ]


def cropped(y: Tensor, first: Sequence[int], size: Sequence[int]) -> Tensor:
    """``size`` positions of ``y`` from ``first`` on, along the last dimensions."""
    for axis, (start, length) in enumerate(zip(first, size, strict=True)):
        y = y.narrow(axis - len(size), start, length)
    return y
