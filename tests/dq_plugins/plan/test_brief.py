from __future__ import annotations

import torch
from plans import example_plan

from dq_plugins.plan import LayerPlan, Reason, WeightQuant
from dq_plugins.timesteps import TimestepGroups


def test_a_plan_prints_on_a_screen() -> None:
    plan = example_plan()
    for i in range(300):
        plan.layers[f"block.{i}"] = LayerPlan("linear", unquantized_reason=Reason(f"reason {i % 20}"))
        plan.groups[f"block.{i}"] = TimestepGroups((500.0,))
    lines = repr(plan).splitlines()
    assert len(lines) < 25
    assert max(map(len, lines)) < 250
    text = repr(plan)
    for told in (
        "Net",
        "recipe 'default'",
        "W8A8",
        "2 timesteps",
        "all (2)",
        "1 W4A8",
        "reason 0",
        "balance (1 layers)",
    ):
        assert told in text, told
    assert "tensor(" not in text


def test_parts_of_a_plan_print_in_a_line_without_their_tensors() -> None:
    layer = example_plan().layers["a"]
    for part in (layer, layer.weight, layer.activation, layer.bias_correction):
        assert "\n" not in repr(part)
        assert "tensor(" not in repr(part)
        assert len(repr(part)) < 700
    assert repr(WeightQuant(4, torch.ones(3))) == "WeightQuant(bits=4, scale=<float32 [3] in [1, 1]>)"
    assert repr(LayerPlan("linear")) == "LayerPlan(kind='linear')"
    assert "noise=" in repr(example_plan().sensitivity)
