"""``1 - SSIM`` near a reference image as a sum of squares, in two parts: structure and texture.

For a small error ``d``, with ``m`` and ``s^2`` the local mean and variance of the reference and ``B`` the Gaussian
window,

    1 - SSIM  ~  mean_w  (B d)_w^2 / (2 m_w^2 + c1)  +  var_w(d) / (2 s_w^2 + c2)

(the second order of Wang et al. 2004, eq. 13). The first term is what moves local means, the structure of the picture;
the second is what changes within a window, its texture. ``var_w(d)`` is taken as the window's mean of ``(d - B d)^2``,
so that both terms are squares of linear functions of ``d``, which random probes can estimate.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``H' x W'`` full windows; everything in float64 but the probes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dq_plugins.errors import DQError
from dq_plugins.metrics.image import K1, K2, SIGMA, WINDOW, value_range_of, window_size

Part = Literal["structure", "texture"]


def _gaussian_window(size: int, device: torch.device) -> Tensor:
    offset = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    weights = torch.exp(-(offset**2) / (2 * (SIGMA * size / WINDOW) ** 2))
    return weights / weights.sum()  # [size]


class SsimForm:
    """The two quadratic forms at a reference.

    Args:
        reference: final samples ``[B, C, H, W]`` of full precision.
        value_range: range of the values; by default that of the reference, as in the metric.
    """

    def __init__(self, reference: Tensor, value_range: float | None = None) -> None:
        if reference.dim() != 4:
            raise DQError(
                f"the content measure compares images [B, C, H, W]; the samples are {tuple(reference.shape)}. Leave "
                "the content measure out (objective 'noise-power' does not need it), or name another metric."
            )
        x = reference.detach().double()
        span = value_range_of(x, value_range)
        self._window = _gaussian_window(window_size(*x.shape[2:]), x.device)
        mean = self._mean(x)  # [B, C, H', W'], as variance and weight below
        variance = (self._mean(x * x) - mean**2).clamp(min=0)
        windows = mean[0].numel()  # of one image, all channels
        self._structure = (1 / (2 * mean**2 + (K1 * span) ** 2) / windows).sqrt()
        weight = 1 / (2 * variance + (K2 * span) ** 2) / windows
        self._texture = self._mean_transposed(weight, x.shape).clamp(min=0).sqrt()  # [B, C, H, W]
        self._shape = x.shape

    def cotangent(self, part: Part, signs: Tensor) -> Tensor:
        """Pull random signs back to the image: ``E (cotangent . d)^2`` is the part's share of ``1 - SSIM``.

        Args:
            part: ``"structure"`` or ``"texture"``.
            signs: ``[B, C, H, W]`` of independent signs; as many as needed are used.

        Returns:
            float32 ``[B, C, H, W]``.
        """
        with torch.enable_grad():
            error = torch.zeros(self._shape, dtype=torch.float64, device=self._structure.device, requires_grad=True)
            coordinates = self.coordinates(part, error)  # [B, C, H', W'], or [B, C, H, W] of the texture
            height, width = coordinates.shape[2:]
            (pulled,) = torch.autograd.grad(coordinates, error, signs[..., :height, :width].to(coordinates))
        return pulled.float()

    def coordinates(self, part: Part, error: Tensor) -> Tensor:
        """What one part of the form squares and sums up to its share of ``1 - SSIM``, for float64 ``[B, C, H, W]``."""
        if part == "structure":
            return self._structure * self._mean(error)
        return self._texture * (error - self._mean_same(error))

    def _mean(self, x: Tensor) -> Tensor:
        images = x.reshape(-1, 1, *x.shape[2:])  # [B C, 1, H, W]
        rows = F.conv2d(images, self._window[None, None, :, None])  # [B C, 1, H', W]
        return F.conv2d(rows, self._window[None, None, None, :]).reshape(*x.shape[:2], *self._valid(x))

    def _valid(self, x: Tensor) -> tuple[int, int]:
        size = len(self._window) - 1
        return x.shape[2] - size, x.shape[3] - size

    def _mean_same(self, x: Tensor) -> Tensor:
        margin = len(self._window) // 2  # borders see the image mirrored
        return self._mean(F.pad(x, (margin,) * 4, mode="reflect")) if margin else x

    def _mean_transposed(self, weight: Tensor, shape: torch.Size) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros(shape, dtype=torch.float64, device=weight.device, requires_grad=True)
            return torch.autograd.grad(self._mean(x), x, weight)[0]
