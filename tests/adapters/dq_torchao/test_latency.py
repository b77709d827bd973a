from __future__ import annotations

import dq_torchao
import pytest
import torch
from dq_torchao import latency, tuning
from torch import nn
from torchao_models import Denoiser, denoiser_plan

from dq_plugins.errors import TraceError
from dq_plugins.metrics.latency import Latency
from dq_plugins.plan import LowRank, Rotation, Subspace
from dq_plugins.quantized.width import Width


class WithClasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes, self.one, self.two = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep, label):
        return self.two(self.one(sample + self.classes(label) + timestep))


def inputs(**more):
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0), **more}


def class_inputs():
    return {"sample": torch.randn(2, 8), "timestep": torch.tensor(500.0), "label": torch.tensor([1, 3])}


def test_every_layer_has_a_time_at_every_width_and_the_model_is_left_alone():
    model = Denoiser()
    one = inputs(sample=torch.ones(1, 4, 8, 8))
    before = model(**one)
    table = dq_torchao.latency_table(model, inputs(), (4, 8), (6, 8), rounds=2)
    assert set(table.layers) == {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for times in table.layers.values():
        assert set(times) == {"full precision", "W4A6", "W4A8", "W8A6", "W8A8"}
        assert all(ms > 0 for ms in times.values())
    assert torch.equal(model(**one), before)


def test_layers_with_dynamic_ranges_are_timed_in_their_form(monkeypatch):
    lowered, lower = [], latency.lower_layer
    monkeypatch.setattr(latency, "lower_layer", lambda layer, plan, *a: (lowered.append(plan), lower(layer, plan, *a)))
    table = dq_torchao.latency_table(Denoiser(), inputs(), (8,), (6, 8), dynamic=["up"], rounds=2)
    assert table.layers["up"].keys() == table.layers["down"].keys() == {"full precision", "W8A6", "W8A8"}
    assert [plan.width for plan in lowered if plan.dynamic] == ["W8A6 dynamic", "W8A8 dynamic"]


def test_layers_alike_are_timed_once_and_embeddings_by_their_weight(monkeypatch):
    asked = []

    def recorded(layer, layouts, widths, rounds, dynamic):
        widths = [Width(), *widths]
        asked.append((type(layer), widths))
        return dict.fromkeys(widths, 1.0)

    monkeypatch.setattr(latency, "_times", recorded)
    table = dq_torchao.latency_table(WithClasses(), class_inputs())
    assert asked == [(nn.Embedding, [Width(), Width(8)]), (nn.Linear, [Width(), Width(8, 8)])]
    assert table.layers["one"] == table.layers["two"] == {"full precision": 1.0, "W8A8": 1.0}


@pytest.mark.parametrize(("call", "overhead"), [(100.0, 94.0), (5.0, 0.0)], ids=["more than layers", "noise"])
def test_times_of_several_calls_add_up_and_overhead_is_what_layers_do_not_take(monkeypatch, call, overhead):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, sample, timestep):
            return self.layer(self.layer(sample) + timestep)

    measured = {"call": call, "full precision": 3.0, "W8A8": 1.0}
    for module in (latency, tuning):
        monkeypatch.setattr(
            module, "compare_latency", lambda forms, **_: {name: Latency(*[measured[name]] * 4) for name in forms}
        )
    table = dq_torchao.latency_table(Twice(), {"sample": torch.randn(2, 8), "timestep": torch.tensor(1.0)})
    assert table.layers == {"layer": {"full precision": 6.0, "W8A8": 2.0}}
    assert table.overhead_ms == overhead


def test_embeddings_are_measured():
    table = dq_torchao.latency_table(WithClasses(), class_inputs(), rounds=2)
    assert set(table.layers["classes"]) == {"full precision", "W8"}


def test_options_are_those_of_the_search():
    table = dq_torchao.LatencyTable({"up": {"W8A8": 2.0}}, 5.0)
    assert table.options() == {"latency_table": {"up": {"W8A8": 2.0}}, "call_latency": 5.0}


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(TraceError, match="missing 1 required positional argument: .timestep."):
        dq_torchao.latency_table(Denoiser(), {"sample": torch.zeros(1, 4, 8, 8)})


def test_rotations_and_branches_of_a_plan_are_timed_with_the_layers(monkeypatch):
    lowered, lower = [], latency.lower_layer
    monkeypatch.setattr(latency, "lower_layer", lambda layer, plan, *a: (lowered.append(plan), lower(layer, plan, *a)))
    model = Denoiser()
    plan = denoiser_plan(model)
    plan.layers["up"].rotation = Rotation("hadamard", 4)
    plan.layers["down"].low_rank = LowRank(torch.zeros(2, 32).half(), torch.zeros(8, 2).half())
    plan.layers["conv_in"].subspace = Subspace(torch.eye(4)[:1].half())
    table = dq_torchao.latency_table(model, inputs(), (4, 8), (8,), plan=plan, rounds=2)
    assert table.layers["up"].keys() == {"full precision", "W4A8", "W8A8"}
    found = [(plan.width, plan.features) for plan in lowered if plan.features]
    assert found == [(width, (what,)) for what in ("subspace", "rotation", "low_rank") for width in ("W4A8", "W8A8")]
