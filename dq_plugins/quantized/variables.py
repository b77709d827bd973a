"""What can be learned of quantized layers beside rounding: clip ranges, scales of weights, corrections of outputs.

    s = s0 exp(p),   z = round(z0 + n q)      an input: p and q by timestep group; n steps of the code
    k = k0 exp(p) <= 1                        an input with dynamic ranges: the share of its extremes that is kept
    s = s0 exp(p)                             a weight: p by output channel, its codes stay as they are
    c = c0 + u p                              a correction: p by timestep group and output channel

All start at 0, and a step of 0.01 changes a scale by 1 %, moves a range by 1 % of its width, and a correction by 1 % of
its unit ``u``. Scales and ranges of b bits move at 15 / (2^b - 1) of the rate, so that ends move by the same share
of a quantization step at any width; one learning rate then suits them all. The zero point is rounded, its gradient
passes straight through.

Source: Esser et al. 2020 (LSQ) and Bhalgat et al. 2020 (LSQ+) for scale and zero point of an input; Chen et al. 2024
(EfficientQAT) for scales of weights whose codes are settled.

Shapes: ``G`` timestep groups, ``O`` output channels. Precision: float32 throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dq_plugins.affine import code_ranges
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, WeightQuant
from dq_plugins.quantized.straight_through import round_ste


class Variables(ABC):
    """Something that is learned of a layer.

    Attributes:
        parameter: what moves; requires gradients.
    """

    parameter: Tensor

    @abstractmethod
    def soft(self) -> Tensor:
        """The value to learn with, differentiable in the parameter."""

    @abstractmethod
    def hard(self) -> Tensor:
        """The value that is decided as the parameter stands."""

    @abstractmethod
    def start(self) -> Tensor:
        """The value before learning."""

    @abstractmethod
    def decided(self) -> Tensor:
        """What is kept of the value as the parameter stands."""

    def project(self) -> None:  # noqa: B027
        """Bring the parameter back to where it may be, after a step."""


class Smooth(Variables):
    """A value without rounding of weights in it, moved by Adam.

    Args:
        shape: of the parameter.
        device: where it lives.
        rate: learning rate, as a multiple of the method's.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, rate: float = 1.0) -> None:
        self.parameter = torch.zeros(shape, device=device, requires_grad=True)
        self.rate = rate

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The value as the parameter stands."""
        return self.soft().detach().clone()

    def decided(self) -> Tensor:
        """The same."""
        return self.hard()

    @torch.no_grad()
    def start(self) -> Tensor:
        """The value at parameter 0."""
        kept, self.parameter = self.parameter, torch.zeros_like(self.parameter)
        try:
            return self.soft().clone()
        finally:
            self.parameter = kept


def of_steps(bits: int) -> float:
    """Rate at a width, over that at 4 bits: ends of a range move by the same share of a step."""
    return 15 / (2**bits - 1)


def _pace(widths: Sequence[int | None], device: torch.device) -> Tensor:
    """`of_steps` of every group, ``[G]``; 1 of those in floating point, whose ranges are not used."""
    return torch.tensor([1.0 if bits is None else of_steps(bits) for bits in widths], device=device)


class InputRange(Smooth):
    """Scale and zero point of an input, ``[2, G]``: the zero point holds whole numbers.

    Args:
        quant: the quantizer to start from. One whose zero points are all 0 keeps them there.
        device: where it is learned.
        rate: see `Smooth`.
    """

    def __init__(self, quant: ActivationQuant, device: torch.device, rate: float = 1.0) -> None:
        super().__init__((2, len(quant.scale)), device, rate)
        self.pace = _pace(quant.widths, device)
        self.scale, self.zero_point = quant.scale.to(device), quant.zero_point.to(device).float()
        self.symmetric = quant.symmetric
        self.code = [end.to(device).float() for end in code_ranges(quant.widths)[:2]]  # [G] each

    def soft(self) -> Tensor:
        """Scale and zero point."""
        moved = self.parameter * self.pace
        scale = self.scale * moved[0].exp()
        if self.symmetric:
            return torch.stack([scale, self.zero_point])
        low, high = self.code
        return torch.stack([scale, round_ste(self.zero_point + (high - low) * moved[1]).clamp(low, high)])


class Stretched(Smooth):
    """Something positive that moves by shares of itself.

    Args:
        value: to start from, any shape.
        pace: how fast, as it broadcasts against the value.
        rate: see `Smooth`.
    """

    def __init__(self, value: Tensor, pace: Tensor | float, rate: float) -> None:
        super().__init__(tuple(value.shape), value.device, rate)
        self.value, self.pace = value, pace

    def soft(self) -> Tensor:
        """The value, stretched."""
        return self.value * (self.pace * self.parameter).exp()


class InputClip(Stretched):
    """Share of the extremes at which an input with dynamic ranges is cut off in each group, ``[G]`` (or ``[1]``).

    Args:
        quant: the quantizer to start from.
        device: where it is learned.
        rate: see `Smooth`.
    """

    def __init__(self, quant: DynamicActivationQuant, device: torch.device, rate: float = 1.0) -> None:
        super().__init__(torch.tensor(quant.clips, device=device), _pace(quant.widths, device), rate)
        self.most = -self.value.log() / self.pace

    @torch.no_grad()
    def project(self) -> None:
        """At most 1: there is nothing beyond the extremes."""
        self.parameter.clamp_(max=self.most)


class WeightScale(Stretched):
    """Scales of a weight whose codes are settled, ``[O]`` (or ``[1]``).

    Args:
        quant: the quantizer to start from.
        device: where it is learned.
        rate: see `Smooth`.
    """

    def __init__(self, quant: WeightQuant, device: torch.device, rate: float = 1.0) -> None:
        super().__init__(quant.scale.to(device), of_steps(quant.bits), rate)


class Correction(Smooth):
    """What is added to an output, ``[G, O]``.

    Args:
        values: the table to start from.
        unit: what a step counts in, as it broadcasts against the table.
        rate: see `Smooth`.
    """

    def __init__(self, values: Tensor, unit: Tensor, rate: float = 1.0) -> None:
        super().__init__(tuple(values.shape), values.device, rate)
        self.values, self.unit = values, unit

    def soft(self) -> Tensor:
        """The table."""
        return self.values + self.unit * self.parameter
