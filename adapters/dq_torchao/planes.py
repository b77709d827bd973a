"""Convolutions over one, two or three dimensions of codes as 2-d convolutions, which is what the kernels do.

Nothing is approximated: the same products are added up in the same int32 sums, in another view of the image.

- one dimension: an image one pixel high;
- a kernel that slides over frames alone: an image of frames by pixels;
- any other kernel over three dimensions: the frames under it are channels, and the frames of the result are a batch.
  That copies each code once for every frame of the kernel. oneDNN has a convolution over three dimensions as well,
  about as fast, which takes the zero point as a number instead of a tensor: the host would have to wait for it at every
  layer, and a compiler would freeze one timestep's into its graph.

Shapes: codes ``[N, C, *size]``; weight ``[O, C/g, *k]``; result ``[N, O, *size']``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """How a kernel slides over an image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class Plane(NamedTuple):
    """A convolution as a 2-d one.

    Attributes:
        codes: ``[N', C', H, W]``.
        weight: shape of the weight, ``[O, C'/g, h, w]``; its values are in the order in which they were.
        window: ``(stride, padding, dilation)``, as the operator takes them.
        back: gives the result its own shape.
    """

    codes: Tensor
    weight: tuple[int, ...]
    window: tuple[Sequence[int], Sequence[int], Sequence[int]]
    back: Callable[[Tensor], Tensor]


def plane(codes: Tensor, weight: Sequence[int], window: Window, zero_point: Tensor) -> Plane:
    """See the head of this file.

    Args:
        codes: of the input.
        weight: shape of the weight of the convolution.
        window: how it slides; ``padding`` is in codes of zero.
        zero_point: the code of zero, ``[1]``.
    """
    if len(window.kernel) == 1:
        return _row(codes, weight, window)
    if len(window.kernel) == 2:
        return Plane(codes, tuple(weight), window[1:], lambda y: y)
    if _pixels_apart(window):
        return _frames_by_pixels(codes, weight, window)
    return _frames_as_channels(codes, weight, window, zero_point)


def _row(codes: Tensor, weight: Sequence[int], window: Window) -> Plane:
    (stride,), (padding,), (dilation,) = window[1:]
    shape = (*weight[:2], 1, weight[2])
    return Plane(codes.unsqueeze(2), shape, ((1, stride), (0, padding), (1, dilation)), lambda y: y.squeeze(2))


def _pixels_apart(window: Window) -> bool:
    return window.kernel[1:] == (1, 1) == window.stride[1:] and window.padding[1:] == (0, 0)


def _frames_by_pixels(codes: Tensor, weight: Sequence[int], window: Window) -> Plane:
    size = codes.shape[3:]
    apart = ((window.stride[0], 1), (window.padding[0], 0), (window.dilation[0], 1))
    return Plane(codes.flatten(3), (*weight[:3], 1), apart, lambda y: y.unflatten(3, size))


def _frames_as_channels(codes: Tensor, weight: Sequence[int], window: Window, zero_point: Tensor) -> Plane:
    kernel, stride, padding, dilation = (each[0] for each in window)
    if padding:
        samples, channels, _, *size = codes.shape
        border = zero_point.to(codes.dtype).expand(samples, channels, padding, *size)
        codes = torch.cat((border, codes, border), 2)
    seen = codes.unfold(2, (kernel - 1) * dilation + 1, stride)[..., ::dilation]  # [N, C, T', H, W, k]
    samples, channels, frames, *size, _ = seen.shape
    # channels last, which is what the kernels want: the copy, if there is one, is the only one
    image = seen.permute(0, 2, 3, 4, 1, 5).reshape(samples * frames, *size, channels * kernel).permute(0, 3, 1, 2)
    shape = (weight[0], weight[1] * kernel, *weight[3:])
    apart = (window.stride[1:], window.padding[1:], window.dilation[1:])
    return Plane(image, shape, apart, lambda y: y.unflatten(0, (samples, frames)).transpose(1, 2))
