"""The observer protocol: watch values batch by batch, then propose the range a quantizer clips to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, final

from dq_plugins.affine import integer_range
from dq_plugins.errors import CalibrationError, DQError


class Observer(ABC):
    """Base class of observers.

    A subclass implements `observe`, `absorb` and `choose_range`; it may add keyword options to its constructor and
    passes ``bits`` and ``symmetric`` on. What it keeps must not grow with the number of values it sees.

    Attributes:
        bits: width of the quantizer the range is for.
        symmetric: whether the quantizer's zero point is fixed at 0; the range is then ``(-a, a)``.
        count: number of values seen.
        low: smallest value seen.
        high: largest value seen.

    Example:
        >>> class Largest(Observer):
        ...     name = "largest"
        ...     def observe(self, values): ...                      # low and high are kept by the base class
        ...     def absorb(self, other): ...
        ...     def choose_range(self): return self.low, self.high
        >>> observer = Largest(bits=8, symmetric=True)
        >>> observer.update(torch.tensor([-1.0, 3.0]))
        >>> observer.range()
        (-3.0, 3.0)
    """

    name: ClassVar[str]

    def __init__(self, bits: int = 8, symmetric: bool = True) -> None:
        integer_range(bits)
        self.bits = bits
        self.symmetric = bool(symmetric)
        self.count = 0
        self.low = math.inf
        self.high = -math.inf

    @final
    def update(self, x: Tensor) -> None:
        """See the values of a tensor of any shape and floating dtype; an empty one changes nothing.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        if x.numel() == 0:
            return
        values = x.detach().reshape(-1).float()
        low, high = (float(v) for v in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(values)).sum())
            raise CalibrationError(
                f"{bad} of {values.numel()} activations are NaN or infinite (shape {tuple(x.shape)}), so no range can "
                "be learned from them; run the full-precision model in float32 and see where they come from"
            )
        self.count += values.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.observe(values)

    @final
    def merge(self, other: Self) -> Self:
        """See everything that ``other`` saw.

        Raises:
            DQError: ``other`` is another kind of observer, or for another quantizer.
        """
        if type(other) is not type(self) or (other.bits, other.symmetric) != (self.bits, self.symmetric):
            raise DQError(f"only observers of one kind can be merged: {self!r} cannot absorb {other!r}")
        self.count += other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.absorb(other)
        return self

    @final
    def range(self) -> tuple[float, float]:
        """The range ``(low, high)`` to clip to; it always contains 0, which quantizers represent exactly.

        Raises:
            CalibrationError: nothing was seen.
            DQError: the subclass chose a range that is not one.
        """
        if self.count == 0:
            raise CalibrationError(f"observer {self.name!r} has seen no values, so there is no range")
        low, high = self.choose_range()
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise DQError(f"observer {self.name!r} chose ({low}, {high}); a range is finite, with low <= high")
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        return (-max(-low, high), max(-low, high)) if self.symmetric else (low, high)

    @abstractmethod
    def observe(self, values: Tensor) -> None:
        """See a batch: finite float32 ``[n]``, n > 0."""

    @abstractmethod
    def absorb(self, other: Self) -> None:
        """Take in what another observer of this class has seen."""

    @abstractmethod
    def choose_range(self) -> tuple[float, float]:
        """The proposed range; the base class makes it contain 0, and symmetric where that is asked for."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits}, symmetric={self.symmetric}, seen={self.count})"
