"""One bit a weight: binarizers that train, what helps them train, and a plan of the result.

Source: BinaryDM (Zheng et al., ICLR 2025). In the order of use: `binarydm_choices` says which layer trains how,
`train_quantized` makes it so, `BinaryDMCallback` stands beside the training loop, and `to_plan` writes what was learned
into a plan, which adapters store with 8 weights to a byte and run in integers.
"""

from dq_plugins.passes.binarization.callback import BinaryDMCallback, moving_average
from dq_plugins.passes.binarization.checkpoint import load_checkpoint, save_checkpoint
from dq_plugins.passes.binarization.choices import BinaryDMChoices, binarydm_choices, choices_of
from dq_plugins.passes.binarization.finish import to_plan
from dq_plugins.passes.binarization.savings import operations, weight_size
from dq_plugins.quantized.binarizers import (
    EvolvableBasis,
    evolution_penalty,
    evolvable_bases,
    evolve,
    fade,
    second_scale_mean,
    shrink,
)
from dq_plugins.quantized.learned_step import LearnedStepActivation
from dq_plugins.quantized.trained_layers import LayerChoice, train_quantized, trained_layers

__all__ = [
    "BinaryDMCallback",
    "BinaryDMChoices",
    "EvolvableBasis",
    "LayerChoice",
    "LearnedStepActivation",
    "binarydm_choices",
    "choices_of",
    "evolution_penalty",
    "evolvable_bases",
    "evolve",
    "fade",
    "load_checkpoint",
    "moving_average",
    "operations",
    "save_checkpoint",
    "second_scale_mean",
    "shrink",
    "to_plan",
    "train_quantized",
    "trained_layers",
    "weight_size",
]
