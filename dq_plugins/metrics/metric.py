"""What a plugin of kind ``metric`` is, and the checks that all metrics share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dq_plugins.errors import DQError


class Metric(Protocol):
    """Compares an output with its full-precision reference.

    Attributes:
        __name__: name of the function.
        higher_is_better: direction.
    """

    __name__: str
    higher_is_better: bool

    def __call__(self, reference: Tensor, output: Tensor, **options: Any) -> float:
        """One number for two tensors of the same shape; samples come first."""
        ...


def metric(*, higher_is_better: bool) -> Callable[[Callable[..., float]], Metric]:
    """Turn a function of two float64 tensors into a metric that checks what it is given.

    Args:
        higher_is_better: direction of the metric.

    Returns:
        A decorator. The metric raises `DQError` for tensors of different shapes, empty ones, and ones that hold NaN or
        infinity.

    Example:
        >>> @metric(higher_is_better=False)
        ... def largest_error(reference, output):
        ...     return float((reference - output).abs().max())
        >>> largest_error(torch.zeros(2), torch.tensor([0.5, -1.0]))
        1.0
    """

    def decorate(function: Callable[..., float]) -> Metric:
        @functools.wraps(function)
        def checked(reference: Tensor, output: Tensor, **options: Any) -> float:
            _check(function.__name__, reference, output)
            return function(reference.detach().double(), output.detach().to(reference.device).double(), **options)

        checked.higher_is_better = higher_is_better  # type: ignore[attr-defined]
        return cast(Metric, checked)

    return decorate


def _check(name: str, reference: Tensor, output: Tensor) -> None:
    if reference.shape != output.shape:
        raise DQError(
            f"metric {name!r} compares tensors of one shape; the reference has {tuple(reference.shape)}, the output "
            f"{tuple(output.shape)}"
        )
    if reference.numel() == 0:
        raise DQError(f"metric {name!r} was given empty tensors")
    for what, x in (("reference", reference), ("output", output)):
        if not bool(torch.isfinite(x).all()):
            raise DQError(f"metric {name!r}: the {what} holds {int((~torch.isfinite(x)).sum())} NaN or infinite values")
