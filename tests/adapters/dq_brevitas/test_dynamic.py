from __future__ import annotations

import pytest
from dq_brevitas import layer_map
from dq_brevitas.adapter import BrevitasAdapter
from torch import nn

from dq_plugins.errors import PlanError
from dq_plugins.plan import DynamicActivationQuant
from dq_plugins.testing.denoiser import TinyDenoiser
from dq_plugins.testing.plans import handmade_plan


def test_dynamic_ranges_are_refused_by_name():
    model = TinyDenoiser().requires_grad_(False)
    plan = handmade_plan(model)
    name = next(name for name, layer in plan.layers.items() if layer.kind == "linear")
    plan.layers[name].activation = DynamicActivationQuant(8)
    with pytest.raises(PlanError, match=f"dynamic_ranges .*{name}"):
        BrevitasAdapter().apply(model, plan)
    _, arguments = layer_map(plan)[nn.Linear]
    with pytest.raises(PlanError, match=f"{name}.*dynamic ranges"):
        arguments["input_quant"](model.get_submodule(name), name)
