from __future__ import annotations

import pytest
import torch

from dq_plugins.affine import integer_range
from dq_plugins.errors import DQError
from dq_plugins.testing.observer_conformance import ObserverConformance


class Sound:
    """Smallest and largest value."""

    name = "under-test"

    def __init__(self, bits, symmetric):
        integer_range(bits)
        self.symmetric, self.low, self.high = symmetric, float("inf"), -float("inf")

    def update(self, x):
        self.see(x.detach())

    def see(self, x):
        if not torch.isfinite(x).all():
            raise DQError("not finite")
        if x.numel():
            self.low = min(self.low, float(x.min()))
            self.high = max(self.high, float(x.max()))

    def merge(self, other):
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self):
        if self.low > self.high:
            raise DQError("nothing seen")
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        return (-max(-low, high), max(-low, high)) if self.symmetric else (low, high)


class Misnamed(Sound):
    name = "someone-else"


class WithoutZero(Sound):
    def range(self):
        super().range()
        return self.low, self.high


class Lopsided(Sound):
    def range(self):
        low, high = super().range()
        return 0.9 * low, high


class AnyWidth(Sound):
    def __init__(self, bits, symmetric):
        super().__init__(8, symmetric)


class AnyOption(Sound):
    def __init__(self, bits, symmetric, **options):
        super().__init__(bits, symmetric)


class RangeOfNothing(Sound):
    def range(self):
        return super().range() if self.low <= self.high else (0.0, 0.0)


class Nanny(Sound):
    def update(self, x):
        self.see(x.nan_to_num(posinf=0, neginf=0))


class ZeroForEmpty(Sound):
    def update(self, x):
        self.see(x if x.numel() else torch.zeros(1) - 1000)


class Tensors(Sound):
    def range(self):
        return tuple(map(torch.tensor, super().range()))


class TooWide(Sound):
    def range(self):
        return tuple(1.5 * each for each in super().range())


class TooNarrow(Sound):
    def range(self):
        return tuple(0.2 * each for each in super().range())


class AbsoluteUnits(Sound):
    def range(self):
        low, high = super().range()
        return min(low, -0.01), max(high, 0.01)


class Jittery(Sound):
    def range(self):
        low, high = super().range()
        return low * (1 - 1e-6 * float(torch.rand(()))), high


class LastBatch(Sound):
    def update(self, x):
        self.low, self.high = float("inf"), -float("inf")
        self.see(x)


class FirstWins(Sound):
    def merge(self, other):
        pass


class Greedy(Sound):
    def merge(self, other):
        super().merge(other)
        other.low, other.high = self.low, self.high


class InPlace(Sound):
    def update(self, x):
        self.see(x.detach().mul_(1))
        with torch.no_grad():
            x.clamp_(-1, 1)


class Keeper(Sound):
    def update(self, x):
        self.see(x)
        self.kept = x

    def range(self):
        if hasattr(self, "kept"):
            self.see(self.kept)
        return super().range()


class Hoarder(Sound):
    def update(self, x):
        self.see(x)
        self.all = [*getattr(self, "all", []), x.detach().clone()]


class Float32Only(Sound):
    def update(self, x):
        if x.dtype != torch.float32:
            raise DQError("float32 only")
        self.see(x)


class Shared(Sound):
    def __deepcopy__(self, memo):
        return self


FAULTS = {
    Misnamed: "it goes by its registered name",
    WithoutZero: "range holds zero and is symmetric where asked",
    Lopsided: "range holds zero and is symmetric where asked",
    AnyWidth: "width outside 1 to 16 is refused",
    AnyOption: "unknown option is refused",
    RangeOfNothing: "range before any value is refused",
    Nanny: "nan and infinity are refused",
    ZeroForEmpty: "empty tensor changes nothing or is refused",
    Tensors: "range is two finite ordered numbers",
    TooWide: "range lies within what was seen",
    TooNarrow: "quantizing with the range keeps the signal",
    AbsoluteUnits: "scaled values scale the range",
    Jittery: "same stream same range",
    LastBatch: "how the stream is cut hardly matters",
    FirstWins: "merged observers hardly differ from one",
    Greedy: "merged observers hardly differ from one",
    InPlace: "input is neither changed nor kept",
    Keeper: "input is neither changed nor kept",
    Hoarder: "memory is flat in the number of batches",
    Float32Only: "any shape and floating dtype is taken",
    Shared: "copy is independent",
}


def test_a_sound_observer_passes(failures):
    assert failures(ObserverConformance, Sound) == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_by_the_test_that_is_named_after_it(failures, fault):
    assert FAULTS[fault] in failures(ObserverConformance, fault)


def test_every_check_has_a_fault_that_it_catches():
    own = {name.removeprefix("test_").replace("_", " ") for name in vars(ObserverConformance) if "test_" in name}
    assert own == set(FAULTS.values())
