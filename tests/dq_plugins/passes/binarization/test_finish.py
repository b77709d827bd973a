from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from binary_models import tiny_denoiser, tiny_inputs

import dq_plugins.graph as graph
from dq_plugins.errors import DQError
from dq_plugins.hashing import weights_hash
from dq_plugins.passes.binarization import (
    LayerChoice,
    binarydm_choices,
    evolve,
    operations,
    to_integer,
    total_size,
    train_quantized,
    trained_layers,
    weight_sizes,
)
from dq_plugins.passes.binarization.finish import to_plan
from dq_plugins.plan import LayerPlan, QuantPlan
from dq_plugins.quantized import simulate
from dq_plugins.timesteps import Schedule


def empty_plan(model):
    part = graph.partition(model, tiny_inputs())
    layers = {n: LayerPlan(i.kind, frozenset(i.roles)) for n, i in part.layers.items()}
    return QuantPlan("TinyDenoiser", weights_hash(model), "timestep", Schedule((900.0, 500.0, 100.0)), layers=layers)


def trained(act_bits=8, channels=8):
    model = tiny_denoiser(channels=channels)
    choices = binarydm_choices(graph.partition(model, tiny_inputs()), act_bits)
    train_quantized(model, choices.layers)
    model(**tiny_inputs())
    evolve(model)
    with torch.no_grad():  # as training might leave them: some scales negative, one weight at zero
        layer = model.get_submodule("middle.conv1")
        layer.weight_quantizer.scale[:3] *= -1
        layer.weight[0, 0, 0, 0] = 0.0
        layer.weight[5, 0, 0, 0] = 0.0
    return model


@pytest.mark.parametrize("act_bits", [4, 8, None])
def test_integer_model_computes_what_was_trained(act_bits):
    model = trained(act_bits)
    expected = model(**tiny_inputs()).detach()
    found = to_integer(model)(**tiny_inputs())
    # a code on a rounding boundary may move by one when a float sum before it rounds differently
    assert (found - expected).square().mean() < 1e-4 * expected.square().mean()


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


@pytest.mark.parametrize("finish", [to_integer, lambda m: to_plan(m, empty_plan(tiny_denoiser()))])
def test_two_bases_cannot_be_finished_and_nothing_is_changed(finish):
    model = tiny_denoiser()
    train_quantized(model, {"first": LayerChoice("int8"), "middle.conv1": LayerChoice("evolvable")})
    model(**tiny_inputs())
    with pytest.raises(DQError, match=r"'middle\.conv1'.*two bases"):
        finish(model)
    assert len(trained_layers(model)) == 2


def test_activations_that_never_ran_cannot_be_finished():
    model = train_quantized(tiny_denoiser(), {"first": LayerChoice("int8")})
    with pytest.raises(DQError, match="run the model once"):
        to_integer(model)


def test_a_plain_model_cannot_be_finished():
    with pytest.raises(DQError, match="train_quantized"):
        to_integer(tiny_denoiser())


def test_binarized_part_is_over_twenty_times_smaller_on_disk(tmp_path):
    model = trained(channels=32)
    total = total_size(weight_sizes(model, binary_only=True))
    assert total.ratio > 20
    assert total.stored <= total.theoretical + len(weight_sizes(model))  # at most a byte a layer for the last bits
    to_integer(model)
    after = total_size(weight_sizes(model, binary_only=True))
    assert after == total
    binary = {k: v for k, v in model.state_dict().items() if ".weight." in k and "first" not in k and "last" not in k}
    binary = {k: v for k, v in binary.items() if not k.startswith("embed")}
    safetensors.torch.save_file(binary, tmp_path / "w.safetensors")
    header = 8 + 120 * len(binary)
    assert (tmp_path / "w.safetensors").stat().st_size <= total.stored + header


def test_operations_follow_the_papers_count():
    part = graph.partition(tiny_denoiser(), tiny_inputs())
    choices = binarydm_choices(part, 4)
    counted = operations(part, choices.layers)
    edges = {"first", "last", "embed"}
    bops = sum(i.macs * (64 if n in edges else 4) for n, i in part.layers.items())
    assert counted.quantized == bops / 64
    assert counted.original == sum(i.macs for i in part.layers.values())
    assert operations(part, {}).ratio == 1
