from __future__ import annotations

import itertools
import math

import pytest
import torch

from dq_plugins.errors import DQError
from dq_plugins.testing.metric_conformance import MetricConformance


class MeanSquare:
    """Mean of the squared difference."""

    higher_is_better = False

    def __call__(self, reference, output):
        if reference.shape != output.shape or not torch.isfinite(output).all():
            raise DQError("bad input")
        return float((reference - output).square().mean())


class Psnr(MeanSquare):
    """Peak signal-to-noise ratio; infinite for equal tensors."""

    higher_is_better = True

    def __call__(self, reference, output):
        error = super().__call__(reference, output)
        return -10 * math.log10(error) if error else math.inf


class Upside(MeanSquare):
    """Says the wrong direction."""

    higher_is_better = True


class Undecided(MeanSquare):
    """Says no direction."""

    higher_is_better = "maybe"


class Jittery(MeanSquare):
    """Draws from the global random state."""

    def __call__(self, reference, output):
        return super().__call__(reference, output) + 1e-9 * float(torch.rand(()))


class Careless(MeanSquare):
    """Takes what broadcasts, and NaN for a number."""

    def __call__(self, reference, output):
        return float((reference - output).nan_to_num().square().mean())


class Vandal(MeanSquare):
    """Computes in place."""

    def __call__(self, reference, output):
        return super().__call__(reference.mul_(2), output)


class PerSample(MeanSquare):
    """Gives a value per sample."""

    def __call__(self, reference, output):
        return (reference - output).square().flatten(1).mean(1)


class Silent(MeanSquare):
    __doc__ = None


@pytest.mark.parametrize("metric", [MeanSquare(), Psnr()], ids=["lower", "higher"])
def test_a_sound_metric_passes(failures, metric):
    assert failures(MetricConformance, metric) == set()


@pytest.mark.parametrize(
    ("metric", "caught"),
    [
        (Upside(), {"equal tensors are best", "more noise is worse"}),
        (Undecided(), {"it says which direction is better"}),
        (Jittery(), {"same tensors same value"}),
        (Careless(), {"nan is refused", "other shape is refused"}),
        (Vandal(), {"inputs are left as they are"}),
        (PerSample(), {"value is one real number"}),
        (Silent(), {"it says what it is"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_is_caught_by_the_test_that_is_named_after_it(failures, metric, caught):
    assert caught <= failures(MetricConformance, metric)


def test_every_check_can_fail(failures):
    faults = [Upside(), Undecided(), Jittery(), Careless(), Vandal(), PerSample(), Silent()]
    caught = set(itertools.chain.from_iterable(failures(MetricConformance, fault) for fault in faults))
    own = {name for name in vars(MetricConformance) if name.startswith("test_")}
    assert {name.removeprefix("test_").replace("_", " ") for name in own} <= caught
