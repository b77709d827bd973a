"""Pass ``binarize``: one bit for every weight that BinaryDM binarizes, eight for the rest; where training starts.

Source: BinaryDM (Zheng et al., ICLR 2025), section 3.1: the scale of a binary weight starts at its mean magnitude.

The plan says which layer has how many bits and where the second bases belong. It can be applied as it is, to see what
binarizing costs before training; `dq_plugins.binarization.choices_of` takes it to a training loop, and
`dq_plugins.binarization.to_plan` brings the result back.

Shapes: weight ``[O, ...]``, scale ``[O]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.binarization.binarizers import mean_magnitude
from dq_plugins.binarization.choices import SECTION, binarydm_choices
from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan, Section, WeightQuant
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress
from dq_plugins.weight_scale import weight_parameters

TINY = torch.finfo(torch.float32).tiny


def binary_weight(weight: Tensor) -> WeightQuant:
    """Signs, and the mean magnitude of each output channel as scale."""
    return WeightQuant(1, mean_magnitude(weight.float()).clamp_min(TINY).cpu(), scheme="binary")


def edge_weight(weight: Tensor) -> WeightQuant:
    """Eight bits over the range of each output channel."""
    scale, _ = weight_parameters(weight, 8, method="minmax")
    return WeightQuant(8, scale.cpu())


class Binarize(Pass):
    """Write every layer's weight quantizer, and where two bases help training."""

    name = "binarize"

    class Options(PassOptions):
        """Options of ``binarize``.

        Attributes:
            side_ratio: two bases where features are at least this much of the input's side.
        """

        side_ratio: float = Field(0.5, gt=0, le=1)

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``layer.weight`` of every layer that trains quantized, and the section ``binarize``."""
        choices = binarydm_choices(context.partition, context.act_bits, side_ratio=self.options.side_ratio)
        for done, (name, choice) in enumerate(choices.layers.items()):
            yield Progress(done, len(choices.layers), name)
            weight = context.denoiser.get_submodule(name).weight
            if not bool(torch.isfinite(weight).all()):
                raise PlanError(f"the weight of layer {name!r} holds NaN or infinity: it cannot be quantized")
            plan.layers[name].weight = binary_weight(weight) if choice.binary else edge_weight(weight)
            plan.layers[name].kept = "activations stay in floating point: no pass has chosen their ranges"
        for name, reason in choices.kept.items():
            plan.layers[name].kept = reason
        plan.sections[SECTION] = Section(
            {
                "evolvable": [n for n, c in choices.layers.items() if c.weight == "evolvable"],
                "evolvable_blocks": list(choices.evolvable_blocks),
                "mimicked_blocks": list(choices.blocks),
            }
        )
        yield Progress(len(choices.layers), len(choices.layers))
