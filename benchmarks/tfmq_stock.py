"""Stock Brevitas and stock torchao beside TFMQ-DM in `benchmarks.tfmq`: same layers, widths, calls and noise.

What differs, because the tools have nothing else: Brevitas leaves embedding tables in floating point, torchao also
convolutions; neither knows timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat
from torch import nn
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from benchmarks.stock_brevitas import BrevitasPTQ
from benchmarks.stock_torchao import TorchaoPTQ
from dq_plugins.plan import Targets
from dq_plugins.quantized.reconstruction_units import find_units
from dq_plugins.recipe import PassContext, Step

if TYPE_CHECKING:
    from benchmarks.tfmq import Case

better = partial(BrevitasPTQ, Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloat)
BREVITAS = {
    "Brevitas, defaults": BrevitasPTQ(),
    "Brevitas, MSE weights, zero points": better(),
    "Brevitas, MSE weights, zero points, bias correction": better(bias_correction=True),
    "Brevitas, MSE weights, zero points, GPTQ": better(gptq=True),
}
LEARNED = "Brevitas, MSE weights, zero points, learned rounding"
TORCHAO = {
    "torchao, per channel": TorchaoPTQ(),
    "torchao, per channel, HQQ": TorchaoPTQ(scales=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY),
    "torchao, groups": TorchaoPTQ(groups=True),
}


def brevitas(case: Case, method: BrevitasPTQ, widths: dict[str, int], blocks: list[str], seed: int) -> nn.Module:
    """The denoiser quantized by Brevitas; learned rounding takes the blocks that our reconstruction takes."""
    return method(case.denoiser, widths, blocks, case.calibration(seed))


def torchao(case: Case, method: TorchaoPTQ, widths: dict[str, int], _seed: int) -> nn.Module:
    """The denoiser quantized by torchao, which needs no calibration."""
    return method(case.denoiser, widths)


def stock_methods(case: Case, iterations: int, calls: int) -> dict[str, Callable[[int], nn.Module]]:
    """Every stock method, from a seed to the quantized denoiser.

    Args:
        case: the denoiser and its calibration.
        iterations: of Brevitas' learned rounding, for each block.
        calls: recorded calls that it sees.
    """
    plan = case.plan((Step("weight-ranges", {"method": "minmax"}),), 0, weight_bits=4, act_bits=None)
    widths = {name: layer.weight.bits for name, layer in plan.layers.items() if layer.weight is not None}
    layers = [name for name in widths if plan.layers[name].kind != "embedding"]
    partition = PassContext(case.denoiser, case.calibration(0), Targets(4, 8)).partition
    blocks = [unit.module for unit in find_units(partition, layers)]
    methods = BREVITAS | {LEARNED: better(learned=iterations, learned_calls=calls)}
    found: dict[str, Callable[[int], nn.Module]] = {
        label: partial(brevitas, case, method, widths, blocks) for label, method in methods.items()
    }
    return found | {label: partial(torchao, case, method, widths) for label, method in TORCHAO.items()}
