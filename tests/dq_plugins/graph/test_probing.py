from __future__ import annotations

import dataclasses

import pytest
import torch
from odd_denoisers import Obelisk, Quarry, TwoLayers, randomise
from torch import nn

from dq_plugins.errors import TraceError
from dq_plugins.graph import check_by_probing, partition


def probe(model: nn.Module, inputs: dict):
    return check_by_probing(model, inputs, partition(model, inputs))


@pytest.mark.parametrize("model", [Quarry, Obelisk])
def test_every_layer_behaves_as_the_graph_says(model):
    part = partition(model(), model.inputs())
    report = check_by_probing(randomise(model()), model.inputs(), part)
    assert set(report.confirmed["sample"]) == set(part.layers) - part.sample
    assert part.temporal <= set(report.confirmed["condition"])
    assert part.condition <= set(report.confirmed["timestep"])
    assert not any(report.unchanged.values())
    assert report.unobserved == ()


def test_layers_that_a_zero_weight_silences_are_reported_not_refused():
    model = randomise(Quarry())
    nn.init.zeros_(model.z.weight)
    report = probe(model, Quarry.inputs())
    assert report.unchanged == {"sample": ("z",), "condition": ("z",), "timestep": ("z",)}


def test_a_wrong_partition_is_refused_with_the_layers_named():
    part = partition(Quarry(), Quarry.inputs())
    info = dataclasses.replace(part.layers["b.q"], depends=frozenset({"noise_level"}), signature="temporal")
    wrong = dataclasses.replace(part, layers={**part.layers, "b.q": info})
    with pytest.raises(TraceError, match=r"contradicts.*'b\.q' \(temporal in the graph\) changes with the sample"):
        check_by_probing(randomise(Quarry()), Quarry.inputs(), wrong)


class Remembers(TwoLayers):
    """Keeps the last sample: what tracing one call cannot see."""

    memory = None

    def forward(self, x, t):
        if self.memory is not None:
            t = t + self.memory
        self.memory = x.mean() if not torch.compiler.is_compiling() else None
        return self.body(x) + self.time(t)


def test_state_between_calls_is_caught():
    with pytest.raises(TraceError, match="'time'"):
        probe(Remembers(), TwoLayers.inputs())


class Drops(TwoLayers):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(4, 4)

    def forward(self, x, t):
        return self.body(x) + self.again(nn.functional.dropout(self.time(t), 0.5, self.training))


def test_dropout_is_off_while_probing():
    assert set(probe(Drops().train(), TwoLayers.inputs()).confirmed["sample"]) == {"time", "again"}


class Borrows(TwoLayers):
    def forward(self, x, t):
        return nn.functional.linear(x, self.body.weight) + self.time(t)


def test_layers_that_are_never_called_are_reported():
    assert probe(Borrows(), TwoLayers.inputs()).unobserved == ("body",)


def test_the_denoiser_is_left_as_it_was():
    model = randomise(Quarry()).train()
    model.m.eval()
    probe(model, Quarry.inputs())
    assert model.b.training
    assert not model.m.training
    assert not model.a._forward_hooks


def test_without_values_there_is_nothing_to_probe():
    model = Quarry().to("meta")
    with pytest.raises(TraceError, match="meta device"):
        probe(model, Quarry.inputs())
