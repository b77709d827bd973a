"""What passes decide about a denoiser as a whole, and other passes and adapters read.

Shapes: ``T`` timesteps, ``F`` shape of a layer's output for one sample, ``P`` tokens, ``D`` input and ``O`` output
features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from dq_plugins.affine import MAX_BITS, MIN_BITS
from dq_plugins.artifact import STRICT, StoredTensor
from dq_plugins.errors import PlanError
from dq_plugins.plan.brief import brief

Operand = Literal["weight", "activation"]

ByWidth = Mapping[str, Mapping[Operand, Mapping[int, float]]]
"""A number for every layer, operand and width in bits."""


LEAST_GROUP_SIZE = 8
"""Fewest input channels that share a scale of a weight."""

Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]


@dataclass(frozen=True)
class Targets:
    """What a run aims at, stated once for all of its passes.

    Attributes:
        weight_bits: width of weights; passes may give single layers more or fewer.
        act_bits: width of inputs; None leaves them in floating point.
        edge_bits: least width of weights and inputs of the first and last layers, which see or make the image itself.
        condition_bits: least width of the inputs of layers that depend on the timestep and the conditions alone: these
            run once a call, or once a word, so that few bits save next to nothing there. None: `act_bits`.
        symmetric_weights: weights have zero point 0, as integer kernels like it.
        symmetric_acts: inputs have zero point 0.
        weight_group_size: input channels that share a scale of the weight, where its width leaves room
            (`dq_plugins.quantized.weight_groups`); None: one scale for each output.
    """

    __pydantic_config__ = STRICT

    weight_bits: Bits = 8
    act_bits: Bits | None = 8
    edge_bits: Bits = 8
    condition_bits: Bits | None = None
    symmetric_weights: bool = True
    symmetric_acts: bool = False
    weight_group_size: int | None = None

    def __post_init__(self) -> None:
        widths = (("weight_bits", MIN_BITS), ("act_bits", 2), ("edge_bits", MIN_BITS), ("condition_bits", 2))
        for name, least in widths:
            bits = getattr(self, name)
            if bits is None and name in ("act_bits", "condition_bits"):
                continue
            if not isinstance(bits, int) or not least <= bits <= MAX_BITS:
                raise PlanError(f"{name} is a number of bits from {least} to {MAX_BITS}, got {bits!r}")
        size = self.weight_group_size
        if size is not None and (not isinstance(size, int) or size < LEAST_GROUP_SIZE):
            raise PlanError(f"weight_group_size is at least {LEAST_GROUP_SIZE} input channels, got {size!r}")


@dataclass(frozen=True)
class RangeMethods:
    """How the ranges of a plan were chosen, so that quantizers of other widths can be made in the same way.

    Attributes:
        weights: ``"minmax"`` or ``"shrink"``, see `dq_plugins.quantized.weight_scale`.
        inputs: registered observer, or ``"by-width"``.
        power: p of the error norm of the observer ``"mse"``.
        attention: observer of the operands of attentions, likewise.
        attention_power: p of its error norm.
    """

    __pydantic_config__ = STRICT

    weights: Literal["minmax", "shrink"] = "shrink"
    inputs: str = "mse"
    power: float = 2.0
    attention: str = "by-width"
    attention_power: float = 2.0


@dataclass(frozen=True)
class CalibrationCalls:
    """The recorded calls that later passes calibrate on: of each timestep the first so many.

    Attributes:
        timesteps: recorded timesteps, ascending.
        visits: number of calls of each.
    """

    __pydantic_config__ = STRICT

    timesteps: tuple[float, ...]
    visits: tuple[int, ...]

    def __post_init__(self) -> None:
        _ascending(self.timesteps, "calibration timesteps")
        if len(self.visits) != len(self.timesteps) or min(self.visits) < 1:
            raise PlanError(
                f"calibration calls: {len(self.timesteps)} timesteps need as many visits, each at least 1; got "
                f"{self.visits}"
            )


@dataclass
class TabulatedOutput:
    """Output of a layer at every timestep of a table.

    Attributes:
        rows: ``[T, *F]``: float, or int8 codes together with ``scale``.
        scale: float32 ``[T]``, of int8 rows.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    rows: StoredTensor
    scale: StoredTensor | None = None


@dataclass
class TabulatedBlock:
    """The temporal block as a table: what its layers give at every timestep of the schedule.

    Attributes:
        timesteps: ascending.
        outputs: the layers through which t leaves the block.
        not_computed: layers that only feed these.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    timesteps: tuple[float, ...]
    outputs: dict[str, TabulatedOutput]
    not_computed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ascending(self.timesteps, "timesteps of the temporal table")
        for name, output in self.outputs.items():
            if len(output.rows) != len(self.timesteps):
                raise PlanError(
                    f"the temporal table has {len(output.rows)} rows for layer {name!r} and {len(self.timesteps)} "
                    "timesteps"
                )
            if (output.scale is None) == (not output.rows.is_floating_point()) or (
                output.scale is not None and output.scale.shape != output.rows.shape[:1]
            ):
                raise PlanError(f"int8 rows of the temporal table have one scale a row, others none; not so {name!r}")

    @property
    def layers(self) -> frozenset[str]:
        """Layers that the table replaces; they need no quantizer."""
        return frozenset(self.outputs) | frozenset(self.not_computed)


@dataclass
class OutlierRows:
    """Rows of a layer's output that are known, because the input row is always the same.

    Attributes:
        positions: of the outlier tokens.
        inputs: their input rows ``[P, D]``.
        outputs: what the full-precision layer makes of them, bias included, ``[P, O]``.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    positions: tuple[int, ...]
    inputs: StoredTensor
    outputs: StoredTensor

    def __post_init__(self) -> None:
        rows = [t.shape[0] if t.dim() == 2 else -1 for t in (self.inputs, self.outputs)]
        if not self.positions or rows != [len(self.positions)] * 2 or min(self.positions) < 0:
            raise PlanError(
                f"outlier tokens at positions {self.positions} need a row of inputs and of outputs each, got shapes "
                f"{tuple(self.inputs.shape)} and {tuple(self.outputs.shape)}"
            )


