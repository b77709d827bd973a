from __future__ import annotations

import pytest

from dq_plugins.calibration.schedules import visited_schedules


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([[9], [5], [1]], [[9, 5, 1]]),
        ([[9], [9], [5], [5]], [[9, 5]]),  # guidance as two calls
        ([[9], [5], [5], [1], [1]], [[9, 5, 1]]),  # two evaluations a step, but the first
        ([[9], [5], [9], [5]], [[9, 5]]),  # two batches of images
        ([[9], [5], [1], [9], [1]], [[9, 5, 1], [9, 1]]),  # another number of steps
        ([[5], [9], [1], [5], [9], [1]], [[5, 9, 1]]),  # shuffled
        ([[5], [5], [5]], [[5]]),  # a one-step model, or one step of three batches
        ([[9, 5, 9], [5, 1, 5]], [[9, 5, 1]]),  # samples at timesteps of their own
        ([[9, 5], [9], [5], [1]], [[9, 5, 1]]),  # ... in one call, then one at a time
        ([], []),
    ],
)
def test_schedules_of_calls(calls, expected):
    assert visited_schedules(calls) == expected
