from __future__ import annotations

import copy

import pytest
import torch
from binary_models import empty_plan, tiny_denoiser, tiny_inputs, trained

import dq_plugins.graph as graph
from dq_plugins.errors import DQError
from dq_plugins.passes.binarization import (
    LayerChoice,
    binarydm_choices,
    operations,
    train_quantized,
    trained_layers,
    weight_size,
)
from dq_plugins.passes.binarization.finish import to_plan
from dq_plugins.plan import QuantPlan
from dq_plugins.quantized import simulate


@pytest.mark.parametrize("act_bits", [4, 8, None])
def test_plan_of_a_trained_model_simulates_it_exactly(act_bits, tmp_path):
    plan = empty_plan(tiny_denoiser())
    model = trained(act_bits)
    inputs = tiny_inputs()
    expected = model(**inputs).detach()
    plan = to_plan(model, plan)
    assert not trained_layers(model)
    plan = QuantPlan.load(plan.save(tmp_path))
    assert plan.layers["middle.conv1"].weight.scheme == "binary"
    simulated = simulate.SimulateAdapter().apply(copy.deepcopy(model), plan)
    assert torch.equal(simulated(**inputs), expected)


def test_two_bases_cannot_be_finished_and_nothing_is_changed():
    model = tiny_denoiser()
    train_quantized(model, {"first": LayerChoice("int8"), "middle.conv1": LayerChoice("evolvable")})
    model(**tiny_inputs())
    with pytest.raises(DQError, match=r"'middle\.conv1'.*two bases"):
        to_plan(model, empty_plan(tiny_denoiser()))
    assert len(trained_layers(model)) == 2


def test_activations_that_never_ran_cannot_be_finished():
    model = train_quantized(tiny_denoiser(), {"first": LayerChoice("int8")})
    with pytest.raises(DQError, match="run the model once"):
        to_plan(model, empty_plan(tiny_denoiser()))


def test_a_plain_model_cannot_be_finished():
    with pytest.raises(DQError, match="train_quantized"):
        to_plan(tiny_denoiser(), empty_plan(tiny_denoiser()))


def test_size_counts_one_bit_a_binary_weight_and_a_scale_an_output():
    model = trained(channels=32)
    blocks = [*model.down, model.middle, *model.up]
    weights, outputs = len(blocks) * (2 * 32 * 32 * 9 + 32 * 16), len(blocks) * 3 * 32
    binary, everything = weight_size(model, binary_only=True), weight_size(model)
    assert (binary.original, binary.quantized) == (4 * weights, weights // 8 + 4 * outputs)
    assert binary.ratio > 20
    edges, edge_outputs = 2 * 16 + 2 * 3 * 32 * 9, 16 + 32 + 3  # embed, first and last, 8 bits each
    assert everything.original == 4 * (weights + edges)
    assert everything.quantized == binary.quantized + edges + 4 * edge_outputs


def test_operations_follow_the_papers_count():
    part = graph.partition(tiny_denoiser(), tiny_inputs())
    choices = binarydm_choices(part, 4)
    counted = operations(part, choices.layers)
    edges = {"first", "last", "embed"}
    bops = sum(i.macs * (64 if n in edges else 4) for n, i in part.layers.items())
    assert counted.quantized == bops / 64
    assert counted.original == sum(i.macs for i in part.layers.values())
    assert operations(part, {}).ratio == 1