@dataclass(frozen=True)
class EstimateCheck:
    """An estimate against exact measurements of some entries.

    Attributes:
        entries: how many were measured exactly.
        rank_correlation: Spearman's, over them; None where there is none.
        typical_ratio: geometric mean of exact / estimate, by ``operand@bits``; what estimates were multiplied by; those
            of attentions are apart, by ``attention@bits``.
        spread: geometric standard deviation of exact / corrected estimate.
    """

    __pydantic_config__ = STRICT

    entries: int
    rank_correlation: float | None
    typical_ratio: Mapping[str, float]
    spread: float


DriftByWidth = Mapping[str, Mapping[Operand, Mapping[int, tuple[float, ...]]]]
"""Amplitudes that add up over layers, for every layer, operand and width in bits."""


@dataclass(frozen=True)
class MeasuredImageError:
    """What each width of each layer's weight and input does to the final image.

    Attributes:
        random: mean square error that adds up in power over layers.
        drift: amplitudes that add up as they are: the mean of every channel of the image, and the gain.
        check: how the whole of an entry compares with exact measurements; None when none was made.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    random: ByWidth
    drift: DriftByWidth
    check: EstimateCheck | None = None


@dataclass(frozen=True)
class MeasuredSensitivity:
    """What each width of each layer's weight and input costs.

    Attributes:
        weight_choices: widths of weights that were measured.
        act_choices: widths of inputs.
        noise: noise power of the denoiser's output relative to its signal.
        structure: loss of similarity of the final samples by moved local means; empty when it was not measured.
        texture: loss of similarity within windows.
        check: how the noise compares with exact measurements; None when it is exact.
        calls: what the measurement cost, in denoiser calls (a backward pass counts two).
        naive_calls: what repeating every call and every run for each entry would have cost.
        image: what it does to the final image; None when it was not measured.
    """

    __pydantic_config__ = STRICT
    __repr__ = brief

    weight_choices: tuple[int, ...]
    act_choices: tuple[int, ...]
    noise: ByWidth
    structure: ByWidth = field(default_factory=dict)
    texture: ByWidth = field(default_factory=dict)
    check: EstimateCheck | None = None
    calls: float = 0.0
    naive_calls: float = 0.0
    image: MeasuredImageError | None = None


@dataclass(frozen=True)
class SamplerCorrection:
    """What the sampler does about the errors of the quantized denoiser, step by step; no weight is touched.

    At timestep t the (guided) output of the quantized denoiser is ``(1 + k) y`` and a rest that does not go with ``y``,
    the full-precision one. The sampler divides by ``1 + k``; one that adds noise adds less, for the rest is noise too.

    Attributes:
        sampler: class name of the sampler that it was fitted for.
        timesteps: that sampling visits, in order.
        gain: ``k``, by timestep.
        noise: standard deviation to leave out of what the sampler adds, in units of the sample, by timestep.
    """

    __pydantic_config__ = STRICT

    sampler: str
    timesteps: tuple[float, ...]
    gain: tuple[float, ...]
    noise: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.timesteps) == len(self.gain) == len(self.noise) or not self.timesteps:
            raise PlanError("a sampler correction has a gain and a noise for every timestep, and at least one")
        if len(set(self.timesteps)) < len(self.timesteps):
            raise PlanError("a sampler correction is looked up by timestep, so no timestep comes twice")
        if not all(math.isfinite(k) and abs(k) < 1 for k in self.gain) or not all(n >= 0 for n in self.noise):
            raise PlanError(f"gains lie between -1 and 1 and noise is not negative; got {self.gain}, {self.noise}")

    def at(self, timestep: float) -> tuple[float, float]:
        """Gain and noise of a timestep.

        Raises:
            PlanError: it was not fitted.
        """
        if timestep not in self.timesteps:
            raise PlanError(
                f"the sampler correction was fitted at {len(self.timesteps)} timesteps from {self.timesteps[0]:g} to "
                f"{self.timesteps[-1]:g}, and {timestep:g} is none of them: sample with as many steps as were recorded"
            )
        place = self.timesteps.index(timestep)
        return self.gain[place], self.noise[place]


@dataclass(frozen=True)
class BinaryTraining:
    """Where binary weights train how.

    Attributes:
        evolvable_layers: layers with two bases that become one.
        evolvable_blocks: the blocks they are in.
        mimicked_blocks: blocks whose features are mimicked, in execution order.
    """

    __pydantic_config__ = STRICT

    evolvable_layers: tuple[str, ...]
    evolvable_blocks: tuple[str, ...]
    mimicked_blocks: tuple[str, ...]


def _ascending(timesteps: tuple[float, ...], what: str) -> None:
    if not timesteps or any(a >= b for a, b in pairwise(timesteps)):
        raise PlanError(f"{what} ascend strictly, got {timesteps}")
