"""``quantize_(denoiser, TimestepInt8Config(...))``: calibration by sampling, behind torchao's own verb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchao.core.config import AOBaseConfig

from dq_plugins.affine import integer_range
from dq_plugins.errors import DQError
from dq_torchao.versions import Versioned

STEPS = ("prepare", "convert")


@dataclass
class TimestepInt8Config(Versioned, AOBaseConfig):
    """int8 weights times int8 activations, with one activation range per layer and timestep group.

    Attributes:
        step: ``"prepare"`` observes layers while you sample; ``"convert"`` quantizes them (other fields are then
            ignored: those of the preparation hold).
        groups: largest number of timestep groups; the groups are chosen to make the least error.
        weight_bits: width of weight codes, 2 to 8; products are computed in int8 all the same.
        act_bits: width of activation codes, 2 to 8.
        timestep: name of the forward argument that carries the timestep; found by itself where it has a usual name.
        recipe: registered recipe that makes the plan; one whose passes need statistics of inputs only, such as
            ``"ranges"`` (error-minimising, in optimal groups) or ``"fast"`` (min-max, in uniform groups).
        symmetric: whether activation zero points are fixed at 0.
        out_of_range: what a timestep outside the calibrated range does: ``"error"``, or ``"nearest"`` group.

    Example::

        quantize_(pipe.unet, TimestepInt8Config(step="prepare", groups=8), linear_and_conv2d)
        for prompt in prompts:
            pipe(prompt)
        quantize_(pipe.unet, TimestepInt8Config(step="convert"), linear_and_conv2d)

    The filter is needed: torchao's own does not say which denoiser a layer belongs to. `dq_torchao.LayerFilter` makes
    one of any function. Conversion quantizes the layers that are prepared and selected; the others stay as they are.
    """

    step: Literal["prepare", "convert"] = "prepare"
    groups: int = 8
    weight_bits: int = 8
    act_bits: int = 8
    timestep: str | None = None
    recipe: str = "ranges"
    symmetric: bool = False
    out_of_range: Literal["error", "nearest"] = "error"
    version: int = 1

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise DQError(f"TimestepInt8Config: step is one of {', '.join(STEPS)}, got {self.step!r}")
        if self.groups < 1:
            raise DQError(f"TimestepInt8Config: at least one timestep group is needed, got groups={self.groups}")
        for name in ("weight_bits", "act_bits"):
            bits = getattr(self, name)
            integer_range(bits)
            if not 2 <= bits <= 8:
                raise DQError(f"TimestepInt8Config: {name} must be 2 to 8 to run in int8, got {bits}")
