from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dq_plugins.plan import LayerPlan, QuantPlan, Reason, WeightQuant
from dq_plugins.report.execution import LayerExecution, executions, layer_table
from dq_plugins.timesteps import Schedule


@dataclass
class Told:
    state: str = "integer"
    kernel: str = "some.kernel"
    compute: str = "int8 x int8 -> int32"
    reason: str = ""
    bits: int = 4
    bytes: int = 30


def plan() -> QuantPlan:
    layers = {
        "told": LayerPlan("linear", weight=WeightQuant(4, torch.ones(1)), unquantized_reason=Reason("x")),
        "simulated": LayerPlan("linear", weight=WeightQuant(4, torch.ones(1)), unquantized_reason=Reason("x")),
        "kept": LayerPlan("linear", unquantized_reason=Reason("it is the last")),
    }
    return QuantPlan("ModuleDict", "", "timestep", Schedule((1.0,)), layers=layers)


def test_adapter_says_how_a_layer_runs_and_what_it_stores_and_the_rest_is_measured():
    model = nn.ModuleDict({name: nn.Linear(10, 6) for name in plan().layers})
    model["told"].execution = Told()
    found = executions(model.half(), plan())
    assert found == {
        "told": LayerExecution("integer", "W4A32", "some.kernel", "int8 x int8 -> int32", "", 4, 30),
        "simulated": LayerExecution(
            "simulated", "W4A32", "", "floating point", "the backend only simulates", 16, 10 * 6 * 2
        ),
        "kept": LayerExecution("full precision", "full precision", "", "", "it is the last", 16, 120),
    }


def test_table_states_compute_dtype_bits_and_bytes_of_every_layer():
    text = layer_table({"up": LayerExecution("integer", "W3A8", "k", "uint8 x int8 -> int32", "", 3, 96)})
    _, _, row = str(text).splitlines()
    assert row.split() == ["up", "integer", "W3A8", "k", *["uint8", "x", "int8", "->", "int32"], "3", "96"]
