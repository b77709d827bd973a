"""Metrics of images: peak signal-to-noise ratio and structural similarity. Computed in float64.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels.
"""

from __future__ import annotations

from torch import Tensor

from dq_plugins.errors import DQError
from dq_plugins.metrics.metric import metric

WINDOW, SIGMA = 11, 1.5
"""Gaussian window of SSIM in pixels, and its standard deviation (Wang et al. 2004)."""

K1, K2 = 0.01, 0.03
"""Stabilising constants of SSIM, relative to the value range (Wang et al. 2004)."""


def value_range_of(reference: Tensor, value_range: float | None) -> float:
    """The given range, or that of the reference's values; 1 for a constant reference."""
    if value_range is None:
        value_range = float(reference.max() - reference.min()) or 1.0
    if not value_range > 0:
        raise DQError(f"the value range of images is positive, got {value_range}")
    return value_range


@metric(higher_is_better=True)
def psnr(reference: Tensor, output: Tensor, *, value_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: mean over the images of ``10 log10(R^2 / MSE)``.

    Args:
        reference: ``[B, ...]``.
        output: the same shape.
        value_range: ``R``, 2 for images in [-1, 1]; by default the range of the reference's values.

    Returns:
        Infinite when an image is equal to its reference.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    of_one_image = tuple(range(1, reference.dim()))
    peak = value_range_of(reference, value_range)
    return float(peak_signal_noise_ratio(output, reference, data_range=peak, dim=of_one_image))


def window_size(height: int, width: int) -> int:
    """Pixels across the window of SSIM: 11, and the largest odd number that fits in images smaller than that."""
    return min(WINDOW, (height - 1) // 2 * 2 + 1, (width - 1) // 2 * 2 + 1)


@metric(higher_is_better=True)
def ssim(reference: Tensor, output: Tensor, *, value_range: float | None = None) -> float:
    """Mean structural similarity of images (Wang et al., IEEE TIP 2004), per channel, Gaussian window.

    The window is 11 x 11, smaller in images that are smaller than that.

    Args:
        reference: ``[B, C, H, W]``.
        output: the same shape.
        value_range: range of the values, 2 for images in [-1, 1]; by default the range of the reference's values.

    Returns:
        At most 1, which only equal images reach.
    """
    if reference.dim() != 4:
        raise DQError(f"metric 'ssim' compares images [B, C, H, W]; got shape {tuple(reference.shape)}")
    from torchmetrics.functional.image import structural_similarity_index_measure

    height, width = reference.shape[2:]
    size = window_size(height, width)
    _, values = structural_similarity_index_measure(
        output,
        reference,
        sigma=SIGMA * size / WINDOW,
        data_range=value_range_of(reference, value_range),
        k1=K1,
        k2=K2,
        return_full_image=True,
    )  # [B, C, H, W], a value for the window around every pixel
    edge = size // 2
    return float(values[..., edge : height - edge, edge : width - edge].mean())  # as in the paper, full windows only
