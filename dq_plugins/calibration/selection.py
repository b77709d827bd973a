"""The part of a calibration set that a plan says to calibrate on.

What was drawn is in the plan, under the section `SECTION`, so that a run that resumes sees the same calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dq_plugins.calibration.calibration_set import CalibrationSet

SECTION = "calibration-timesteps"


def describe(timesteps: Sequence[float], visits: Sequence[int]) -> dict[str, Any]:
    """What the section says: the first so many recorded calls of each timestep."""
    return {"timesteps": list(timesteps), "visits": list(visits)}


def narrowed(calibration: CalibrationSet, data: Mapping[str, Any] | None) -> CalibrationSet:
    """The calls that a section's data select; all of them where there is none."""
    if data is None or "visits" not in data:
        return calibration
    visits = dict(zip(data["timesteps"], data["visits"], strict=True))
    return calibration.subset(per_timestep=visits)
