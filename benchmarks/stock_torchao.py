"""Four-bit weights with 8-bit activations as torchao itself does it, for comparison.

torchao has this for linear layers alone, with ranges of activations computed at run time, per token. Convolutions and
embeddings stay in floating point. Its AWQ, GPTQ and SmoothQuant do not take this config (torchao 0.18): AWQ asserts on
the weight's class, the others know other configs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import gcd

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm


@dataclass(frozen=True)
class TorchaoPTQ:
    """One choice of torchao's options.

    Attributes:
        groups: weight scales for groups of inputs, of torchao's default 32 or the largest power of two that divides
            every layer; off: one for each output channel.
        scales: how they are chosen.
    """

    groups: bool = False
    scales: IntxChooseQParamsAlgorithm = IntxChooseQParamsAlgorithm.AFFINE

    def __call__(self, denoiser: nn.Module, widths: dict[str, int]) -> nn.Module:
        """A copy whose linear layers are quantized at the widths of a plan."""
        model = copy.deepcopy(denoiser)
        size = gcd(32, *(m.in_features for m in model.modules() if isinstance(m, nn.Linear)))
        for bits in sorted(set(widths.values())):
            config = Int8DynamicActivationIntxWeightConfig(
                getattr(torch, f"int{bits}"),
                PerGroup(size) if self.groups else PerAxis(0),
                intx_choose_qparams_algorithm=self.scales,
            )
            quantize_(model, config, lambda m, name, b=bits: isinstance(m, nn.Linear) and widths.get(name) == b)
        return model
