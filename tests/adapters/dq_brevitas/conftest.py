from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq_plugins.testing.denoiser import TIMESTEPS, TinyDenoiser, example_inputs

Call = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls() -> list[Call]:
    """One call per timestep of the schedule; inputs grow with t, so that groups have different ranges."""
    found = []
    for seed, t in enumerate(TIMESTEPS):
        inputs = example_inputs(batch=3, seed=seed)
        found.append({**inputs, "sample": inputs["sample"] * (0.2 + t / 300), "timestep": torch.tensor([float(t)])})
    return found


@pytest.fixture
def quantize() -> Callable[..., nn.Module]:
    """Quantize a `TinyDenoiser` the way a Brevitas script does."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat

    def run(act: Any, weight: Any = Int8WeightPerChannelFloat, **extra: Any) -> nn.Module:
        arguments = {
            "input_quant": act,
            "weight_quant": weight,
            "bias_quant": None,
            "return_quant_tensor": False,
            **extra,
        }
        layers = {nn.Linear: (qnn.QuantLinear, arguments), nn.Conv2d: (qnn.QuantConv2d, arguments)}
        return layerwise_quantize(TinyDenoiser(), layers).eval()

    return run


@pytest.fixture
def calibrate(calls: list[Call]) -> Callable[[nn.Module], nn.Module]:
    """Stock calibration over the calls."""
    from brevitas.graph.calibrate import calibration_mode

    def run(model: nn.Module) -> nn.Module:
        with torch.no_grad(), calibration_mode(model):
            for call in calls:
                model(**call)
        return model.eval()

    return run
