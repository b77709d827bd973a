"""Whether the images of a quantized pipeline are close enough to those of full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dq_plugins import registry
from dq_plugins.errors import DQError
from dq_plugins.metrics.metric import Metric

OF_SETS = frozenset({"frechet"})
"""Metrics that compare sets of images, so that one image alone has no value."""


@dataclass(frozen=True)
class Limit:
    """A bound on a metric: ``side`` ``"min"`` or ``"max"``."""

    name: str
    side: Literal["min", "max"]
    value: float

    @classmethod
    def parse(cls, text: str, side: Literal["min", "max"]) -> Limit:
        """``"ssim=0.9"``.

        Raises:
            DQError: it has another form.
        """
        name, _, value = text.partition("=")
        try:
            return cls(name, side, float(value))
        except ValueError:
            raise DQError(f"--{side} takes METRIC=VALUE, for example ssim=0.9; got {text!r}") from None

    def metric(self) -> Metric:
        """The registered metric.

        Raises:
            RegistryError: there is none, or its packages are missing.
            DQError: a limit on the wrong side, which the worst image would never break.
        """
        found: Metric = registry.get("metric", self.name)
        if found.higher_is_better != (self.side == "min"):
            better = "higher" if found.higher_is_better else "lower"
            raise DQError(
                f"{better} is better for {self.name!r}: give its limit with --{'min' if better[0] == 'h' else 'max'}"
            )
        return found


@dataclass(frozen=True)
class Judgement:
    """What a metric found: the worst image's ``value`` beside the ``limit``."""

    metric: str
    value: float
    side: str
    limit: float
    passed: bool


def judge(limit: Limit, reference: Tensor, output: Tensor) -> Judgement:
    """Compare images ``[N, C, H, W]`` in [0, 1] with their references."""
    metric = limit.metric()
    if limit.name in OF_SETS:
        values = [metric(reference, output)]
    else:
        options = {"value_range": 1.0} if limit.name in ("psnr", "ssim", "lpips") else {}
        values = [metric(reference[i : i + 1], output[i : i + 1], **options) for i in range(len(reference))]
    worst = min(values) if limit.side == "min" else max(values)
    passed = worst >= limit.value if limit.side == "min" else worst <= limit.value
    return Judgement(limit.name, worst, limit.side, limit.value, passed)


def as_images(outputs: Sequence[Any]) -> Tensor:
    """What pipelines returned with ``output_type="np"`` as ``[N, C, H, W]``: images, frames of videos, or sounds.

    Args:
        outputs: one for each batch; arrays ``[B, H, W, C]``, ``[B, F, H, W, C]``, or ``[B, channels, length]``.
    """
    tensors = []
    for output in outputs:
        first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        x = torch.as_tensor(first).float()
        x = x.flatten(0, 1) if x.dim() == 5 else x
        tensors.append(x.movedim(-1, 1) if x.dim() == 4 else x.reshape(len(x), 1, 1, -1))
    return torch.cat(tensors)
