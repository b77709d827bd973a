"""Conformance of metrics: ``metric(reference, output) -> float`` with a ``higher_is_better``."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from dq_plugins.registry import Kind
from dq_plugins.testing.conformance import Conformance, expect, refused


class MetricConformance(Conformance):
    """A metric compares an output with the full-precision one.

    Attributes:
        shape: shape of the tensors that the metric is called with; samples come first.
    """

    kind: ClassVar[Kind] = "metric"
    shape: ClassVar[tuple[int, ...]] = (4, 3, 32, 32)

    def reference(self) -> Tensor:
        """Smooth samples with values in [0, 1]: images as far as any metric can tell."""
        generator = torch.Generator().manual_seed(0)
        waves = torch.rand(self.shape, generator=generator)
        for dim in range(1, len(self.shape)):
            waves = (waves + waves.roll(1, dim) + waves.roll(2, dim)) / 3
        return waves

    def noisy(self, strength: float) -> Tensor:
        """The reference with Gaussian noise of a standard deviation."""
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(1))
        return (self.reference() + strength * noise).clamp(0, 1)

    def measure(self, reference: Tensor, output: Tensor) -> float:
        """Value of the metric, with this suite's options."""
        return float(self.plugin(reference, output, **self.options))

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` is the better value of the two."""
        return one > other if self.plugin.higher_is_better else one < other

    def test_it_says_which_direction_is_better(self) -> None:
        found = getattr(self.plugin, "higher_is_better", None)
        expect(isinstance(found, bool), f"higher_is_better of {self.name!r} is {found!r}; expected True or False")

    def test_value_is_one_real_number(self) -> None:
        """A float or a 0-d tensor, never NaN."""
        value = self.plugin(self.reference(), self.noisy(0.1), **self.options)
        single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        expect(single, f"{self.name!r} gave {type(value).__name__}; expected one number")
        expect(math.isfinite(float(value)), f"{self.name!r} gave {float(value)} for ordinary tensors")

    def test_equal_tensors_are_best(self) -> None:
        """Nothing beats the reference itself; the value may be infinite, not NaN."""
        reference = self.reference()
        best = self.measure(reference, reference.clone())
        expect(not math.isnan(best), f"{self.name!r} gave NaN for equal tensors")
        worse = self.measure(reference, self.noisy(0.02))
        expect(
            self.better(best, worse), f"{self.name!r}: {best} for equal tensors is no better than {worse} with noise"
        )

    def test_more_noise_is_worse(self) -> None:
        values = [self.measure(self.reference(), self.noisy(strength)) for strength in (0.02, 0.1, 0.4)]
        ordered = self.better(values[0], values[1]) and self.better(values[1], values[2])
        direction = "higher" if self.plugin.higher_is_better else "lower"
        expect(ordered, f"{self.name!r} says {direction} is better and gave {values} for growing noise")

    def test_same_tensors_same_value(self) -> None:
        values = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            values.append(self.measure(self.reference(), self.noisy(0.1)))
        expect(values[0] == values[1], f"{self.name!r} gave {values[0]} and then {values[1]} for the same tensors")

    def test_inputs_are_left_as_they_are(self) -> None:
        reference, output = self.reference(), self.noisy(0.1)
        self.measure(reference, output)
        same = torch.equal(reference, self.reference()) and torch.equal(output, self.noisy(0.1))
        expect(same, f"{self.name!r} changed one of its inputs in place")

    def test_other_shape_is_refused(self) -> None:
        """Broadcasting a wrong shape gives a number that means nothing."""
        with refused(f"an output of another shape by the metric {self.name!r}"):
            self.measure(self.reference(), self.noisy(0.1)[:1])

    def test_nan_is_refused(self) -> None:
        """A NaN in the output is an error of its own, not a low quality."""
        output = self.noisy(0.1)
        output.view(-1)[0] = torch.nan
        with refused(f"an output with a NaN by the metric {self.name!r}"):
            self.measure(self.reference(), output)
