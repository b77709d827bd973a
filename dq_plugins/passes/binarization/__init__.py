"""One bit a weight: binarizers that train, what helps them train, and storage and execution of the result.

Source: BinaryDM (Zheng et al., ICLR 2025). In the order of use: `binarydm_choices` says which layer trains how,
`train_quantized` makes it so, `BinaryDMCallback` stands beside the training loop, `to_integer` stores 8 weights to a
byte and multiplies integers.
"""

from dq_plugins.passes.binarization.callback import BinaryDMCallback
from dq_plugins.passes.binarization.checkpoint import load_checkpoint, save_checkpoint
from dq_plugins.passes.binarization.choices import BinaryDMChoices, binarydm_choices, choices_of
from dq_plugins.passes.binarization.ema import moving_average
from dq_plugins.passes.binarization.finish import to_integer, to_plan
from dq_plugins.passes.binarization.mimicking import LowRankMimicking, principal_directions
from dq_plugins.passes.binarization.savings import operations, total_size, weight_sizes
from dq_plugins.quantized.binarizers import (
    BinaryBasis,
    EvolvableBasis,
    evolution_penalty,
    evolvable_bases,
    evolve,
    fade,
    second_scale_mean,
)
from dq_plugins.quantized.learned_step import LearnedStepActivation, LearnedStepWeight
from dq_plugins.quantized.packing import pack_signs, unpack_signs
from dq_plugins.quantized.trained_layers import LayerChoice, train_quantized, trained_layers

__all__ = [
    "BinaryBasis",
    "BinaryDMCallback",
    "BinaryDMChoices",
    "EvolvableBasis",
    "LayerChoice",
    "LearnedStepActivation",
    "LearnedStepWeight",
    "LowRankMimicking",
    "binarydm_choices",
    "choices_of",
    "evolution_penalty",
    "evolvable_bases",
    "evolve",
    "fade",
    "load_checkpoint",
    "moving_average",
    "operations",
    "pack_signs",
    "principal_directions",
    "save_checkpoint",
    "second_scale_mean",
    "to_integer",
    "to_plan",
    "total_size",
    "train_quantized",
    "trained_layers",
    "unpack_signs",
    "weight_sizes",
]
