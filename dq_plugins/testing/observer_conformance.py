"""Conformance of observers: streaming statistics of one tensor that end in a range to clip to.

The protocol is that of `dq_plugins.observers.Observer`, whose subclasses get most of it for free: made with ``bits``
and ``symmetric``, fed by ``update(x)``, asked by ``range() -> (low, high)``, two of a kind joined by ``merge``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dq_plugins.affine import affine_parameters, fake_quantize, integer_range
from dq_plugins.metrics import sqnr
from dq_plugins.registry import Kind
from dq_plugins.testing.conformance import Conformance, expect, refused


def gaussian(seed: int = 0, shape: tuple[int, ...] = (8, 512)) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIGNALS: dict[str, Tensor] = {
    "Gaussian values": gaussian(),
    "values >= 0": gaussian().relu(),
    "values <= 0": -gaussian().relu(),
    "values far from zero": gaussian() + 100,
    "outliers": torch.where(gaussian(1) > 3, 50 * gaussian(), gaussian()),
    "tiny values": gaussian() * 1e-6,
    "huge values": gaussian() * 1e6,
    "zeros": torch.zeros(8, 512),
    "one constant": torch.full((8, 512), 3.0),
    "a single value": torch.tensor([-2.0]),
}
"""What an observer may meet in a denoiser."""


class ObserverConformance(Conformance):
    """An observer turns a stream of tensors into a range, in flat memory, and refuses what has no range.

    Attributes:
        least_db: least SQNR, in dB, of standard normal values quantized to 8 bits with the observer's range.
    """

    kind: ClassVar[Kind] = "observer"
    least_db: ClassVar[float] = 20.0

    def make(self, bits: int = 8, symmetric: bool = False, **options: Any) -> Any:
        """An observer with this suite's options."""
        return self.plugin(bits=bits, symmetric=symmetric, **{**self.options, **options})

    def observe(self, batches: Sequence[Tensor], bits: int = 8, symmetric: bool = False) -> Any:
        """An observer that saw ``batches``."""
        observer = self.make(bits, symmetric)
        for batch in batches:
            observer.update(batch)
        return observer

    def variants(self) -> Iterator[tuple[int, bool]]:
        """Widths and symmetries to try."""
        return ((bits, symmetric) for bits in (4, 8) for symmetric in (False, True))

    def test_it_goes_by_its_registered_name(self) -> None:
        found = getattr(self.plugin, "name", None)
        expect(found == self.name, f"the observer registered as {self.name!r} has the name {found!r}")

    def test_width_outside_1_to_16_is_refused(self) -> None:
        """When the observer is made, not when its range is used."""
        for bits in (0, 17, -8):
            with refused(f"bits={bits}"):
                self.make(bits=bits)

    def test_unknown_option_is_refused(self) -> None:
        with refused("the option 'no_such_option'", Exception):
            self.make(no_such_option=1)

    def test_range_before_any_value_is_refused(self) -> None:
        with refused("asking for the range before any value"):
            self.make().range()

    def test_nan_and_infinity_are_refused(self) -> None:
        """When they arrive; afterwards nobody could say where they came from."""
        for bad in (torch.nan, torch.inf, -torch.inf):
            values = gaussian()
            values[3, 7] = bad
            with refused(f"a tensor that holds {bad}"):
                self.make().update(values)

    def test_empty_tensor_changes_nothing_or_is_refused(self) -> None:
        observer = self.observe([gaussian() + 100])
        before = observer.range()
        try:
            observer.update(torch.empty(0, 512))
        except Exception:
            return
        expect(observer.range() == before, f"an empty tensor moved the range from {before} to {observer.range()}")

    def test_range_is_two_finite_ordered_numbers(self) -> None:
        for what, values in SIGNALS.items():
            for bits, symmetric in self.variants():
                low, high = self.observe([values], bits, symmetric).range()
                floats = isinstance(low, float) and isinstance(high, float)
                expect(floats, f"range {low!r}, {high!r} of {what} is not a pair of floats")
                finite = abs(low) < float("inf") and abs(high) < float("inf")
                expect(finite and low <= high, f"range [{low}, {high}] of {what} is not finite and ascending")

    def test_range_lies_within_what_was_seen(self) -> None:
        """Codes beyond every value seen (and zero) are wasted; half a step may align the levels with the values."""
        for what, values in SIGNALS.items():
            for bits, symmetric in self.variants():
                low, high = self.observe([values], bits, symmetric).range()
                least, most = min(0.0, float(values.min())), max(0.0, float(values.max()))
                if symmetric:
                    least, most = min(least, -most), max(most, -least)
                slack = 0.51 * (most - least) / (2**bits - 1) + 1e-12
                inside = low >= least - slack and high <= most + slack
                expect(inside, f"range [{low}, {high}] of {what} reaches outside [{least}, {most}]")

    def test_range_holds_zero_and_is_symmetric_where_asked(self) -> None:
        """Quantizers represent zero exactly (padding, ReLU); with the zero point at 0 the range is ``(-a, a)``."""
        for what, values in SIGNALS.items():
            low, high = self.observe([values], 8, False).range()
            expect(low <= 0 <= high, f"range [{low}, {high}] of {what} leaves out zero")
            low, high = self.observe([values], 8, True).range()
            expect(low == -high, f"range [{low}, {high}] of {what} is not symmetric")

    def test_quantizing_with_the_range_keeps_the_signal(self) -> None:
        for symmetric in (False, True):
            values = gaussian()
            found = self._db(values, *self.observe([values], 8, symmetric).range(), 8, symmetric)
            expect(found >= self.least_db, f"{found:.1f} dB (symmetric={symmetric}); expected {self.least_db} dB")

    def test_scaled_values_scale_the_range(self) -> None:
        low, high = self.observe([gaussian()]).range()
        for factor in (2.0**-20, 2.0**20):
            scaled = self.observe([gaussian() * factor]).range()
            moved = max(abs(scaled[0] / factor - low), abs(scaled[1] / factor - high))
            expect(moved <= 1e-3 * (high - low), f"values times {factor:g} gave {scaled}; without it {(low, high)}")

    def test_same_stream_same_range(self) -> None:
        ranges = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            ranges.append(self.observe([gaussian(s) for s in range(4)]).range())
        expect(ranges[0] == ranges[1], f"the same stream gave {ranges[0]} and then {ranges[1]}")

    def test_how_the_stream_is_cut_hardly_matters(self) -> None:
        values = gaussian()
        whole = self.observe([values]).range()
        for what, batches in {"row by row": list(values), "rows in reverse": list(values.flip(0))}.items():
            self._expect_alike(whole, self.observe(batches).range(), values, what)

    def test_merged_observers_hardly_differ_from_one(self) -> None:
        """What two processes saw counts as one stream; the second is left as it was."""
        first, second = gaussian(0) - 10, gaussian(1) + 10
        one, other = self.observe([first]), self.observe([second])
        before = other.range()
        merged = one.merge(other)
        merged = one if merged is None else merged
        self._expect_alike(self.observe([first, second]).range(), merged.range(), torch.cat([first, second]), "merged")
        expect(other.range() == before, "merging changed the observer that was merged in")

    def test_input_is_neither_changed_nor_kept(self) -> None:
        """A denoiser may write over its activations right after."""
        values = gaussian()
        observer = self.observe([values])
        expect(torch.equal(values, gaussian()), "update changed its input in place")
        before = observer.range()
        values.mul_(1000)
        expect(observer.range() == before, "the range moved when the tensor seen earlier was overwritten: it was kept")

    def test_memory_is_flat_in_the_number_of_batches(self) -> None:
        sizes = [_elements(self.observe([gaussian(s) for s in range(n)])) for n in (4, 40)]
        expect(sizes[1] <= 1.5 * sizes[0] + 64, f"state of {sizes[0]} values after 4 batches, {sizes[1]} after 40")

    def test_any_shape_and_floating_dtype_is_taken(self) -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for shape in ((4096,), (8, 512), (2, 4, 16, 32)):
                values = gaussian().reshape(shape).to(dtype).requires_grad_()
                low, high = self.observe([values]).range()
                expect(low < 0 < high, f"range [{low}, {high}] of Gaussian values of {dtype} and shape {shape}")

    def test_copy_is_independent(self) -> None:
        observer = self.observe([gaussian()])
        before = observer.range()
        copy.deepcopy(observer).update(100 * gaussian(1))
        expect(observer.range() == before, "updating a deep copy moved the range of the original")

    def _db(self, values: Tensor, low: float, high: float, bits: int, symmetric: bool) -> float:
        """SQNR of ``values`` quantized with a range."""
        scale, zero = affine_parameters(torch.tensor(float(low)), torch.tensor(float(high)), bits, symmetric=symmetric)
        return sqnr(values, fake_quantize(values, scale, zero, *integer_range(bits)))

    def _expect_alike(self, one: tuple[float, float], other: tuple[float, float], values: Tensor, what: str) -> None:
        """Expect two ranges to serve ``values`` about as well: within 3 dB."""
        a, b = (self._db(values, *each, 8, False) for each in (one, other))
        expect(abs(a - b) <= 3, f"{what}: range {other} ({b:.1f} dB) instead of {one} ({a:.1f} dB)")


def _elements(obj: Any, seen: set[int] | None = None) -> int:
    """Numbers an object holds, through its attributes and containers."""
    seen = set() if seen is None else seen
    if id(obj) in seen:
        return 0
    seen.add(id(obj))
    if isinstance(obj, Tensor):
        return obj.numel()
    if isinstance(obj, dict):
        return sum(_elements(value, seen) for value in obj.values())
    if isinstance(obj, list | tuple | set):
        return sum(_elements(value, seen) for value in obj)
    return sum(_elements(value, seen) for value in vars(obj).values()) if hasattr(obj, "__dict__") else 1
