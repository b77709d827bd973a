"""The timesteps one sampling run visits, in order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dq_plugins.errors import TimestepError


@dataclass(frozen=True)
class Schedule:
    """Timesteps in the order in which sampling visits them.

    Example:
        >>> Schedule((900.0, 500.0, 100.0)).sorted
        (100.0, 500.0, 900.0)
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (a file with other fields is not of this kind)

    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        if not self.timesteps:
            raise TimestepError("a schedule needs at least one timestep, got none")
        bad = [t for t in self.timesteps if not math.isfinite(t)]
        if bad:
            raise TimestepError(f"a schedule holds finite timesteps only, found {bad[:3]}")

    @classmethod
    def of(cls, scheduler: Any) -> Schedule:
        """Schedule of a diffusers scheduler (anything with ``timesteps``) or of any iterable of numbers."""
        timesteps: Iterable[Any] = getattr(scheduler, "timesteps", scheduler)
        return cls(tuple(float(t) for t in timesteps))

    @property
    def sorted(self) -> tuple[float, ...]:
        """Distinct timesteps, ascending."""
        return tuple(sorted(set(self.timesteps)))

    def __len__(self) -> int:
        return len(self.timesteps)
