"""Pass ``binarize``: one bit for every weight that BinaryDM binarizes, eight for the rest; where training starts.

Source: BinaryDM (Zheng et al., ICLR 2025), section 3.1: the scale of a binary weight starts at its mean magnitude.

The plan says which layer has how many bits and where the second bases belong. It can be applied as it is, to see what
binarizing costs before training; `dq_plugins.passes.binarization.choices_of` takes it to a training loop, and
`dq_plugins.passes.binarization.to_plan` brings the result back.

Shapes: weight ``[O, ...]``, scale ``[O]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dq_plugins.errors import PlanError
from dq_plugins.passes.binarization.choices import BinaryDMChoices, binarydm_choices
from dq_plugins.passes.shared_inputs import TRANSFORMING
from dq_plugins.plan import BinaryTraining, QuantPlan, Reason, WeightQuant
from dq_plugins.plan.layers import NO_RANGES
from dq_plugins.quantized.binarizers import mean_magnitude
from dq_plugins.quantized.weight_scale import weight_quantizer, weight_rows
from dq_plugins.recipe import Pass, PassContext, PassOptions, Progress

TINY = torch.finfo(torch.float32).tiny


def binary_weight(weight: Tensor) -> WeightQuant:
    """Signs, and the mean magnitude of each output channel as scale."""
    return WeightQuant(1, mean_magnitude(weight.float()).clamp_min(TINY).cpu(), scheme="binary")


class Binarize(Pass):
    """Give weights one bit, and mark where a second basis helps training."""

    name = "binarize"
    after = ("bit-allocation", "timestep-reduction", *TRANSFORMING)

    class Options(PassOptions):
        """Options of ``binarize``.

        Attributes:
            side_ratio: two bases where features are at least this much of the input's side.
            keep_widths: one bit where ``bit-allocation`` or ``timestep-reduction`` has chosen it from choices with one
                bit, instead of everywhere but at the ends.
        """

        side_ratio: float = Field(0.5, gt=0, le=1)
        keep_widths: bool = False

    options: Options
    Options: ClassVar[type[PassOptions]] = Options

    def run(self, plan: QuantPlan, context: PassContext) -> Iterator[Progress]:
        """Write ``layer.weight`` of every layer that trains quantized, and ``plan.binary_training``.

        Raises:
            PlanError: a weight is not finite, or no layer of the plan has the one bit that ``keep_widths`` keeps.
        """
        choices = binarydm_choices(
            context.partition,
            context.targets.act_bits,
            edge_bits=context.targets.edge_bits,
            side_ratio=self.options.side_ratio,
        )
        if self.options.keep_widths:
            binary = {n for n, layer in plan.layers.items() if layer.weight is not None and not layer.weight.rounds}
            if not binary:
                raise PlanError(
                    "no layer of the plan has a weight of one bit; let 'bit-allocation' or 'timestep-reduction' choose "
                    "from choices with one bit first: the option weight_choices=(1, 8) of 'sensitivity'"
                )
        else:
            binary = {n for n, choice in choices.layers.items() if choice.binary}
            yield from self._write(plan, choices, context)
        evolvable = [n for n, c in choices.layers.items() if c.weight == "evolvable" and n in binary]
        blocks = {context.partition.layers[n].block for n in evolvable}
        plan.binary_training = BinaryTraining(
            evolvable_layers=tuple(evolvable),
            evolvable_blocks=tuple(b for b in choices.evolvable_blocks if b in blocks),
            mimicked_blocks=choices.blocks,
        )
        yield Progress(len(choices.layers), len(choices.layers))

    def _write(self, plan: QuantPlan, choices: BinaryDMChoices, context: PassContext) -> Iterator[Progress]:
        for done, (name, choice) in enumerate(choices.layers.items()):
            yield Progress(done, len(choices.layers), name)
            weight = weight_rows(context.denoiser.get_submodule(name))
            if not bool(torch.isfinite(weight).all()):
                raise PlanError(f"the weight of layer {name!r} holds NaN or infinity: it cannot be quantized")
            quantizer = binary_weight(weight) if choice.binary else weight_quantizer(weight, 8, method="minmax")
            plan.layers[name].weight = quantizer
            plan.layers[name].unquantized_reason = NO_RANGES
        for name, reason in choices.unquantized.items():
            plan.layers[name].unquantized_reason = Reason(reason)
