from __future__ import annotations

import pickle

import pytest
import torch
from attention_models import RECIPE as ATTENTION
from attention_models import attention_calls_recorded, attention_denoiser, attention_inputs

import dq_plugins as dq
from dq_plugins.errors import PlanError
from dq_plugins.passes.width_candidates import candidates_of, write_widths
from dq_plugins.quantized.attention import site_name
from dq_plugins.quantized.layer_transform import transforms_of
from dq_plugins.quantized.network import SuperNetwork
from dq_plugins.quantized.width import Width
from dq_plugins.recipe import PassContext, Recipe, Step
from dq_plugins.testing.denoiser import calibrated, example_inputs

RANGES = Recipe(
    "ranges", "", (Step("weight-ranges"), Step("timestep-groups", {"groups": 2}), Step("activation-ranges"))
)


@pytest.fixture(scope="module")
def network():
    with calibrated() as (denoiser, calibration):
        plan = dq.make_plan(denoiser, calibration, RANGES, progress=False)
        context = PassContext(denoiser, calibration)
        yield denoiser, plan, candidates_of(plan, context, (3, 4, 8), (4, 8))


@pytest.fixture(scope="module")
def balanced():
    with calibrated() as (denoiser, calibration):
        steps = (Step("channel-balance", {"least_gain": 0.0}), *RANGES.steps)
        plan = dq.make_plan(denoiser, calibration, Recipe("balanced", "", steps), progress=False)
        transforms = transforms_of(plan.layers)
        assert transforms
        context = PassContext(denoiser, calibration, transforms=transforms)
        yield denoiser, plan, candidates_of(plan, context, (3, 4, 8), (4, 8))


@pytest.fixture(scope="module")
def attending(tmp_path_factory):
    denoiser = attention_denoiser()
    calibration = attention_calls_recorded(denoiser, tmp_path_factory.mktemp("attending"))
    plan = dq.make_plan(denoiser, calibration, ATTENTION, progress=False)
    return denoiser, plan, candidates_of(plan, PassContext(denoiser, calibration), (3, 8), (4, 8))


def test_attentions_have_widths_too(attending):
    denoiser, plan, candidates = attending
    near, far = site_name("near"), site_name("far")
    chosen = pickle.loads(pickle.dumps(plan))
    for widths in ({near: Width(None, 4), far: Width(None, 8)}, {near: Width(None, 8)}, {far: Width()}):
        every = {name: Width(8, 8) for name in candidates.layers} | {near: Width(), far: Width()} | widths
        with SuperNetwork(denoiser, candidates, "timestep") as net:
            net.switch(every)
            found = denoiser(**attention_inputs())
        write_widths(chosen, every, candidates)
        assert torch.equal(dq.apply(denoiser, chosen, "simulate")(**attention_inputs()), found)
    assert not chosen.attention["near"].quantized
    assert chosen.attention["near"].unquantized_reason.code == "allocated"


def alternating(candidates):
    return {name: Width((3, 8)[i % 2], (8, 4)[i % 2]) for i, name in enumerate(candidates.layers)}


@pytest.mark.parametrize("case", ["network", "balanced"])
def test_it_computes_what_a_plan_with_these_widths_computes(case, request):
    denoiser, plan, candidates = request.getfixturevalue(case)
    widths = alternating(candidates)
    inputs = [{**example_inputs(), "timestep": torch.tensor(t)} for t in (900, 300)]
    with SuperNetwork(denoiser, candidates, "timestep") as net:
        net.switch(widths)
        found = [denoiser(**each) for each in inputs]
    chosen = pickle.loads(pickle.dumps(plan))
    write_widths(chosen, widths, candidates)
    applied = dq.apply(denoiser, chosen, "simulate")
    assert all(torch.equal(a, applied(**each)) for a, each in zip(found, inputs, strict=True))


def test_switching_back_and_forth_gives_the_same_bits_of_output(network):
    denoiser, _, candidates = network
    inputs, widths = example_inputs(), alternating(candidates)
    with SuperNetwork(denoiser, candidates, "timestep") as net:
        net.switch(widths)
        first = denoiser(**inputs)
        net.switch(dict.fromkeys(candidates.layers, Width(4, 4)))
        other = denoiser(**inputs)
        net.switch(widths)
        assert torch.equal(denoiser(**inputs), first)
        assert not torch.equal(other, first)


def test_closing_restores_the_denoiser_exactly(network):
    denoiser, _, candidates = network
    before, weights = denoiser(**example_inputs()), dict(denoiser.named_parameters())
    with SuperNetwork(denoiser, candidates, "timestep") as net:
        net.switch(alternating(candidates))
    with pytest.raises(PlanError), SuperNetwork(denoiser, candidates, "timestep") as net:
        net.switch({"nowhere": Width(4, 4)})
    assert torch.equal(denoiser(**example_inputs()), before)
    assert all(p is weights[n] for n, p in denoiser.named_parameters())
    assert "forward" not in vars(denoiser)
    assert not any(m._forward_pre_hooks for m in denoiser.modules())


def test_switching_computes_nothing_once_a_width_was_used(network, monkeypatch):
    denoiser, _, candidates = network
    one, other = alternating(candidates), dict.fromkeys(candidates.layers, Width(4, 8))
    with SuperNetwork(denoiser, candidates, "timestep") as net:
        net.switch(one)
        pointers = [layer.weight.data_ptr() for layer in map(denoiser.get_submodule, candidates.layers)]
        net.switch(other)
        monkeypatch.setattr("dq_plugins.plan.WeightQuant.fake_quantize", None)  # a call would fail
        net.switch(one)
        assert pointers == [layer.weight.data_ptr() for layer in map(denoiser.get_submodule, candidates.layers)]


def test_layers_that_are_not_named_are_in_full_precision(network):
    denoiser, _, candidates = network
    expected = denoiser(**example_inputs())
    with SuperNetwork(denoiser, candidates, "timestep") as net:
        net.switch(alternating(candidates))
        net.switch({})
        assert torch.equal(denoiser(**example_inputs()), expected)


def test_mistakes_are_named(network):
    denoiser, plan, candidates = network
    net = SuperNetwork(denoiser, candidates, "timestep")
    with pytest.raises(PlanError, match="open the run first"):
        net.switch({})
    with net:
        with pytest.raises(PlanError, match="open already"):
            net.__enter__()
        with pytest.raises(PlanError, match="layer 'nowhere' has no weight quantizer"):
            net.switch({"nowhere": Width(4, 4)})
        with pytest.raises(PlanError, match="no weight quantizer of 5 bits"):
            net.switch({"first": Width(5, None)})
    with pytest.raises(PlanError, match="quantized already"):
        SuperNetwork(dq.apply(denoiser, plan, "simulate"), candidates, "timestep").__enter__()
