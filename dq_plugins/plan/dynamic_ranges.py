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
        bits: width of the code.
        symmetric: whether zero points are fixed at 0.
        clip: share of the extremes at which values are cut off. With few bits that is better than to keep the few
            largest values and tell the many others less apart.

    Source: Yao et al. 2022 (ZeroQuant), section 4.1; a share of the extremes as in Ashkboos et al. 2024 (QuaRot).
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    bits: Annotated[int, Field(ge=2, le=MAX_BITS)]
    symmetric: bool = True
    clip: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        integer_range(self.bits)
        if self.bits < 2:
            raise PlanError("ranges per token need at least 2 bits")
        if not 0 < self.clip <= 1:
            raise PlanError(f"clip is a share of the extremes, more than 0 and at most 1, got {self.clip!r}")

    def at(self, bits: int) -> DynamicActivationQuant:
        """The same at another width, where nothing is cut off."""
        return self if bits == self.bits else replace(self, bits=bits, clip=1.0)
