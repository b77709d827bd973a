"""What a plan says about an input whose ranges are measured at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from dq_plugins.affine import MAX_BITS, integer_range
from dq_plugins.artifact import STRICT
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief


@dataclass(frozen=True)
class DynamicActivationQuant:
    """Quantizer of a layer's input whose ranges are the input's own: one (scale, zero point) for each token of a linear
    layer, for each sample of a convolution, which sums over positions.

    A token is a vector along the last dimension. Its range is that of its values, divided by the layer's balance if it
    has one, and likewise a sample's; see `dq_plugins.affine.dynamic_parameters`. Nothing is stored.

    Attributes:
        bits: width of the code; the largest, where groups differ.
        symmetric: whether zero points are fixed at 0.
        clip: share of the extremes at which values are cut off. With few bits that is better than to keep the few
            largest values and tell the many others less apart. It is that of the narrowest width; wider codes cut
            nothing off.
        groups: name of the timestep groups in the plan that index ``group_bits``.
        group_bits: width of the code in each group, ``[G]``, where groups differ.

    Source: Yao et al. 2022 (ZeroQuant), section 4.1; a share of the extremes as in Ashkboos et al. 2024 (QuaRot).
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    bits: Annotated[int, Field(ge=2, le=MAX_BITS)]
    symmetric: bool = True
    clip: Annotated[float, Field(gt=0, le=1)] = 1.0
    groups: str | None = None
    group_bits: tuple[Annotated[int, Field(ge=2, le=MAX_BITS)], ...] | None = None

    def __post_init__(self) -> None:
        integer_range(self.bits)
        if self.bits < 2:
            raise PlanError("ranges per token need at least 2 bits")
        if not 0 < self.clip <= 1:
            raise PlanError(f"clip is a share of the extremes, more than 0 and at most 1, got {self.clip!r}")
        if (self.groups is None) != (self.group_bits is None):
            raise PlanError("group_bits of dynamic ranges name their timestep groups, and only they do")
        if self.group_bits is not None and (max(self.group_bits) != self.bits or self.narrowest < 2):
            raise PlanError(f"group_bits are at least 2, the largest of them bits={self.bits}; got {self.group_bits}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the code in each group, ``[G]``; one where groups do not differ."""
        return self.group_bits or (self.bits,)

    @property
    def narrowest(self) -> int:
        """The least width of any group."""
        return min(self.widths)

    @property
    def forms(self) -> tuple[DynamicActivationQuant, ...]:
        """What it is in each group, ``[G]``; one where groups do not differ."""
        return tuple(self.at(bits) for bits in self.widths)

    def at(self, bits: int) -> DynamicActivationQuant:
        """The same at one width for all timesteps, where nothing is cut off unless it is the narrowest."""
        clip = self.clip if bits == self.narrowest else 1.0
        return replace(self, bits=bits, clip=clip, groups=None, group_bits=None)
