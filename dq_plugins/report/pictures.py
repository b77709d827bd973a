"""Pictures of a page: PNG inside the HTML, with maps of what differs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Picture:
    """One picture of a column.

    Attributes:
        image: ``[H, W]`` or ``[H, W, 3]`` in [0, 1].
        label: what stands below it.
    """

    image: np.ndarray
    label: str

    @property
    def uri(self) -> str:
        """The picture as a ``data:`` URI of a PNG, pixel by pixel."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(np.round(255 * np.clip(self.image, 0, 1)).astype(np.uint8)).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def differences(reference: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """``|a - b|`` of pairs of images, made visible.

    Returns:
        The maps in [0, 1], and the power of two that all of them were multiplied by: the largest that leaves 99 % of
        the values below white.
    """
    raw = [np.abs(np.asarray(a, np.float64) - b) for a, b in zip(reference, images, strict=True)]
    high = float(np.quantile(np.concatenate([each.ravel() for each in raw]), 0.99)) if raw else 0.0
    gain = 2 ** max(0, min(16, math.floor(math.log2(1 / high)))) if high > 0 else 1
    return [np.clip(gain * each, 0, 1) for each in raw], gain
