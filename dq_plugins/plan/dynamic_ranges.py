"""What a plan says about an input whose ranges are measured at run time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from dq_plugins.affine import MAX_BITS, integer_range
from dq_plugins.artifact import STRICT
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief

Share = Annotated[float, Field(gt=0, le=1)]


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
            largest values and tell the many others less apart.
        groups: name of the timestep groups in the plan that index ``group_bits`` and ``group_clips``.
        group_bits: width of the code in each group, ``[G]``, where groups differ.
        group_clips: share of the extremes in each group, ``[G]``, likewise, in place of ``clip``.

    Source: Yao et al. 2022 (ZeroQuant), section 4.1; a share of the extremes as in Ashkboos et al. 2024 (QuaRot).
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    bits: Annotated[int, Field(ge=2, le=MAX_BITS)]
    symmetric: bool = True
    clip: Share = 1.0
    groups: str | None = None
    group_bits: tuple[Annotated[int, Field(ge=2, le=MAX_BITS)], ...] | None = None
    group_clips: tuple[Share, ...] | None = None

    def __post_init__(self) -> None:
        integer_range(self.bits)
        if self.bits < 2:
            raise PlanError("ranges per token need at least 2 bits")
        for clip in (self.clip, *(self.group_clips or ())):
            if not 0 < clip <= 1:
                raise PlanError(f"clip is a share of the extremes, more than 0 and at most 1, got {clip!r}")
        self._check_groups()

    def _check_groups(self) -> None:
        bits, clips = self.group_bits, self.group_clips
        if bits is None or clips is None or self.groups is None:
            if (bits, clips, self.groups) != (None, None, None):
                raise PlanError("groups, group_bits and group_clips of dynamic ranges stand together or not at all")
            return
        if max(bits) != self.bits or self.narrowest < 2:
            raise PlanError(f"group_bits are at least 2, the largest of them bits={self.bits}; got {bits}")
        if len(clips) != len(bits) or self.clip != 1:
            raise PlanError(
                f"where groups differ each has a clip of its own, and clip is 1; got clip={self.clip} and {len(clips)} "
                f"group_clips of {len(bits)} groups"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the code in each group, ``[G]``; one where groups do not differ."""
        return self.group_bits or (self.bits,)

    @property
    def clips(self) -> tuple[float, ...]:
        """Share of the extremes in each group, ``[G]``; one where groups do not differ."""
        return self.group_clips or (self.clip,)

    @property
    def narrowest(self) -> int:
        """The least width of any group."""
        return min(self.widths)

    @property
    def forms(self) -> tuple[DynamicActivationQuant, ...]:
        """What it is in each group, ``[G]``; one where groups do not differ."""
        if self.groups is None:
            return (self,)
        each = zip(self.widths, self.clips, strict=True)
        return tuple(DynamicActivationQuant(bits, self.symmetric, clip) for bits, clip in each)

    def in_groups(self, groups: str, forms: Sequence[DynamicActivationQuant]) -> DynamicActivationQuant:
        """One that has a form of its own in each group; without groups where all are the same.

        Args:
            groups: name of the timestep groups in the plan.
            forms: without groups, ``[G]``.
        """
        if len(set(forms)) == 1:
            return forms[0]
        bits, clips = tuple(form.bits for form in forms), tuple(form.clip for form in forms)
        return replace(self, bits=max(bits), clip=1.0, groups=groups, group_bits=bits, group_clips=clips)
